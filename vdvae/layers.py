"""Layers and helpers that are not the paper's: faster or smaller in memory, the same mathematics.

Shapes: B batch, D width, H W.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

BlockT = TypeVar("BlockT", bound=nn.Module)
RunBlock = Callable[..., Any]  # how a block is called: with itself first, then with its inputs


class Blocks(nn.ModuleList, Generic[BlockT]):
    """A ModuleList that knows the type of its blocks."""

    if TYPE_CHECKING:

        def __iter__(self) -> Iterator[BlockT]: ...


class Pointwise(nn.Conv2d):
    """A 1x1 convolution; over channels-last features it is one matrix product.

    That is up to 40% faster where the features are small, and no slower elsewhere (benchmarks/).
    """

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__(width_in, width_out, 1)

    def forward(self, x_BDHW: Tensor) -> Tensor:
        return _pointwise(x_BDHW, self.weight, self.bias)

    def forward_concatenated(self, x_BDHW: Tensor, y_BDHW: Tensor) -> Tensor:
        """The same as `forward(torch.cat([x, y], dim=1))`, without the copy that `cat` makes."""
        width = x_BDHW.shape[1]
        x = _pointwise(x_BDHW, self.weight[:, :width], None)
        return x + _pointwise(y_BDHW, self.weight[:, width:], self.bias)


def _pointwise(x_BDHW: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if not x_BDHW.is_contiguous(memory_format=torch.channels_last):
        return F.conv2d(x_BDHW, weight, bias)
    x_BHWD = x_BDHW.permute(0, 2, 3, 1)
    return F.linear(x_BHWD, weight.flatten(1), bias).permute(0, 3, 1, 2)


_ONEDNN_GELU = 2**17  # numbers, from which oneDNN's GELU is the faster one


def gelu(x_BDHW: Tensor) -> Tensor:
    """The GELU; of large features on a CPU oneDNN's, which takes up to half the time, and takes
    contiguous tensors alone: channels-last features are one in another order (benchmarks/)."""
    if not _suits_onednn(x_BDHW):
        return F.gelu(x_BDHW)
    return F.gelu(x_BDHW.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _suits_onednn(x_BDHW: Tensor) -> bool:
    channels_last = x_BDHW.is_contiguous(memory_format=torch.channels_last)
    return channels_last and x_BDHW.is_cpu and x_BDHW.numel() >= _ONEDNN_GELU


_SMALL = 2**16  # numbers per image: below, a GELU is little memory, and a call of Python's its time


def after_gelu(convolution: nn.Conv2d, x_BDHW: Tensor) -> Tensor:
    """`convolution(gelu(x))`, for whose backward pass x is kept and its GELU computed again.

    The gradients are the same, bit for bit, and half as much is kept. Small features keep both, and
    what torch.compile fuses is its own matter.

    Args:
        convolution: of stride 1 that keeps the size, without groups or dilation; its hooks are not
            called.
        x_BDHW: features, in autocast's dtype where that is on (others keep both).
    """
    if (
        not torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or x_BDHW.shape[1:].numel() < _SMALL
        or to_autocast_dtype(x_BDHW) is not x_BDHW
    ):
        y: Tensor = convolution(gelu(x_BDHW))
        return y
    assert convolution.bias is not None
    # The weights are cast out here, where the gradients of that are autograd's.
    weights = map(to_autocast_dtype, (convolution.weight, convolution.bias))
    z: Tensor = _ConvolutionOfGelu.apply(x_BDHW, *weights)  # type: ignore[no-untyped-call]
    return z


class _ConvolutionOfGelu(torch.autograd.Function):
    """`after_gelu` of features, weights and biases of one dtype."""

    @staticmethod
    def forward(ctx: Any, x_BDHW: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x_BDHW, weight)
        if weight.shape[-1] == 1:
            return _pointwise(gelu(x_BDHW), weight, bias)
        return F.conv2d(gelu(x_BDHW), weight, bias, padding=weight.shape[-1] // 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BDHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x_BDHW, weight = ctx.saved_tensors
        gradients = _pointwise_gradients if weight.shape[-1] == 1 else _convolution_gradients
        grad_active, grad_weight, grad_bias = gradients(grad_BDHW, gelu(x_BDHW), weight)
        return _gelu_gradient(grad_active, x_BDHW), grad_weight, grad_bias


def _gelu_gradient(grad_BDHW: Tensor, x_BDHW: Tensor) -> Tensor:
    """That of `gelu`'s input, in the same memory order."""
    backward = torch.ops.aten.gelu_backward
    if not _suits_onednn(x_BDHW):
        x: Tensor = backward(grad_BDHW, x_BDHW)
        return x
    x = backward(grad_BDHW.permute(0, 2, 3, 1), x_BDHW.permute(0, 2, 3, 1))
    return x.permute(0, 3, 1, 2)


def _convolution_gradients(
    grad_BDHW: Tensor, x_BDHW: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Of a convolution that keeps the size: those of its input, weight and bias."""
    padding = weight.shape[-1] // 2
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.convolution_backward(
        grad_BDHW, x_BDHW, weight, [len(weight)], [1, 1], [padding, padding], [1, 1], False, [0, 0],
        1, [True, True, True],
    )  # fmt: skip
    return found


def _pointwise_gradients(
    grad_BDHW: Tensor, x_BDHW: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The same of a 1x1 convolution, over channels-last features as matrix products."""
    if not x_BDHW.is_contiguous(memory_format=torch.channels_last):
        return _convolution_gradients(grad_BDHW, x_BDHW, weight)
    grad_BHWD = grad_BDHW.permute(0, 2, 3, 1)
    grad_ND = grad_BHWD.flatten(0, 2)
    x_ND = x_BDHW.permute(0, 2, 3, 1).flatten(0, 2)
    grad_x_BHWD = (grad_ND @ weight.flatten(1)).view(*grad_BHWD.shape[:3], -1)
    grad_weight = (grad_ND.t() @ x_ND)[:, :, None, None]
    return grad_x_BHWD.permute(0, 3, 1, 2), grad_weight, grad_ND.sum(dim=0)


def split_channels(x_BDHW: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """The first channels and the rest; their gradients are joined in the memory layout of x."""
    sizes = [first, x_BDHW.shape[1] - first]
    if not x_BDHW.is_contiguous(memory_format=torch.channels_last):
        one, other = torch.split(x_BDHW, sizes, dim=1)
        return one, other
    one, other = torch.split(x_BDHW.permute(0, 2, 3, 1), sizes, dim=3)
    return one.permute(0, 3, 1, 2), other.permute(0, 3, 1, 2)


def pad_channels(x_BDHW: Tensor, width: int) -> Tensor:
    """The features with channels of zeros appended up to a width."""
    missing = width - x_BDHW.shape[1]
    return F.pad(x_BDHW, (0, 0, 0, 0, 0, missing)) if missing else x_BDHW


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Turns autocast off while the block runs, on devices that have it."""
    available = torch.amp.is_autocast_available(device_type)
    return torch.autocast(device_type, enabled=False) if available else nullcontext()


def to_autocast_dtype(x: Tensor) -> Tensor:
    """Casts to the dtype of autocast's convolutions, if it is on: adding to their output then does
    not cast that back to float32."""
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return x.to(torch.get_autocast_dtype(kind))
    return x


def run_block(block: nn.Module, *inputs: Any) -> Any:
    """Calls a block, which keeps its activations for the backward pass."""
    return block(*inputs)


def activation_checkpointing(from_resolution: int) -> RunBlock:
    """Calls blocks so that large ones do not keep their activations.

    Args:
        from_resolution: blocks whose first input is of this height or more compute their
            activations again in the backward pass; 0: none does.

    Returns:
        A function of a block and its inputs that returns what the block does.
    """
    if not (from_resolution and torch.is_grad_enabled()):
        return run_block

    def run(block: nn.Module, x_BDHW: Tensor, *others: Any) -> Any:
        if x_BDHW.shape[-1] < from_resolution:
            return block(x_BDHW, *others)
        # The state of the random generators need not be kept: a block's noise is an input.
        return checkpoint(block, x_BDHW, *others, use_reentrant=False, preserve_rng_state=False)

    return run

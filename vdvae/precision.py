"""The arithmetic of convolutions and matrix products: float32, TF32 or bfloat16.

KLs, likelihoods, averages and sums stay in float32 or better whatever is chosen.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from vdvae.config import UserError

PRECISIONS = ("fp32", "tf32", "bf16")


def exact_float32() -> None:
    """Turns TF32 off: lower precision moves the bound (the reference is float32)."""
    _set_tf32(False)


def _set_tf32(allowed: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


def check_precision(precision: str, device: torch.device) -> None:
    """Checks that the machine has a precision.

    Raises:
        UserError: for an unknown precision, or one that the device does not have.
    """
    if precision not in PRECISIONS:
        raise UserError(f"precision: {precision!r} is not one of {', '.join(PRECISIONS)}")
    if precision == "tf32" and device.type != "cuda":
        raise UserError(f"precision: tf32 needs a CUDA device, not {device}; use fp32 or bf16")
    if precision == "bf16" and not _has_bfloat16(device):
        raise UserError(f"precision: this machine's {device} has no bfloat16; use fp32")


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@contextmanager
def allow_tf32(precision: str) -> Iterator[None]:
    """Allows TF32 while the block runs, if that is the precision: products of float32 then round
    their inputs to 10 bits of mantissa.

    It must surround the backward pass, too, which `autocast` must not.
    """
    _set_tf32(precision == "tf32")
    try:
        yield
    finally:
        exact_float32()


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """Runs convolutions and products of a forward pass in bfloat16, if that is the precision."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


@contextmanager
def arithmetic(precision: str, device: torch.device) -> Iterator[None]:
    """Sets the arithmetic of forward passes while the block runs; fp32 is the reference.

    Args:
        precision: fp32, tf32 or bf16.
        device: that computes.

    Raises:
        UserError: as `check_precision`.
    """
    check_precision(precision, device)
    with allow_tf32(precision), autocast(precision, device):
        yield

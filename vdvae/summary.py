"""The size of a config's model: blocks, latents, parameters, operations and memory.

Everything is measured with fake tensors, which have shapes and no bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from vdvae.config import AnyModelConfig, DecoderBlock, EncoderBlock, ModelConfig
from vdvae.model import VDVAE
from vdvae.models import ImageModel, build
from vdvae.precision import autocast

_FLOAT_BYTES = 4
_COPIES = 4  # of each weight in training: itself, two moments of Adam, average


@dataclass(frozen=True, kw_only=True)
class Row:
    """The part of a model at one resolution."""

    resolution: int
    encoder_blocks: int
    decoder_blocks: int  # stochastic layers
    width: int
    latents: int  # latent variables per image
    latent_share: float  # of all of them, up to and with this resolution (Child 2021, Fig. 4)
    parameters: int
    forward_flop: int  # per image, two for a multiplication with addition


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A model in figures. Input, output and gain belong to no block and are in the totals alone."""

    rows: tuple[Row, ...]  # in ascending resolution
    encoder_blocks: int
    decoder_blocks: int
    latents: int
    parameters: int
    forward_flop: int  # per image, to compute its bound
    sampling_flop: int  # per sample
    activation_bytes: int  # kept for the backward pass, per image
    cast_bytes: int  # weights in bfloat16 that are kept beside them, whatever the batch

    @property
    def training_flop(self) -> int:
        """Per image: forward, and twice that backward."""
        return 3 * self.forward_flop

    def training_bytes(self, batch_size: int, keeps_gradients: bool = False) -> int:
        """An estimate of what a training step holds in bytes: weights, moments, average, gradients
        and activations. Work space of the convolutions comes on top, the block that is being
        computed again, and what the allocator finds no use for.

        Args:
            batch_size: images at once.
            keeps_gradients: there are gradients already while activations are kept: of the parts of
                a batch before, or in the buckets of several ranks. Else they come as those go.
        """
        weights = _FLOAT_BYTES * self.parameters
        activations = batch_size * self.activation_bytes + self.cast_bytes
        together = weights + activations if keeps_gradients else max(weights, activations)
        return _COPIES * weights + together


def summarise(
    config: AnyModelConfig, checkpoint_activations_from: int = 0, precision: str = "fp32"
) -> Summary:
    """The figures of a config's model, without its memory: seconds for the largest recipe.

    Args:
        config: of the model.
        checkpoint_activations_from: as in TrainConfig; what is computed again is not kept, nor
            counted as FLOP.
        precision: of the training step whose activations are counted.
    """
    with FakeTensorMode():
        model = build(config)
        model.checkpoint_activations_from = checkpoint_activations_from
        counter = FlopCounterMode(display=False)
        with counter:
            kept = _kept_bytes(model, 1, precision)
        # What does not grow with the batch is weights in another dtype.
        activation_bytes = _kept_bytes(model, 2, precision) - kept
        model.requires_grad_(False)
        sampling = FlopCounterMode(display=False)
        if isinstance(model, VDVAE):
            with sampling:
                model.likelihood_parameters(1, temperature=0.0)
    parameters_in_all = sum(parameter.numel() for parameter in model.parameters())
    if not isinstance(config, ModelConfig) or not isinstance(model, VDVAE):
        return Summary(
            rows=(),
            encoder_blocks=0,
            decoder_blocks=0,
            latents=0,
            parameters=parameters_in_all,
            forward_flop=counter.get_total_flops(),
            # With cached activations each is computed once, as in a forward pass.
            sampling_flop=counter.get_total_flops(),
            activation_bytes=activation_bytes,
            cast_bytes=kept - activation_bytes,
        )
    flop = {name: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}

    encoder, decoder = model.encoder, model.decoder
    parameters: Counter[int] = Counter()  # by resolution, like all below
    forward: Counter[int] = Counter()
    blocks = {"encoder": Counter[int](), "decoder": Counter[int]()}
    sides: tuple[tuple[str, Sequence[EncoderBlock | DecoderBlock], nn.ModuleList], ...] = (
        ("encoder", encoder.layout, encoder.blocks),
        ("decoder", decoder.layout, decoder.blocks),
    )
    for side, layout, modules in sides:
        for index, (entry, block) in enumerate(zip(layout, modules, strict=True)):
            blocks[side][entry.resolution] += 1
            parameters[entry.resolution] += sum(weight.numel() for weight in block.parameters())
            forward[entry.resolution] += flop.get(f"VDVAE.{side}.blocks.{index}", 0)
    for bias_map in decoder.bias_maps:
        parameters[bias_map.shape[-1]] += bias_map.numel()

    rows: list[Row] = []
    entered = 0
    for resolution in decoder.resolutions:
        latents = blocks["decoder"][resolution] * config.latent_channels * resolution**2
        entered += latents
        rows.append(
            Row(
                resolution=resolution,
                encoder_blocks=blocks["encoder"][resolution],
                decoder_blocks=blocks["decoder"][resolution],
                width=config.width_at(resolution),
                latents=latents,
                latent_share=entered / config.num_latents,
                parameters=parameters[resolution],
                forward_flop=forward[resolution],
            )
        )
    return Summary(
        rows=tuple(rows),
        encoder_blocks=len(model.encoder.layout),
        decoder_blocks=len(model.decoder.layout),
        latents=config.num_latents,
        parameters=parameters_in_all,
        forward_flop=counter.get_total_flops(),
        sampling_flop=sampling.get_total_flops(),
        activation_bytes=activation_bytes,
        cast_bytes=kept - activation_bytes,
    )


def _kept_bytes(model: ImageModel, batch: int, precision: str) -> int:
    """What a forward pass keeps for the backward pass, but weights."""
    config = model.config
    shape = (batch, config.image_channels, config.image_size, config.image_size)
    x_BCHW = torch.empty(shape, dtype=torch.uint8)
    noise_BN = torch.empty(batch, config.num_latents)
    weights = {id(parameter.untyped_storage()) for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = id(tensor.untyped_storage())
        if storage not in weights:
            kept[storage] = tensor
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, autocast(precision, torch.device("cpu")):
        model(x_BCHW, noise_BN)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())

"""Latents as flat arrays, for downstream use, and exchanged between images at one resolution.

Shapes: B batch, Z latent channels, H W, M latent variables of the first blocks together.
Latents are lists of [B,Z,H,W], one per stochastic layer, top first, as `VDVAE.encode` gives them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vdvae.config import ModelConfig, UserError
from vdvae.model import VDVAE


def flatten(latents: Sequence[Tensor], first: int | None = None) -> Tensor:
    """The latents of the first blocks as one array, block after block.

    Args:
        latents: [B,Z,H,W] per stochastic layer, top first.
        first: number of blocks; all by default.

    Returns:
        [B,M].

    Raises:
        UserError: for a number of blocks that the latents do not have.
    """
    count = len(latents) if first is None else first
    if not 1 <= count <= len(latents):
        raise UserError(f"first: {first} blocks of latents; there are 1 to {len(latents)}")
    return torch.cat([z_BZHW.flatten(1) for z_BZHW in latents[:count]], dim=1)


def unflatten(config: ModelConfig, flat_BM: Tensor) -> list[Tensor]:
    """The inverse of `flatten`.

    Args:
        config: of the model.
        flat_BM: latents of the first blocks.

    Returns:
        [B,Z,H,W] per block, for `VDVAE.decode`.

    Raises:
        UserError: M is not the size of the first blocks, for any number of them.
    """
    latents: list[Tensor] = []
    start = 0
    for shape in config.latent_shapes:
        if start == flat_BM.shape[1]:
            break
        end = start + math.prod(shape)
        if end > flat_BM.shape[1]:
            raise UserError(
                f"latents: {flat_BM.shape[1]} numbers per image end in the middle of block "
                f"{len(latents)}, which needs {end}; take whole blocks"
            )
        latents.append(flat_BM[:, start:end].reshape(-1, *shape))
        start = end
    if start != flat_BM.shape[1]:
        raise UserError(
            f"latents: {flat_BM.shape[1]} numbers per image, the whole model has {start}"
        )
    return latents


def exchange(
    model: VDVAE, latents: Sequence[Tensor], others: Sequence[Tensor], resolution: int
) -> list[Tensor]:
    """Replaces the latents of one resolution by those of other images.

    Args:
        model: that the latents are of.
        latents: [B,Z,H,W] per stochastic layer, top first.
        others: the same, of the other images.
        resolution: of the layers to replace.

    Returns:
        The new latents.

    Raises:
        UserError: the resolution has no stochastic layers.
    """
    layout = model.decoder.layout
    if resolution not in model.decoder.resolutions:
        known = ", ".join(map(str, model.decoder.resolutions))
        raise UserError(f"resolution: {resolution} has no stochastic layers; there are {known}")
    return [
        other if entry.resolution == resolution else own
        for entry, own, other in zip(layout, latents, others, strict=True)
    ]

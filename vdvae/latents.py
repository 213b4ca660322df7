"""Latents to work with: flat arrays for downstream use, and images edited at one resolution.

Shapes: B batch, Z latent channels, H W, M latent variables of the first blocks together.
Latents are lists of [B,Z,H,W], one a stochastic layer, top first, as `VDVAE.encode` gives them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vdvae.config import ModelConfig, UserError
from vdvae.model import VDVAE


def flatten(latents: Sequence[Tensor], first: int | None = None) -> Tensor:
    """The latents of the first blocks as one array [B,M], block after block, each Z·H·W.

    Raises:
        UserError: for a number of blocks that the latents do not have.
    """
    count = len(latents) if first is None else first
    if not 1 <= count <= len(latents):
        raise UserError(f"first: {first} blocks of latents; there are 1 to {len(latents)}")
    return torch.cat([z_BZHW.flatten(1) for z_BZHW in latents[:count]], dim=1)


def unflatten(config: ModelConfig, flat_BM: Tensor) -> list[Tensor]:
    """The latents that `flatten` made flat, for `VDVAE.decode`; the later blocks are left out.

    Raises:
        UserError: where M is not the size of a number of first blocks.
    """
    latents: list[Tensor] = []
    start = 0
    for shape in config.latent_shapes:
        if start == flat_BM.shape[1]:
            break
        end = start + math.prod(shape)
        if end > flat_BM.shape[1]:
            raise UserError(
                f"latents: {flat_BM.shape[1]} numbers an image end in the middle of block "
                f"{len(latents)}, which needs {end}; take whole blocks"
            )
        latents.append(flat_BM[:, start:end].reshape(-1, *shape))
        start = end
    if start != flat_BM.shape[1]:
        raise UserError(
            f"latents: {flat_BM.shape[1]} numbers an image, the whole model has {start}"
        )
    return latents


def exchange(
    model: VDVAE, latents: Sequence[Tensor], others: Sequence[Tensor], resolution: int
) -> list[Tensor]:
    """The latents with those of one resolution taken from others; all else stays.

    Raises:
        UserError: for a resolution without stochastic layers.
    """
    layout = model.decoder.layout
    if resolution not in model.decoder.resolutions:
        known = ", ".join(map(str, model.decoder.resolutions))
        raise UserError(f"resolution: {resolution} has no stochastic layers; there are {known}")
    return [
        other if entry.resolution == resolution else own
        for entry, own, other in zip(layout, latents, others, strict=True)
    ]

"""The published model's arithmetic and its training step, one operation after the other.

A baseline for speed, written from its description alone: plain convolutions in PyTorch's default
memory layout, concatenation, every activation kept, one parameter updated after the other. It
computes what ours computes, on the same weights (tests/test_fast_paths.py).

Shapes: B batch, C channels, D width, Z latent channels, H W.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vdvae.config import TrainConfig
from vdvae.distributions import DiscretizedLogisticMixture
from vdvae.model import VDVAE, Bottleneck, normalised
from vdvae.precision import arithmetic
from vdvae.training import TrainState, learning_rate

_Likelihood = Literal["normalised", "published", "published_5bit"]
_LIKELIHOODS: dict[tuple[int, int], _Likelihood]  # by the number of levels, and channels
_LIKELIHOODS = {(256, 3): "published", (32, 3): "published_5bit"}


def _convolution(layer: nn.Conv2d, x_BDHW: Tensor) -> Tensor:
    return F.conv2d(x_BDHW, layer.weight, layer.bias, padding=layer.weight.shape[-1] // 2)


def _bottleneck(block: Bottleneck, x_BDHW: Tensor) -> Tensor:
    h = x_BDHW
    for layer in (block.conv1, block.conv2, block.conv3, block.conv4):
        h = _convolution(layer, F.gelu(h))
    return x_BDHW + h if block.residual else h


def _encoder(model: VDVAE, x_BCHW: Tensor) -> dict[int, Tensor]:
    encoder, config = model.encoder, model.config
    x = _convolution(encoder.input, x_BCHW)
    activations = {config.image_size: x}
    for entry, block in zip(encoder.layout, encoder.blocks, strict=True):
        x = _bottleneck(block, x)
        if entry.pool > 1:
            x = F.avg_pool2d(x, entry.pool)
        missing = config.width_at(entry.output_resolution) - x.shape[1]
        if missing:
            zeros = x.new_zeros((len(x), missing, *x.shape[2:]))
            x = torch.cat([x, zeros], dim=1)
        activations[entry.output_resolution] = x
    return activations


def negative_elbo(model: VDVAE, x_BCHW: Tensor, noise_BN: Tensor) -> Tensor:
    """Nats per image [B] of raw images (uint8), with the given noise of the posteriors."""
    decoder, config = model.decoder, model.config
    level_BCHW, input_BCHW = normalised(config, x_BCHW, decoder.gain.dtype)
    activations = _encoder(model, input_BCHW)
    features = {
        resolution: decoder.bias_maps[index].repeat(len(x_BCHW), 1, 1, 1)
        if index < len(decoder.bias_maps)
        else torch.zeros_like(activations[resolution])
        for index, resolution in enumerate(decoder.resolutions)
    }
    rates, start = [], 0
    for block in decoder.blocks:
        resolution = block.resolution
        x, z = features[resolution], block.latent_channels
        if block.unpool_from is not None:
            above = features[block.unpool_from][:, : x.shape[1]]
            x = x + F.interpolate(above, scale_factor=resolution // block.unpool_from)
        posterior = _bottleneck(block.posterior, torch.cat([x, activations[resolution]], dim=1))
        mean_q, log_sigma_q = posterior.chunk(2, dim=1)
        prior = _bottleneck(block.prior, x)
        mean_p, log_sigma_p, residual = torch.split(prior, [z, z, x.shape[1]], dim=1)
        end = start + mean_q[0].numel()
        noise = noise_BN[:, start:end].reshape(mean_q.shape)
        start = end
        drawn = torch.exp(log_sigma_q) * noise + mean_q
        squares = torch.exp(log_sigma_q) ** 2 + (mean_q - mean_p) ** 2
        kl = -0.5 + log_sigma_p - log_sigma_q + 0.5 * squares / torch.exp(log_sigma_p) ** 2
        rates.append(kl.sum(dim=(1, 2, 3)))
        x = x + residual
        x = x + _convolution(block.project, drawn)
        features[resolution] = _bottleneck(block.residual, x)
    x = features[config.image_size] * decoder.gain + decoder.bias
    mixture = DiscretizedLogisticMixture(
        channels=config.image_channels,
        num_levels=config.num_levels,
        mixtures=config.mixtures,
        arithmetic=_LIKELIHOODS.get((config.num_levels, config.image_channels), "normalised"),
    )
    distortion_B = -mixture.log_prob(_convolution(decoder.output, x), level_BCHW)
    return distortion_B + torch.stack(rates).sum(dim=0)


def train_step(state: TrainState, config: TrainConfig, x_BCHW: Tensor, noise_BN: Tensor) -> None:
    """Gradients, clipping, the rule of skipped updates, AdamW and the averaged weights."""
    model = state.model
    assert isinstance(model, VDVAE)
    state.optimiser.zero_grad(set_to_none=True)
    with arithmetic(config.precision, x_BCHW.device):
        loss = negative_elbo(model, x_BCHW, noise_BN).mean() / model.config.dims
    torch.autograd.backward(loss)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.gradient_clip, foreach=False)
    if math.isfinite(float(loss.detach())) and float(norm) <= config.skip_threshold:
        plain_update(state, config)
    state.step += 1


def plain_update(state: TrainState, config: TrainConfig) -> None:
    """AdamW and averages, one parameter after the other."""
    step = torch.optim.AdamW(
        state.model.parameters(),
        lr=learning_rate(config, state.step),
        betas=(config.beta1, config.beta2),
        weight_decay=config.weight_decay,
        fused=False,
        foreach=False,
    )
    step.state = state.optimiser.state
    step.step()
    with torch.no_grad():
        for average, value in zip(state.ema.parameters(), state.model.parameters(), strict=True):
            average.lerp_(value, 1 - config.ema_decay)

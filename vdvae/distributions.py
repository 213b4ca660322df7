"""Diagonal Gaussians and the discretized mixture of logistics (DMOL).

Shapes: B batch, C image channels, H W, K mixtures, P parameters a pixel, Z latent channels.
A grey image has P = 3K parameters, a colour image 10K, in the published order: K logits, then for
each image channel K means, K log scales and, in colour, K coefficients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vdvae.config import Likelihood, levels_to_uint8

LOG_SCALE_FLOOR = -7.0

# What random numbers come from: one for a whole batch (None: PyTorch's own), or one an image, whose
# draws then depend on no other image.
Generators = torch.Generator | Sequence[torch.Generator] | None


def drawn(
    draw: Callable[..., Tensor],
    shape: Sequence[int],
    generator: Generators,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """Numbers of `torch.rand` or `torch.randn`, drawn on the generator's own device.

    Args:
        draw: which of the two.
        shape: with the batch first.
        generator: where there is one an image, as many as the batch has.
        device: where the numbers are to be.
        dtype: of the numbers.
    """
    if isinstance(generator, Sequence):
        return torch.stack([drawn(draw, shape[1:], own, device, dtype) for own in generator])
    where = generator.device if generator is not None else device
    return draw(tuple(shape), generator=generator, device=where, dtype=dtype).to(device)


def gaussian_kl(mean_q: Tensor, log_sigma_q: Tensor, mean_p: Tensor, log_sigma_p: Tensor) -> Tensor:
    """KL(q || p) of diagonal Gaussians, element by element, in nats; all of one shape."""
    ratio = torch.exp(log_sigma_q - log_sigma_p)
    distance = (mean_q - mean_p) * torch.exp(-log_sigma_p)
    return log_sigma_p - log_sigma_q - 0.5 + 0.5 * (ratio.square() + distance.square())


def gaussian_log_ratio(
    noise: Tensor, log_sigma_q: Tensor, z: Tensor, mean_p: Tensor, log_sigma_p: Tensor
) -> Tensor:
    """log q(z) - log p(z) at z = mean_q + sigma_q · noise, element by element, in nats.

    Its mean over the noise is `gaussian_kl`; importance weights need it draw by draw.
    """
    standardised = (z - mean_p) * torch.exp(-log_sigma_p)
    return log_sigma_p - log_sigma_q + 0.5 * (standardised.square() - noise.square())


def dmol_parameters(image_channels: int, mixtures: int) -> int:
    """P, the number of parameters a pixel."""
    return 10 * mixtures if image_channels == 3 else 3 * mixtures


def _split(params_BPHW: Tensor, channels: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Log weights [B,K,H,W]; means, log scales and coefficients [B,C,K,H,W] (no such in grey)."""
    batch, parameters, height, width = params_BPHW.shape
    mixtures = parameters // (10 if channels == 3 else 3)
    log_weights_BKHW = F.log_softmax(params_BPHW[:, :mixtures], dim=1)
    kinds = 3 if channels == 3 else 2
    rest = params_BPHW[:, mixtures:].reshape(batch, channels, kinds, mixtures, height, width)
    log_scales_BCKHW = rest[:, :, 1].clamp(min=LOG_SCALE_FLOOR)
    coefficients = torch.tanh(rest[:, :, 2]) if channels == 3 else None
    return log_weights_BKHW, rest[:, :, 0], log_scales_BCKHW, coefficients


def _conditional_means(
    means_BCKHW: Tensor, coefficients_BCKHW: Tensor | None, target_BCHW: Tensor
) -> Tensor:
    """Means of green given red, and of blue given red and green (PixelCNN++, eq. 3)."""
    if coefficients_BCKHW is None:
        return means_BCKHW
    red, green = target_BCHW[:, 0, None], target_BCHW[:, 1, None]
    green_red, blue_red, blue_green = coefficients_BCKHW.unbind(dim=1)
    mean_red, mean_green, mean_blue = means_BCKHW.unbind(dim=1)
    return torch.stack(
        [
            mean_red,
            mean_green + green_red * red,
            mean_blue + blue_red * red + blue_green * green,
        ],
        dim=1,
    )


def dmol_target(
    level_BCHW: Tensor, num_levels: int, likelihood: Likelihood, dtype: torch.dtype
) -> Tensor:
    """Centre of each level's bin, in [-1, 1].

    The published 5-bit targets are spaced 16/255 apart although their bins are 2/31 wide
    (REFERENCE: this is why its probabilities do not sum to 1).
    """
    if likelihood == "published_5bit":
        return (level_BCHW.to(dtype) * 8 - 127.5) / 127.5
    return level_BCHW.to(dtype) * (2 / (num_levels - 1)) - 1


def dmol_log_prob(
    params_BPHW: Tensor,
    level_BCHW: Tensor,
    num_levels: int,
    likelihood: Likelihood = "normalised",
) -> Tensor:
    """Log-probability of an image under the mixture, in nats an image: [B].

    Each level owns a bin of half-width 1/(L-1) around its value in [-1, 1]; the outer bins are
    open. `normalised` takes the mass of a bin in log space, so the levels' probabilities sum to 1.
    `published` and `published_5bit` repeat the published arithmetic with its fallback to a density
    where the mass is at most 1e-5 (PixelCNN++; Child 2021).

    Args:
        params_BPHW: the likelihood's parameters, float.
        level_BCHW: levels 0..L-1, an integer type.
        num_levels: L.
        likelihood: the arithmetic.
    """
    target_BCHW = dmol_target(level_BCHW, num_levels, likelihood, params_BPHW.dtype)
    channels = level_BCHW.shape[1]
    log_weights_BKHW, means, log_scales_BCKHW, coefficients = _split(params_BPHW, channels)
    centred = target_BCHW[:, :, None] - _conditional_means(means, coefficients, target_BCHW)
    inverse_scales = torch.exp(-log_scales_BCKHW)
    half_width = 1 / (num_levels - 1)
    upper = inverse_scales * (centred + half_width)
    lower = inverse_scales * (centred - half_width)
    log_below_upper = F.logsigmoid(upper)
    log_above_lower = F.logsigmoid(-lower)
    if likelihood == "normalised":
        is_first, is_last = level_BCHW == 0, level_BCHW == num_levels - 1
        # sigmoid(b) - sigmoid(a) = sigmoid(b) sigmoid(-a) (1 - exp(a - b)), where b - a = 2 h / s.
        log_gap = torch.log(-torch.expm1(-2 * half_width * inverse_scales))
        log_mass = log_below_upper + log_above_lower + log_gap
    else:
        is_first, is_last = target_BCHW < -0.999, target_BCHW > 0.999
        mass = torch.sigmoid(upper) - torch.sigmoid(lower)
        middle = inverse_scales * centred
        log_density = middle - log_scales_BCKHW - 2 * F.softplus(middle)
        log_mass = torch.where(
            mass > 1e-5,
            torch.log(mass.clamp(min=1e-10)),
            log_density - math.log((num_levels - 1) / 2),
        )
    log_mass = torch.where(
        is_first[:, :, None],
        log_below_upper,
        torch.where(is_last[:, :, None], log_above_lower, log_mass),
    )
    log_prob_BHW = torch.logsumexp(log_weights_BKHW + log_mass.sum(dim=1), dim=1)
    return log_prob_BHW.sum(dim=(1, 2))


def dmol_sample(
    params_BPHW: Tensor,
    image_channels: int,
    num_levels: int,
    likelihood: Likelihood = "normalised",
    generator: Generators = None,
) -> Tensor:
    """Draws an image from the mixture, uint8 [B,C,H,W] on the stored values of the levels.

    A component by the Gumbel-max trick, then logistic noise, both from uniform numbers in steps of
    2^-53, whose 0 gives the first level. Each channel is put on its level before it conditions the
    next, so a draw has the probability that `dmol_log_prob` gives, within those steps and the
    rounding of the parameters' type; the published arithmetic passes on the clamped value instead.
    """
    log_weights_BKHW, means, log_scales_BCKHW, coefficients = _split(params_BPHW, image_channels)
    gumbel_BKHW = -torch.log(-torch.log(_uniform(log_weights_BKHW, generator)))
    chosen = (log_weights_BKHW + gumbel_BKHW).argmax(dim=1, keepdim=True)

    def of_chosen(values_BCKHW: Tensor) -> Tensor:
        index = chosen[:, None].expand(-1, image_channels, -1, -1, -1)
        return values_BCKHW.gather(2, index)[:, :, 0]

    mean_BCHW, scale_BCHW = of_chosen(means), of_chosen(log_scales_BCKHW).exp()
    logistic_BCHW = torch.logit(_uniform(mean_BCHW, generator)).to(mean_BCHW.dtype)
    noise_BCHW = scale_BCHW * logistic_BCHW
    coefficients_BCHW = None if coefficients is None else of_chosen(coefficients)

    channels: list[Tensor] = []
    levels: list[Tensor] = []
    for index in range(image_channels):
        value = mean_BCHW[:, index] + noise_BCHW[:, index]
        if coefficients_BCHW is not None and index == 1:
            value = value + coefficients_BCHW[:, 0] * channels[0]
        if coefficients_BCHW is not None and index == 2:
            value = value + coefficients_BCHW[:, 1] * channels[0]
            value = value + coefficients_BCHW[:, 2] * channels[1]
        value = value.clamp(-1, 1)
        level = torch.round((value + 1) * ((num_levels - 1) / 2)).int()
        levels.append(level)
        if likelihood == "normalised":
            value = dmol_target(level, num_levels, likelihood, value.dtype)
        channels.append(value)
    x_BCHW: Tensor = levels_to_uint8(torch.stack(levels, dim=1), num_levels)
    return x_BCHW


def _uniform(like: Tensor, generator: Generators) -> Tensor:
    # In float32 the steps would be 2^-24, and the tails would end there.
    return drawn(torch.rand, like.shape, generator, like.device, torch.float64)

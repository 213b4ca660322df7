"""Diagonal Gaussians and the discretized mixture of logistics (DMOL).

Shapes: B batch, C image channels, H W, K mixtures, P parameters per pixel, Z latent channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vdvae.config import Likelihood
from vdvae.levels import levels_to_uint8
from vdvae.randomness import Generators, uniform

LOG_SCALE_FLOOR = -7.0


def at_least_float32(x: Tensor) -> Tensor:
    """What a KL or a likelihood is computed from: bfloat16 becomes float32, all else stays."""
    return x.float() if x.dtype == torch.bfloat16 else x


def gaussian_kl(mean_q: Tensor, log_sigma_q: Tensor, mean_p: Tensor, log_sigma_p: Tensor) -> Tensor:
    """KL(q || p) of diagonal Gaussians, element by element (Child 2021, eq. 1).

    Args:
        mean_q: of the posterior; all four tensors have one shape.
        log_sigma_q: log of its standard deviation.
        mean_p: of the prior.
        log_sigma_p: log of its standard deviation.

    Returns:
        Nats, of the same shape.
    """
    ratio = torch.exp(log_sigma_q - log_sigma_p)
    distance = (mean_q - mean_p) * torch.exp(-log_sigma_p)
    return log_sigma_p - log_sigma_q - 0.5 + 0.5 * (ratio.square() + distance.square())


def gaussian_sampled_kl(
    noise: Tensor, log_sigma_q: Tensor, z: Tensor, mean_p: Tensor, log_sigma_p: Tensor
) -> Tensor:
    """log q(z) - log p(z) of one draw z = mean_q + sigma_q · noise, element by element.

    Its mean over the noise is `gaussian_kl`; importance weights need it draw by draw.

    Args:
        noise: standard normal; all five tensors have one shape.
        log_sigma_q: log of the posterior's standard deviation.
        z: the draw.
        mean_p: of the prior.
        log_sigma_p: log of its standard deviation.

    Returns:
        Nats, of the same shape.
    """
    standardised = (z - mean_p) * torch.exp(-log_sigma_p)
    return log_sigma_p - log_sigma_q + 0.5 * (standardised.square() - noise.square())


@dataclass(frozen=True, kw_only=True)
class DiscretizedLogisticMixture:
    """The likelihood of a pixel: a mixture of logistics, discretized to L levels (PixelCNN++).

    Each level owns a bin of half-width 1/(L-1) around its value in [-1, 1]; the outer bins are
    open. `normalised` takes the mass of a bin in log space, so the levels' probabilities sum to 1.
    `published` and `published_5bit` repeat the published arithmetic with its fallback to a density
    where the mass is at most 1e-5 (PixelCNN++; Child 2021).

    Parameters per pixel, in the published order: K logits, then for each image channel K means, K
    log scales and, in colour, K coefficients. They are computed with in float32 at least.
    """

    channels: int  # C: 1 (grey) or 3 (colour)
    num_levels: int  # L
    mixtures: int = 10  # K
    arithmetic: Likelihood = "normalised"

    @property
    def num_parameters(self) -> int:
        """P, the number of parameters per pixel: 3K in grey, 10K in colour."""
        return (10 if self.channels == 3 else 3) * self.mixtures

    def log_prob(self, params_BPHW: Tensor, level_BCHW: Tensor) -> Tensor:
        """Log-probability of images.

        Args:
            params_BPHW: the likelihood's parameters, float.
            level_BCHW: levels 0 to L-1, an integer type.

        Returns:
            Nats per image, [B].
        """
        params_BPHW = at_least_float32(params_BPHW)
        target_BCHW = self._target(level_BCHW, params_BPHW.dtype)
        log_weights_BKHW, means, log_scales_BCKHW, coefficients = self._split(params_BPHW)
        centred = target_BCHW[:, :, None] - _conditional_means(means, coefficients, target_BCHW)
        inverse_scales = torch.exp(-log_scales_BCKHW)
        half_width = 1 / (self.num_levels - 1)
        upper = inverse_scales * (centred + half_width)
        lower = inverse_scales * (centred - half_width)
        log_below_upper = F.logsigmoid(upper)
        log_above_lower = F.logsigmoid(-lower)
        if self.arithmetic == "normalised":
            is_first, is_last = level_BCHW == 0, level_BCHW == self.num_levels - 1
            # sigmoid(b) - sigmoid(a) = sigmoid(b) sigmoid(-a) (1 - exp(a - b)), b - a = 2 h / s.
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
                log_density - math.log((self.num_levels - 1) / 2),
            )
        log_mass = torch.where(
            is_first[:, :, None],
            log_below_upper,
            torch.where(is_last[:, :, None], log_above_lower, log_mass),
        )
        log_prob_BHW = torch.logsumexp(log_weights_BKHW + log_mass.sum(dim=1), dim=1)
        return log_prob_BHW.sum(dim=(1, 2))

    def sample(self, params_BPHW: Tensor, generator: Generators = None) -> Tensor:
        """Draws images.

        A component by the Gumbel-max trick, then logistic noise, both from `uniform`, whose 0 gives
        the first level. Each channel is put on its level before it conditions the next, so a draw
        has the probability that `log_prob` gives, within the steps of `uniform` and the rounding of
        the parameters' dtype; the published arithmetic passes on the clamped value instead.

        Args:
            params_BPHW: the likelihood's parameters, float.
            generator: of the draws; see `Generators`.

        Returns:
            uint8 [B,C,H,W], the stored values of the levels.
        """
        params_BPHW = at_least_float32(params_BPHW)
        log_weights_BKHW, means, log_scales_BCKHW, coefficients = self._split(params_BPHW)
        gumbel_BKHW = -torch.log(-torch.log(uniform(generator, log_weights_BKHW)))
        chosen = (log_weights_BKHW + gumbel_BKHW).argmax(dim=1, keepdim=True)

        def of_chosen(values_BCKHW: Tensor) -> Tensor:
            index = chosen[:, None].expand(-1, self.channels, -1, -1, -1)
            return values_BCKHW.gather(2, index)[:, :, 0]

        mean_BCHW, scale_BCHW = of_chosen(means), of_chosen(log_scales_BCKHW).exp()
        logistic_BCHW = torch.logit(uniform(generator, mean_BCHW)).to(mean_BCHW.dtype)
        noise_BCHW = scale_BCHW * logistic_BCHW
        coefficients_BCHW = None if coefficients is None else of_chosen(coefficients)

        values: list[Tensor] = []
        levels: list[Tensor] = []
        for index in range(self.channels):
            value = mean_BCHW[:, index] + noise_BCHW[:, index]
            if coefficients_BCHW is not None and index == 1:
                value = value + coefficients_BCHW[:, 0] * values[0]
            if coefficients_BCHW is not None and index == 2:
                value = value + coefficients_BCHW[:, 1] * values[0]
                value = value + coefficients_BCHW[:, 2] * values[1]
            value = value.clamp(-1, 1)
            level = torch.round((value + 1) * ((self.num_levels - 1) / 2)).int()
            levels.append(level)
            values.append(
                self._target(level, value.dtype) if self.arithmetic == "normalised" else value
            )
        x_BCHW: Tensor = levels_to_uint8(torch.stack(levels, dim=1), self.num_levels)
        return x_BCHW

    def tempered(self, params_BPHW: Tensor, temperature: float) -> Tensor:
        """Parameters of a mixture that is sharper (below 1) or flatter: logits over T, scales by T.

        Args:
            params_BPHW: the likelihood's parameters, float.
            temperature: T, above 0.
        """
        params_BPHW = at_least_float32(params_BPHW).clone()
        params_BPHW[:, : self.mixtures] /= temperature
        kinds = 3 if self.channels == 3 else 2
        batch, _, *size = params_BPHW.shape
        rest = params_BPHW[:, self.mixtures :].view(
            batch, self.channels, kinds, self.mixtures, *size
        )
        rest[:, :, 1] += math.log(temperature)
        return params_BPHW

    def _target(self, level: Tensor, dtype: torch.dtype) -> Tensor:
        """Centre of each level's bin, in [-1, 1].

        The published 5-bit targets are spaced 16/255 apart although their bins are 2/31 wide
        (REFERENCE: this is why its probabilities do not sum to 1).
        """
        if self.arithmetic == "published_5bit":
            return (level.to(dtype) * 8 - 127.5) / 127.5
        return level.to(dtype) * (2 / (self.num_levels - 1)) - 1

    def _split(self, params_BPHW: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Log weights [B,K,H,W]; means, log scales and, in colour, coefficients [B,C,K,H,W]."""
        batch, _, height, width = params_BPHW.shape
        log_weights_BKHW = F.log_softmax(params_BPHW[:, : self.mixtures], dim=1)
        kinds = 3 if self.channels == 3 else 2
        shape = (batch, self.channels, kinds, self.mixtures, height, width)
        rest = params_BPHW[:, self.mixtures :].reshape(shape)
        log_scales_BCKHW = rest[:, :, 1].clamp(min=LOG_SCALE_FLOOR)
        coefficients = torch.tanh(rest[:, :, 2]) if self.channels == 3 else None
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

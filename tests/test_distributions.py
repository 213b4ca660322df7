"""Laws of the likelihood and of the KL, in float64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from laws import total_probability
from torch import Tensor

from vdvae.distributions import DiscretizedLogisticMixture, gaussian_kl
from vdvae.levels import uint8_to_levels


def mixture(
    channels: int, num_levels: int, mixtures: int = 3, arithmetic: Any = "normalised"
) -> DiscretizedLogisticMixture:
    return DiscretizedLogisticMixture(
        channels=channels, num_levels=num_levels, mixtures=mixtures, arithmetic=arithmetic
    )


def one_pixel(channels: int, mean: float, log_scale: float, mixtures: int = 3) -> Tensor:
    """Mixture parameters [1,P,1,1] in float64, spread a little around a mean and a log scale."""
    generator = torch.Generator().manual_seed(7)
    kinds = 3 if channels == 3 else 2
    rest = torch.randn(channels, kinds, mixtures, generator=generator, dtype=torch.float64)
    rest[:, 0] = mean + 0.1 * rest[:, 0]
    rest[:, 1] = log_scale + 0.1 * rest[:, 1]
    logits = torch.randn(mixtures, generator=generator, dtype=torch.float64)
    params = torch.cat([logits, rest.flatten()])[None, :, None, None]
    assert params.shape[1] == mixture(channels, 2, mixtures).num_parameters
    return params


LOG_SCALES, MEANS = tuple(range(-9, 3)), (-1.3, 0.2, 1.3)


def distance_from_one(
    num_levels: int,
    channels: int,
    log_scales: Iterable[int] = LOG_SCALES,
    means: Iterable[float] = MEANS,
) -> float:
    """The largest of |sum over all values of a pixel - 1|, over log scales and means."""
    mixtures = 1 if num_levels**channels > 1e6 else 3
    likelihood = mixture(channels, num_levels, mixtures)
    worst = 0.0
    for log_scale, mean in itertools.product(log_scales, means):
        params = one_pixel(channels, mean, log_scale, mixtures)
        total = total_probability(
            lambda level, params=params: likelihood.log_prob(
                params.expand(len(level), -1, -1, -1), level
            ),
            num_levels,
            channels,
        )
        worst = max(worst, abs(total - 1))
    print(f"L = {num_levels}, {channels} channels: at most {worst:.1e} from 1", flush=True)
    return worst


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("num_levels", [2, 17, 32, 256])
def test_probabilities_of_a_pixel_sum_to_one(num_levels: int, channels: int) -> None:
    if num_levels**channels > 1e6:  # ten seconds a point: python tests/test_distributions.py
        assert distance_from_one(num_levels, channels, [-9], [1.3]) < 1e-9
    else:
        assert distance_from_one(num_levels, channels) < 1e-9


def test_published_5bit_probabilities_do_not_sum_to_one() -> None:
    """REFERENCE: 1.03 for narrow inner components, 1.45 at the smallest scale, 0.73 at 0."""

    likelihood = mixture(1, 32, 1, "published_5bit")

    def total(mean: float, log_scale: float) -> float:
        params = torch.tensor([0.0, mean, log_scale], dtype=torch.float64)[None, :, None, None]
        return total_probability(
            lambda level: likelihood.log_prob(params.expand(len(level), -1, -1, -1), level),
            32,
            1,
        )

    assert total(0.0, -3.5) == pytest.approx(1.03, abs=0.005)
    assert max(total(0.03 + step / 1000, -7.0) for step in range(70)) == pytest.approx(
        1.45, abs=0.05
    )
    assert 0.93 < max(total(mean, -1.0) for mean in (0.0, 0.03)) < 0.97
    assert total(0.03, 0.0) == pytest.approx(0.73, abs=0.01)
    assert total(1.3, -7.0) < 1e-6


def test_published_8bit_falls_back_to_the_density() -> None:
    """Far from a narrow component: log density at the centre, times the bin's width."""
    mean, log_scale = 0.5, -5.0
    params = torch.tensor([0.0, mean, log_scale], dtype=torch.float64)[None, :, None, None]
    level = torch.tensor([30])[:, None, None, None]
    x = (30 - 127.5) / 127.5
    z = (x - mean) / math.exp(log_scale)
    log_density = z - log_scale - 2 * math.log1p(math.exp(z))
    expected = log_density - math.log(127.5)
    found = mixture(1, 256, 1, "published").log_prob(params, level).item()
    assert found == pytest.approx(expected, rel=1e-9)
    # Where the mass is above 1e-5 both arithmetics agree.
    near = torch.tensor([190])[:, None, None, None]
    kinds = ("published", "normalised")
    both = [mixture(1, 256, 1, kind).log_prob(params, near).item() for kind in kinds]
    assert both[0] == pytest.approx(both[1], rel=1e-9)


@pytest.mark.parametrize(("channels", "num_levels"), [(1, 5), (3, 2)])
def test_draws_have_the_probabilities_that_are_scored(channels: int, num_levels: int) -> None:
    params = one_pixel(channels, 0.1, -0.7)
    n = 200_000
    generator = torch.Generator().manual_seed(1)
    likelihood = mixture(channels, num_levels)
    drawn = likelihood.sample(params.expand(n, -1, -1, -1), generator)
    level = uint8_to_levels(drawn, num_levels)[:, :, 0, 0]
    index = (level * num_levels ** torch.arange(channels)).sum(dim=1)
    counts = torch.bincount(index, minlength=num_levels**channels)
    for value, count in enumerate(counts.tolist()):
        digits = [value // num_levels**place % num_levels for place in range(channels)]
        log_prob = likelihood.log_prob(params, torch.tensor(digits)[None, :, None, None])
        p = log_prob.exp().item()
        assert abs(count / n - p) < 5 * math.sqrt(p * (1 - p) / n)


def test_draws_reach_the_tails() -> None:
    """The outer levels have a probability of 4e-6 each; float32 as in a model."""
    log_scale = math.log((1 - 1 / 255) / math.log(1 / 4e-6 - 1))
    params = torch.tensor([0.0, 0.0, log_scale])[None, :, None, None]
    n, generator = 1 << 21, torch.Generator().manual_seed(2)
    likelihood = mixture(1, 256, 1)
    drawn = likelihood.sample(params.expand(n, -1, -1, -1), generator)
    for level in (0, 255):
        index = torch.tensor(level)[None, None, None, None]
        p = likelihood.log_prob(params.double(), index).exp().item()
        assert p == pytest.approx(4e-6, rel=1e-3)
        assert abs((drawn == level).sum().item() / n - p) < 5 * math.sqrt(p / n)
        assert (drawn == level).any()


def test_no_uniform_number_gives_what_is_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    params = torch.tensor([0.0, -9.0, 0.1, -0.1, -2.0, -2.0])[None, :, None, None]
    for u in (0.0, 2.0**-53, 1 - 2.0**-53):
        monkeypatch.setattr(
            torch, "rand", lambda shape, u=u, **how: torch.full(shape, u, dtype=how["dtype"])
        )
        drawn = mixture(1, 256, 2).sample(params)
        assert drawn.item() == (0 if u < 0.5 else 255)


def test_kl_is_zero_for_equals_and_matches_monte_carlo() -> None:
    generator = torch.Generator().manual_seed(3)
    mean_q, mean_p, log_q, log_p = torch.randn(4, 8, generator=generator, dtype=torch.float64)
    assert gaussian_kl(mean_q, log_q, mean_q, log_q).abs().max() < 1e-15
    assert (gaussian_kl(mean_q, log_q, mean_p, log_p) > 0).all()
    noise = torch.randn(400_000, 8, generator=generator, dtype=torch.float64)
    z = mean_q + log_q.exp() * noise
    log_ratio = -log_q - 0.5 * noise**2 + log_p + 0.5 * ((z - mean_p) / log_p.exp()) ** 2
    error = log_ratio.std(dim=0) / math.sqrt(len(noise))
    distance = (log_ratio.mean(dim=0) - gaussian_kl(mean_q, log_q, mean_p, log_p)).abs()
    assert (distance < 5 * error).all()


def test_gradients_stay_finite_at_extremes() -> None:
    for log_scale in (-30.0, -7.0, 5.0, 30.0):
        for level in (0, 8, 16):
            params = torch.tensor([0.0, 3.0, log_scale])[None, :, None, None].requires_grad_()
            log_prob = mixture(1, 17, 1).log_prob(params, torch.tensor([[[[level]]]]))
            log_prob.sum().backward()
            assert params.grad is not None
            assert params.grad.isfinite().all()


if __name__ == "__main__":  # every point of 256 levels and three channels too: minutes
    assert max(distance_from_one(L, C) for C in (1, 3) for L in (2, 17, 32, 256)) < 1e-9

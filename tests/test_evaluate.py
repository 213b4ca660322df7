"""Bounds against closed forms, in float64, and what several draws of the posterior add."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_model import images, make
from torch import Tensor

from vdvae.config import UserError
from vdvae.distributions import gaussian_kl, gaussian_sampled_kl
from vdvae.evaluate import concatenated, evaluate, in_batches, score
from vdvae.latents import exchange, flatten, unflatten
from vdvae.model import Elbo
from vdvae.precision import arithmetic
from vdvae.randomness import evaluation_noise

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


def test_the_kl_is_the_mean_of_the_log_ratio() -> None:
    generator = torch.Generator().manual_seed(0)
    mean_q, log_sigma_q, mean_p, log_sigma_p = torch.randn(
        4, 5, generator=generator, dtype=torch.float64
    )
    noise = torch.randn(400_000, 5, generator=generator, dtype=torch.float64)
    z = mean_q + log_sigma_q.exp() * noise
    ratio = gaussian_sampled_kl(noise, log_sigma_q, z, mean_p, log_sigma_p)
    kl = gaussian_kl(mean_q, log_sigma_q, mean_p, log_sigma_p)
    error = ratio.std(dim=0) / math.sqrt(len(noise))
    assert ((ratio.mean(dim=0) - kl).abs() < 5 * error).all()
    normal_q = torch.distributions.Normal(mean_q, log_sigma_q.exp())
    normal_p = torch.distributions.Normal(mean_p, log_sigma_p.exp())
    torch.testing.assert_close(ratio, normal_q.log_prob(z) - normal_p.log_prob(z))


class LinearGaussian:
    """z ~ N(0, 1), x given z ~ N(weight·z, sigma²): one block whose likelihood is known exactly.

    Its posterior is wrong on purpose, so that the ELBO is no equality.
    """

    weight, sigma = 1.5, 0.7

    def __init__(self) -> None:
        gain = torch.zeros(1, dtype=torch.float64)
        self.config = SimpleNamespace(num_latents=1, dims=1)
        self.parameters = lambda: iter([gain])

    def value(self, x_BCHW: Tensor) -> Tensor:
        return x_BCHW[:, :, 0, 0].double() / 64 - 2  # the other pixel makes images differ

    def neg_log_likelihood_nats_B(self, x_BCHW: Tensor) -> Tensor:
        variance = self.weight**2 + self.sigma**2
        squared = self.value(x_BCHW).square() / variance
        return (0.5 * (squared + math.log(variance)) + HALF_LOG_2PI)[:, 0]

    def __call__(self, x_BCHW: Tensor, noise_BN: Tensor, sampled_kl: bool = False) -> Elbo:
        x = self.value(x_BCHW)
        mean_q, log_sigma_q = 0.4 * x, torch.full_like(x, math.log(0.6))
        zero = torch.zeros_like(x)
        z = mean_q + log_sigma_q.exp() * noise_BN
        if sampled_kl:
            kl = gaussian_sampled_kl(noise_BN, log_sigma_q, z, zero, zero)
        else:
            kl = gaussian_kl(mean_q, log_sigma_q, zero, zero)
        error = (x - self.weight * z) / self.sigma
        distortion = 0.5 * error.square() + math.log(self.sigma) + HALF_LOG_2PI
        return Elbo(distortion_nats_B=distortion.sum(dim=1), kl_nats_LB=kl.T)


def test_the_importance_weighted_bound_converges_to_the_exact_likelihood() -> None:
    model = LinearGaussian()
    generator = torch.Generator().manual_seed(1)
    shape = (400, 1, 1, 2)
    x_BCHW = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    exact = model.neg_log_likelihood_nats_B(x_BCHW).numpy()
    bounds = {k: score(model, x_BCHW, 0, iwae=k).iwae_nats_B for k in (1, 4, 16, 128)}  # type: ignore[arg-type]
    gaps = []
    for bound in bounds.values():
        assert bound is not None
        gaps.append(bound - exact)
    means = [gap.mean() for gap in gaps]
    errors = [gap.std() / math.sqrt(len(gap)) for gap in gaps]
    assert means == sorted(means, reverse=True)  # more draws, a tighter bound
    assert means[0] > 5 * errors[0]
    assert abs(means[-1]) < 4 * errors[-1]
    assert means[-1] < 0.03 * means[0]
    # With one draw it is the ELBO: the same mean, another noise.
    elbo = score(model, x_BCHW, 0, passes=32)  # type: ignore[arg-type]
    gap = elbo.rate_nats_B + elbo.distortion_nats_B - exact
    assert abs(gap.mean() - means[0]) < 4 * (errors[0] + gap.std() / math.sqrt(len(gap)))


def test_with_identity_posteriors_the_bound_is_an_autoregressive_likelihood() -> None:
    """Proposition 1: N layers, z_i = x_i, p(z_i given z_<i) an autoregressive model of x.

    The identity is the limit of posteriors N(x_i, s²) read back by p(x given z) = N(z, s²).
    """
    dims = 6
    generator = torch.Generator().manual_seed(2)
    weights = torch.randn(2, dims, dims, generator=generator, dtype=torch.float64).tril(-1)
    x_BN = torch.randn(50, dims, generator=generator, dtype=torch.float64)

    def conditional(before_BN: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_sigma = torch.tanh(before_BN @ weights[0].T), 0.3 * (before_BN @ weights[1].T)
        return mean, log_sigma

    mean, log_sigma = conditional(x_BN)
    exact_nats_B = (
        0.5 * ((x_BN - mean) * torch.exp(-log_sigma)).square() + log_sigma + HALF_LOG_2PI
    ).sum(dim=1)

    noise_BN = torch.randn(len(x_BN), dims, generator=generator, dtype=torch.float64)

    def neg_elbo_nats_B(sigma: float) -> Tensor:
        z_BN = x_BN + sigma * noise_BN
        log_sigma_q = torch.full_like(x_BN, math.log(sigma))
        rate = gaussian_kl(x_BN, log_sigma_q, *conditional(z_BN)).sum(dim=1)
        # -log N(x; z, s²), with the mean over the noise of its square, 1/2 a dimension.
        return rate + dims * (0.5 + math.log(sigma) + HALF_LOG_2PI)

    distances = [
        float((neg_elbo_nats_B(sigma) - exact_nats_B).abs().max()) for sigma in (1e-2, 1e-4, 1e-6)
    ]
    # The distance goes to nothing as fast as s does.
    assert distances[1] < 0.02 * distances[0]
    assert distances[2] < 0.02 * distances[1]
    assert distances[2] < 1e-3


def test_passes_average_the_bound_and_say_their_own_error() -> None:
    model = make()
    x_BCHW = images(model, 12)
    singles = []
    for draw in range(8):
        with torch.no_grad():
            noise_BN = evaluation_noise(x_BCHW, model.config.num_latents, 3, draw)
            elbo = model(x_BCHW, noise_BN.to(model.decoder.gain))
        singles.append(elbo.neg_elbo_nats_B.numpy())
    scores = score(model, x_BCHW, 3, passes=8)
    np.testing.assert_allclose(
        scores.rate_nats_B + scores.distortion_nats_B, np.mean(singles, axis=0), rtol=1e-12
    )
    summary = scores.summary()
    bit = scores.dims * math.log(2)
    wanted = np.sqrt(np.var(singles, axis=0, ddof=1).sum() / 8) / 12 / bit
    assert summary["bits_per_dim_se_draws"] == pytest.approx(wanted, rel=1e-12)
    np.testing.assert_allclose(
        scores.rate_bits_per_dim_L().sum(), summary["rate_bits_per_dim"], rtol=1e-12
    )
    first = score(model, x_BCHW, 3)
    assert first.variance_nats2_B is None
    np.testing.assert_allclose(  # the layers' sum is taken in another order
        first.rate_nats_B + first.distortion_nats_B, singles[0], rtol=1e-14
    )
    # The spread over repeated figures is the error that was said.
    repeats = [score(model, x_BCHW, seed).summary()["bits_per_dim"] for seed in range(40)]
    said = score(model, x_BCHW, 0, passes=40).summary()["bits_per_dim_se_draws"] * math.sqrt(40)
    assert 0.7 < np.std(repeats, ddof=1) / said < 1.4


def test_bounds_do_not_depend_on_batches_nor_on_who_scored_them() -> None:
    model = make()
    x_BCHW = images(model, 9)
    keys = list("abcdefghi")
    runs = [
        evaluate(model, in_batches(keys, x_BCHW, size), 1, 9, passes=2, iwae=3) for size in (2, 9)
    ]
    halves = [
        score(model, x_BCHW[rank::2], 1, keys[rank::2], passes=2, iwae=3) for rank in range(2)
    ]
    both = concatenated(halves)
    assert sorted(both.keys) == keys
    order = np.argsort(both.keys)
    for name in ("rate_nats_B", "distortion_nats_B", "iwae_nats_B", "variance_nats2_B"):
        wanted = getattr(runs[0], name)
        np.testing.assert_allclose(getattr(runs[1], name), wanted, rtol=1e-9)
        np.testing.assert_allclose(getattr(both, name)[order], wanted, rtol=1e-9)
    assert runs[0].summary().keys() == both.summary().keys()


@pytest.mark.parametrize(("passes", "iwae"), [(0, 0), (1, -1)])
def test_numbers_of_draws_that_are_none_are_refused(passes: int, iwae: int) -> None:
    model = make()
    with pytest.raises(UserError, match="must be at least 1 and 0"):
        score(model, images(model, 1), 0, passes=passes, iwae=iwae)


def test_bfloat16_moves_the_bound_a_little_and_leaves_no_trace() -> None:
    model = make().float()
    x_BCHW = images(model, 16)
    exact = score(model, x_BCHW, 0)
    with arithmetic("bf16", torch.device("cpu")):
        rough = score(model, x_BCHW, 0)
    shift = rough.bits_per_dim_B - exact.bits_per_dim_B
    assert 0 < np.abs(shift).max() < 0.05
    with arithmetic("fp32", torch.device("cpu")):
        again = score(model, x_BCHW, 0)
    np.testing.assert_array_equal(again.bits_per_dim_B, exact.bits_per_dim_B)
    for precision, words in (("fp8", "'fp8' is not one of"), ("tf32", "needs a CUDA device")):
        with pytest.raises(UserError, match=words), arithmetic(precision, torch.device("cpu")):
            pass


def test_latents_go_flat_and_back_and_are_exchanged_by_resolution() -> None:
    model = make()
    x_BCHW = images(model, 2)
    latents = model.encode(x_BCHW, mean=True)
    for first in (None, 1, 3):
        flat_BM = flatten(latents, first)
        back = unflatten(model.config, flat_BM)
        assert len(back) == (first or len(latents))
        for one, other in zip(back, latents, strict=False):
            assert torch.equal(one, other)
    with pytest.raises(UserError, match="end in the middle of block 1"):
        unflatten(model.config, flatten(latents)[:, :10])
    with pytest.raises(UserError, match="the whole model has"):
        unflatten(model.config, torch.cat([flatten(latents)] * 2, dim=1))
    with pytest.raises(UserError, match="first: 9 blocks"):
        flatten(latents, 9)

    others = [z.flip(0) for z in latents]
    mixed = exchange(model, latents, others, 4)
    for entry, own, other, found in zip(model.decoder.layout, latents, others, mixed, strict=True):
        assert found is (other if entry.resolution == 4 else own)
    all_of_them = latents
    for resolution in model.decoder.resolutions:
        all_of_them = exchange(model, all_of_them, others, resolution)
    generators = [torch.Generator().manual_seed(5) for _ in range(2)]
    one = model.decode(all_of_them, generator=generators[0])
    assert torch.equal(one, model.decode(others, generator=generators[1]))
    with pytest.raises(UserError, match="resolution: 2 has no stochastic layers; there are 1, 4"):
        exchange(model, latents, others, 2)

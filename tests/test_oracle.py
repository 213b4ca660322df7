"""vdvae in float32 against the oracle in float64, and the oracle against the authors' figures."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from torch import Tensor

from vdvae.config import Likelihood
from vdvae.distributions import DiscretizedLogisticMixture
from vdvae.model import VDVAE
from vdvae.published import from_published

GOLDEN = Path(__file__).parent / "golden"
WHOLE: dict[str, Any] = json.loads(oracle.WHOLE.read_text())
IN_SECONDS = ("cifar10",)  # for all five, in minutes: python tests/test_oracle.py

SMALL = {
    "width": 16,
    "zdim": 4,
    "image_size": 16,
    "enc_blocks": "16x2,16d2,8x2,8d2,4x1,4d2,2x1,2d2,1x2",
    "dec_blocks": "1x2,2m1,2x1,4m2,4x1,8m4,8x2,16m8,16x2",
    "custom_width_str": "",
    "bottleneck_multiple": 0.25,
    "no_bias_above": 64,
    "num_mixtures": 3,
    "dataset": "cifar10",
}
GROWING = "8:20,4:24,2:28,1:28"
CASES = {
    "published 8 bits": {},
    "published 5 bits": {"dataset": "ffhq_256"},
    "pixels of 0..1": {"dataset": "ffhq_1024"},
    "custom widths": {"custom_width_str": GROWING},
    "custom widths, a jump": {"custom_width_str": "4:64,2:64,1:64", "bottleneck_multiple": 0.3},
    "bias maps up to 4": {"no_bias_above": 4},
    "no bias maps": {"no_bias_above": 0, "custom_width_str": GROWING},
    "several unpool paths": {
        "dec_blocks": "1x1,2m1,4m1,4m2,8m1,8m4,8x1,16m2,16m8,16x1,16m4",
        "custom_width_str": GROWING,
    },
    "steps of 16": {"enc_blocks": "16x1,16d16,1x1", "dec_blocks": "1x1,16m1,16x1"},
}


def scaling(config: dict[str, Any]) -> tuple[float, float]:
    return (-0.45, 3.6) if config["dataset"] == "ffhq_1024" else (-118.0, 1 / 66)


def ours(config: dict[str, Any], weights: oracle.Arrays, shift: float, scale: float) -> VDVAE:
    tensors = {name: torch.from_numpy(array) for name, array in weights.items()}
    return from_published(config, tensors, shift=shift, scale=scale)


def bchw(images_BHWC: np.ndarray) -> Tensor:
    return torch.from_numpy(images_BHWC).permute(0, 3, 1, 2).contiguous()


def flat(noise: list[np.ndarray]) -> Tensor:
    return torch.cat([torch.from_numpy(eps).flatten(1) for eps in noise], 1)


def close(found: Tensor, wanted: Tensor | list[float], relative: float = 5e-5) -> None:
    wanted = torch.as_tensor(wanted, dtype=torch.float64)
    torch.testing.assert_close(found.double(), wanted, rtol=relative, atol=0.0)


def same_map(found_BPHW: Tensor, wanted_BPHW: Tensor) -> None:
    torch.testing.assert_close(found_BPHW.double(), wanted_BPHW, rtol=0.0, atol=2e-5)


@pytest.mark.parametrize("name", ["small8bit_zcut", "small8bit_zmean"])
def test_the_oracle_gives_the_authors_figures(name: str) -> None:
    golden = np.load(GOLDEN / f"{name}.npz")
    weights = dict(np.load(GOLDEN / f"{name}_weights.npz"))
    config = json.loads(str(golden["config"]))
    assert oracle.shapes(config) == {key: array.shape for key, array in weights.items()}
    figures = oracle.forward(
        config, weights, golden["images"], float(golden["shift"]), float(golden["scale"])
    )
    dims = golden["images"][0].size
    close(torch.from_numpy(golden["kl_per_block"]), figures.kl_BL, 2e-6)
    close(torch.from_numpy(golden["distortion"]), figures.distortion_B / dims, 2e-6)
    params = torch.from_numpy(golden["likelihood_params"]).double()
    torch.testing.assert_close(params, figures.params_BHWP, rtol=0.0, atol=2e-6)


@torch.no_grad()
def measured(case: dict[str, Any]) -> tuple[int, Tensor, Tensor]:
    """Parameters, KLs [L] and distortion in nats of a whole recipe's made image, in vdvae."""
    config, weights = case["config"], oracle.made_weights(case["config"])
    model = ours(config, weights, case["shift"], case["scale"])
    del weights
    elbo = model(bchw(oracle.image_of(config)), flat(oracle.made_noise(config, 1)))
    count = sum(parameter.numel() for parameter in model.parameters())
    return count, elbo.kl_nats_LB[:, 0], elbo.distortion_nats_B[0]


@pytest.mark.parametrize("recipe", IN_SECONDS)
def test_a_whole_recipe_gives_the_kept_figures(recipe: str) -> None:
    case = WHOLE[recipe]
    count, kl_nats_L, distortion_nats = measured(case)
    assert count == case["parameters"]
    close(kl_nats_L, case["kl_per_block"])
    close(distortion_nats, case["distortion"])


def edges(config: dict[str, Any], batch: int = 2) -> np.ndarray:
    """Made images with noise in one part and both outer levels in others."""
    size = config["image_size"]
    made = np.random.default_rng(5).integers(0, 256, (batch, size, size, 3), dtype=np.uint8)
    made[:, : size // 4], made[:, -size // 4 :] = 0, 255
    return made


def small_weights(config: dict[str, Any]) -> dict[str, np.ndarray]:
    """KLs of order one, and log scales that meet the floor, the outer bins and the fallback."""
    weights = oracle.made_weights(config, seed=1)
    for name in weights:
        if name.endswith(".enc.c4.bias"):
            weights[name][: config["zdim"]] += 0.7  # posteriors' means away from the priors'
    mixtures = config["num_mixtures"]
    for log_scales in range(2 * mixtures, 10 * mixtures, 3 * mixtures):
        weights["decoder.out_net.out_conv.bias"][log_scales : log_scales + mixtures] = np.linspace(
            -9, -1, mixtures
        )
    return weights


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_every_option_gives_the_oracles_figures(name: str) -> None:
    config = SMALL | CASES[name]
    shift, scale = scaling(config)
    weights, images = small_weights(config), edges(config)
    noise = oracle.made_noise(config, len(images), seed=1)
    wanted = oracle.forward(config, weights, images, shift, scale, seed=1)
    model = ours(config, weights, shift, scale)
    elbo = model(bchw(images), flat(noise))
    close(elbo.kl_nats_LB.T, wanted.kl_BL)
    close(elbo.distortion_nats_B, wanted.distortion_B)
    latents = model.encode(bchw(images), noise_BN=flat(noise))
    params_BPHW = model.likelihood_parameters(len(images), latents)
    same_map(params_BPHW, wanted.params_BHWP.permute(0, 3, 1, 2))


@pytest.mark.parametrize(
    ("dataset", "levels", "likelihood"),
    [("cifar10", 256, "published"), ("ffhq_256", 32, "published_5bit")],
)
def test_each_narrow_pixel_has_the_oracles_probability(
    dataset: str, levels: int, likelihood: Likelihood
) -> None:
    """One component a pixel, at and around the 1e-5 where the bin's mass gives way to a density."""
    random = np.random.default_rng(2)
    images = random.integers(0, 256, (4000, 1, 1, 3), dtype=np.uint8)
    params = random.uniform(-1, 1, (len(images), 10, 1, 1))
    params[:, 1::3, 0, 0] = images[:, 0, 0] / 127.5 - 1 + random.uniform(-0.1, 0.1, (4000, 3))
    params[:, 2::3] = random.uniform(-9, -3, (len(images), 3, 1, 1))
    params[:, 3::3] *= 0.05  # coefficients
    params_BPHW, level_BCHW = torch.from_numpy(params), bchw(images).int() * levels // 256
    wanted = oracle.distortion_nats({"dataset": dataset, "num_mixtures": 1}, params_BPHW, images)
    mixture = DiscretizedLogisticMixture(
        channels=3, num_levels=levels, mixtures=1, arithmetic=likelihood
    )
    close(-mixture.log_prob(params_BPHW, level_BCHW), wanted, 1e-8)


@pytest.mark.parametrize("name", ["custom widths", "several unpool paths"])
@pytest.mark.parametrize(
    ("given", "temperature"), [(0, 1.0), (0, 0.6), (0, 0.0), (4, 0.1), (7, 0.0)]
)
@torch.no_grad()
def test_samples_and_partial_latents_have_the_oracles_parameters(
    name: str, given: int, temperature: float
) -> None:
    config = SMALL | CASES[name]
    weights, images = small_weights(config), edges(config)
    shift, scale = scaling(config)
    model = ours(config, weights, shift, scale)
    noise = oracle.made_noise(config, len(images), seed=1)
    x_BCHW = (bchw(images).double() + shift) * scale
    posterior = oracle.top_down(config, weights, noise, oracle.activations(config, weights, x_BCHW))
    # The prior's noise, as `likelihood_parameters` draws it for the blocks not given.
    draws = torch.Generator().manual_seed(3)
    for index in range(given, len(noise)):
        noise[index] = torch.randn(noise[index].shape, generator=draws).numpy()
    latents = posterior.latents[:given]
    wanted = oracle.top_down(config, weights, noise, None, latents, temperature)
    found_BPHW = model.likelihood_parameters(
        len(images), [z.float() for z in latents], temperature, torch.Generator().manual_seed(3)
    )
    same_map(found_BPHW, wanted.params_BPHW)


def main(names: list[str]) -> None:
    """Prints how far the named whole recipes (all without names) are from the kept figures."""
    for name in names or WHOLE:
        case = WHOLE[name]
        count, kl_nats_L, distortion_nats = measured(case)
        found = torch.cat([kl_nats_L, distortion_nats[None]]).double()
        wanted = torch.tensor([*case["kl_per_block"], case["distortion"]], dtype=torch.float64)
        print(
            f"{name}: parameters {count}, kept {case['parameters']}; "
            f"largest relative difference {(found / wanted - 1).abs().max():.1e}",
            flush=True,
        )


if __name__ == "__main__":
    main(sys.argv[1:])

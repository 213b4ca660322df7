"""The model: golden values of the published code, exact sizes, and laws of its paths."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from vdvae.config import DecoderBlock, ModelConfig, UserError
from vdvae.model import VDVAE, bits_per_dim
from vdvae.published import from_published, to_published
from vdvae.summary import summarise

GOLDEN = Path(__file__).parent / "golden"
GREY: dict[str, Any] = {
    "image_size": 8,
    "image_channels": 1,
    "num_levels": 17,
    "encoder": "8x1,8d2,4d4,1x1",
    "decoder": "1x1,4m1,4x1,8m4,8x1",
    "width": 16,
    "latent_channels": 4,
    "mixtures": 3,
}


def make(seed: int = 0, **changes: Any) -> VDVAE:
    """A small model in float64 whose priors do not start at N(0, 1)."""
    torch.manual_seed(seed)
    model = VDVAE(ModelConfig(**{**GREY, **changes})).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def images(model: VDVAE, count: int, seed: int = 1) -> torch.Tensor:
    config = model.config
    shape = (count, config.image_channels, config.image_size, config.image_size)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def golden(case: str) -> tuple[VDVAE, dict[str, np.ndarray], dict[str, np.ndarray]]:
    figures = dict(np.load(GOLDEN / f"small8bit_{case}.npz"))
    weights = dict(np.load(GOLDEN / f"small8bit_{case}_weights.npz"))
    config = json.loads(str(figures["config"]))
    shift, scale = float(figures["shift"]), float(figures["scale"])
    return from_published(config, weights, shift=shift, scale=scale), figures, weights


@pytest.mark.parametrize("case", ["zcut", "zmean"])
def test_figures_of_the_published_code(case: str) -> None:
    """Float32: relative 5e-5 on the terms of the bound, absolute 2e-5 on the parameters."""
    model, figures, _ = golden(case)
    x_BCHW = torch.from_numpy(figures["images"]).permute(0, 3, 1, 2)
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        elbo = model(x_BCHW, noise)
    dims = model.config.dims
    np.testing.assert_allclose(elbo.kl_nats_LB.T.numpy(), figures["kl_per_block"], rtol=5e-5)
    np.testing.assert_allclose(
        elbo.distortion_nats_B.numpy() / dims, figures["distortion"], rtol=5e-5
    )
    assert elbo.rate_nats_B.mean().item() / dims == pytest.approx(float(figures["rate"]), rel=5e-5)
    found = elbo.neg_elbo_nats_B.mean().item() / dims
    assert found == pytest.approx(float(figures["elbo"]), rel=5e-5)

    latents = model.encode(x_BCHW, noise_BN=torch.Generator().manual_seed(0))
    params_BPHW = model.likelihood_parameters(len(x_BCHW), latents)
    expected = torch.from_numpy(figures["likelihood_params"]).permute(0, 3, 1, 2)
    assert (params_BPHW - expected).abs().max() < 2e-5


def test_published_names_go_back_bit_for_bit() -> None:
    model, _, weights = golden("zmean")
    back = to_published(model)
    assert back.keys() == weights.keys()
    assert all((back[name].numpy() == weights[name]).all() for name in weights)


def test_weights_that_do_not_fit_are_all_listed() -> None:
    _, figures, weights = golden("zmean")
    config = json.loads(str(figures["config"]))
    broken = {f"module.{name}": value for name, value in weights.items()}
    del broken["module.decoder.gain"]
    broken["module.decoder.surplus"] = np.zeros(1)
    broken["module.decoder.bias"] = np.zeros((1, 23, 1, 1))
    with pytest.raises(UserError) as caught:
        from_published(config, broken, shift=0, scale=1)
    for words in (
        "decoder.gain is missing",
        "decoder.surplus is not in the model",
        "decoder.bias has shape (1, 23, 1, 1), the model (1, 24, 1, 1)",
    ):
        assert words in str(caught.value)
    with pytest.raises(UserError, match="dataset 'mnist' is not one of"):
        from_published({**config, "dataset": "mnist"}, weights, shift=0, scale=1)


@pytest.mark.parametrize(
    ("recipe", "parameters", "encoder_entries", "blocks", "forward", "sampling"),
    [
        ("cifar10", 39_145_700, 33, 43, 44.8, 25.3),
        ("imagenet32", 119_280_868, 48, 78, 140.7, 82.8),
        ("imagenet64", 125_005_860, 65, 75, 298.3, 157.2),
        ("ffhq256", 114_874_852, 68, 66, 1144, 490),
        ("ffhq1024", 109_366_904, 70, 70, 754, 386),
    ],
)
def test_published_recipes_have_the_published_sizes(
    recipe: str, parameters: int, encoder_entries: int, blocks: int, forward: float, sampling: float
) -> None:
    from pipeline.params import load_recipe

    found = summarise(load_recipe(recipe, Path(__file__).parents[1] / "params.yaml").model)
    assert found.parameters == parameters
    assert (found.encoder_blocks, found.decoder_blocks) == (encoder_entries, blocks)
    last_digit = 0.5 if forward > 700 else 0.05
    assert found.forward_flop / 1e9 == pytest.approx(forward, abs=last_digit)
    assert found.sampling_flop / 1e9 == pytest.approx(sampling, abs=last_digit)
    assert sum(row.latents for row in found.rows) == found.latents
    if recipe == "ffhq256":  # Fig. 4
        shares = [100 * row.latent_share for row in found.rows]
        wanted = [0.0007, 0.024, 0.138, 1.05, 9.12, 29.6, 76.5, 100]
        assert shares == pytest.approx(wanted, rel=2.5e-2)


def test_a_summary_is_of_the_model_that_is_made() -> None:
    """Parameters by resolution, and what the backward pass really keeps."""
    model = VDVAE(ModelConfig(**GREY))
    found = summarise(model.config)
    head = [model.encoder.input, model.decoder.output]
    rest = sum(p.numel() for module in head for p in module.parameters())
    rest += model.decoder.gain.numel() + model.decoder.bias.numel()
    assert sum(row.parameters for row in found.rows) + rest == found.parameters
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        elbo = model(images(model, 1))
    assert elbo.neg_elbo_nats_B.requires_grad
    assert sum(kept.values()) == pytest.approx(found.activation_bytes, rel=0.05)


def test_every_prior_starts_as_a_standard_normal() -> None:
    torch.manual_seed(0)
    model = VDVAE(ModelConfig(**GREY))
    x = torch.randn(2, 16, 1, 1)
    mean, log_sigma, after = next(iter(model.decoder.blocks))._prior(x, x)
    assert mean.abs().max() == 0
    assert log_sigma.abs().max() == 0
    assert (after == x).all()


def test_bound_is_the_sum_of_its_terms_and_does_not_depend_on_the_batch() -> None:
    model = make()
    x_BCHW = images(model, 5)
    noise = torch.randn(5, model.config.num_latents, dtype=torch.float64)
    elbo = model(x_BCHW, noise)
    assert elbo.kl_nats_LB.shape == (5, 5)
    torch.testing.assert_close(
        elbo.neg_elbo_nats_B, elbo.kl_nats_LB.sum(dim=0) + elbo.distortion_nats_B
    )
    alone = torch.cat(
        [model(x_BCHW[i : i + 1], noise[i : i + 1]).neg_elbo_nats_B for i in range(5)]
    )
    torch.testing.assert_close(elbo.neg_elbo_nats_B, alone)
    assert bits_per_dim(64 * np.log(2), 64) == pytest.approx(1)


def test_decoding_all_latents_gives_the_parameters_that_forward_scored() -> None:
    model = make()
    x_BCHW = images(model, 3)
    noise = torch.randn(3, model.config.num_latents, dtype=torch.float64)
    latents = model.encode(x_BCHW, noise_BN=noise)
    params = model.likelihood_parameters(3, latents)
    from vdvae.levels import uint8_to_levels

    distortion = -model.decoder.likelihood.log_prob(params, uint8_to_levels(x_BCHW, 17))
    torch.testing.assert_close(distortion, model(x_BCHW, noise).distortion_nats_B)
    first = model.decode(latents, generator=torch.Generator().manual_seed(4))
    assert (first == model.decode(latents, generator=torch.Generator().manual_seed(4))).all()


def test_temperature_scales_the_prior_and_zero_is_its_mean() -> None:
    model = make()
    cold = model.likelihood_parameters(2, temperature=0.0)
    assert (cold[0] == cold[1]).all()
    spread = [
        model.likelihood_parameters(64, (), t, torch.Generator().manual_seed(0)).std(dim=0).mean()
        for t in (0.1, 0.5, 1.0)
    ]
    assert spread[0] < spread[1] < spread[2]
    by_layer = model.likelihood_parameters(2, (), [0.0] * 5)
    assert (by_layer == cold).all()
    with pytest.raises(UserError, match="one number from 0 on, or 5 of them"):
        model.sample(1, temperature=[1.0, 0.5])
    with pytest.raises(UserError, match="ask for at least 1"):
        model.sample(0)


def test_samples_lie_on_the_levels() -> None:
    from vdvae.levels import levels_to_uint8

    x_BCHW = make().sample(16, generator=torch.Generator().manual_seed(0))
    assert x_BCHW.dtype == torch.uint8
    assert x_BCHW.shape == (16, 1, 8, 8)
    assert set(x_BCHW.flatten().tolist()) <= set(levels_to_uint8(torch.arange(17), 17).tolist())


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(2, 1, 8, 8),
        torch.zeros(2, 3, 8, 8, dtype=torch.uint8),
        torch.zeros(1, 8, 8, dtype=torch.uint8),
    ],
)
def test_images_of_another_kind_are_refused(x: torch.Tensor) -> None:
    with pytest.raises(UserError, match=r"this model reads uint8 of shape \(batch, 1, 8, 8\)"):
        make()(x)


def test_group_of_one_is_the_plain_model_and_larger_ones_read_one_input() -> None:
    model = make(group_size=1)
    x_BCHW = images(model, 2)
    noise = torch.randn(2, model.config.num_latents, dtype=torch.float64)
    grouped = make(group_size=5)  # one group over all resolutions: stochastic depth 1
    seen: dict[int, torch.Tensor] = {}
    for index, block in enumerate(grouped.decoder.blocks):
        block.register_forward_hook(lambda _, given, __, i=index: seen.__setitem__(i, given[0]))
    grouped(x_BCHW, noise)
    # Each block reads the bias maps and unpooled bias maps alone, so all images look alike to it.
    assert all((read[0] == read[1]).all() for read in seen.values())
    layout = [DecoderBlock(1, None), DecoderBlock(4, 1), DecoderBlock(4, None)]
    assert list(grouped.decoder.layout[:3]) == layout
    assert (seen[1] == seen[2]).all()
    # What the blocks of a group add is summed.
    pair = make(group_size=2, encoder="8x1,8d8", decoder="1x1,8m1,8x1")
    plain = make(group_size=1, encoder="8x1,8d8", decoder="1x1,8m1,8x1")
    plain.load_state_dict(pair.state_dict())
    latents = pair.encode(x_BCHW, mean=True)
    assert not torch.allclose(
        pair.likelihood_parameters(2, latents), plain.likelihood_parameters(2, latents)
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"residual_scaling": False},
        {"topdown_residual": False},
        {"unpool": "transposed"},
        {"group_size": 2},
        {"no_bias_above": 1},
        {"widths": "4:24,1:32"},
        {"image_channels": 3, "num_levels": 32},
    ],
)
def test_switches_train_and_sample(changes: dict[str, Any]) -> None:
    model = make(**changes)
    elbo = model(images(model, 2), torch.Generator().manual_seed(0))
    elbo.neg_elbo_nats_B.mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model.sample(2).shape == images(model, 2).shape


def test_matrix_products_and_convolutions_agree() -> None:
    """The fast path of 1x1 convolutions against its plain twin: figures and gradients."""
    plain, fast = make(), make()
    fast.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x_BCHW = images(plain, 3)
    noise = torch.randn(3, plain.config.num_latents, dtype=torch.float64)
    bounds = []
    for model in (plain, fast):
        elbo = model(x_BCHW, noise)
        elbo.neg_elbo_nats_B.sum().backward()
        bounds.append(elbo.neg_elbo_nats_B)
    torch.testing.assert_close(bounds[0], bounds[1], rtol=1e-12, atol=0)
    for one, other in zip(plain.parameters(), fast.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-9, atol=1e-12)


def test_residual_scaling_is_one_over_the_root_of_the_entries() -> None:
    def weights(scaled: bool) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        return dict(VDVAE(ModelConfig(**GREY, residual_scaling=scaled)).named_parameters())

    on, off = weights(True), weights(False)
    for name in on:
        entries = {"encoder": 4, "decoder": 5}[name.partition(".")[0]]
        last = name.startswith("encoder.blocks") and name.endswith("conv4.weight")
        last |= name.endswith(("project.weight", "residual.conv4.weight"))
        torch.testing.assert_close(on[name], off[name] * (entries**-0.5 if last else 1))


def test_params_file_of_the_project_is_whole() -> None:
    from pipeline.params import load_recipe

    path = Path(__file__).parents[1] / "params.yaml"
    for name in yaml.safe_load(path.read_text())["recipes"]:
        load_recipe(name, path)

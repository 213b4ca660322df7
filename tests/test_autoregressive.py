"""The autoregressive model: exact probabilities, a causal network, samples as scored."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

import vdvae
from vdvae.autoregressive import PixelCNN
from vdvae.config import PixelCNNConfig, TrainConfig, UserError, model_config_of
from vdvae.evaluate import score
from vdvae.levels import levels_to_uint8, uint8_to_levels
from vdvae.model import Elbo, network_input
from vdvae.models import build, with_latents
from vdvae.randomness import generator_of
from vdvae.sampling import draw, interpolate, reconstruction_ladder
from vdvae.summary import summarise
from vdvae.training import train


def made(**changes: object) -> PixelCNN:
    """A small model in float64 whose every weight matters."""
    values = {
        "kind": "pixelcnn", "image_size": 2, "image_channels": 1, "num_levels": 3, "width": 4,
        "layers": 2, "mixtures": 2, **changes,
    }  # fmt: skip
    torch.manual_seed(0)
    model = build(model_config_of(values))
    assert isinstance(model, PixelCNN)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.double()


def all_images(channels: int, size: int = 2, num_levels: int = 3) -> Tensor:
    values = itertools.product(range(num_levels), repeat=channels * size**2)
    levels = torch.tensor(np.array(list(values), dtype=np.int32))
    return levels_to_uint8(levels, num_levels).reshape(-1, channels, size, size)


def log_probs(model: PixelCNN, x_BCHW: Tensor) -> Tensor:
    with torch.no_grad():
        return -torch.cat([model(part).distortion_nats_B for part in x_BCHW.split(2**16)])


@pytest.mark.parametrize("channels", [1, 3])
def test_the_probabilities_of_all_images_sum_to_one(channels: int) -> None:
    x_BCHW = all_images(channels)
    assert len(x_BCHW) == 3 ** (4 * channels)
    total = log_probs(made(image_channels=channels), x_BCHW).exp().sum()
    assert total.item() == pytest.approx(1, abs=1e-10)


@pytest.mark.parametrize("layers", [1, 5])
def test_a_pixel_sees_those_before_it_and_no_other(layers: int) -> None:
    size = 6
    model = made(image_size=size, image_channels=3, layers=layers)
    x_BCHW = torch.randn(1, 3, size, size, dtype=torch.double, requires_grad=True)
    params_PN = model.parameters_of_pixels(x_BCHW)[0].flatten(1)
    seen = np.zeros((size**2, size**2), bool)
    for pixel in range(size**2):
        [gradient] = torch.autograd.grad(params_PN[:, pixel].sin().sum(), x_BCHW, retain_graph=True)
        seen[pixel] = gradient[0].abs().sum(dim=0).flatten().numpy() > 0
    before = np.tri(size**2, k=-1, dtype=bool)
    assert not (seen & ~before).any()
    assert (seen == before).all() == (
        layers == 5
    )  # deep enough, it sees all of them: no blind spot


@pytest.mark.parametrize("channels", [1, 3])
def test_as_a_vae_of_identity_posteriors_its_bound_is_its_likelihood(channels: int) -> None:
    """Proposition 1 with this model's own order: layer i's latent is pixel i itself.

    q(z_i given x) puts everything on x_i, so KL(q, p) is -log p(z_i given the latents above), and
    p(x given z) is 1. Each prior is computed from the latents that are there by then.
    """
    model, x_BCHW = made(image_channels=channels), all_images(channels)[::7]
    latents_BCHW = torch.zeros_like(x_BCHW)
    kl_nats_LB = []
    with torch.no_grad():
        for row, column in itertools.product(range(2), repeat=2):
            _, input_BCHW = network_input(model.config, latents_BCHW, torch.float64)
            prior = model.parameters_of_pixels(input_BCHW)[:, :, row, column, None, None]
            pixel_BC11 = x_BCHW[:, :, row, column, None, None]
            level_BC11 = uint8_to_levels(pixel_BC11, model.config.num_levels)
            kl_nats_LB.append(-model.likelihood.log_prob(prior, level_BC11))
            latents_BCHW[:, :, row, column] = x_BCHW[:, :, row, column]
    assert torch.equal(latents_BCHW, x_BCHW)
    bound = Elbo(distortion_nats_B=torch.zeros(len(x_BCHW)), kl_nats_LB=torch.stack(kl_nats_LB))
    torch.testing.assert_close(-bound.neg_elbo_nats_B, log_probs(model, x_BCHW))


@pytest.mark.parametrize("cached", [True, False])
def test_samples_come_as_often_as_they_are_scored(cached: bool) -> None:
    model, images = made(), all_images(1)
    expected = log_probs(model, images).exp().numpy() * 20_000
    drawn = model.sample(20_000, generator=generator_of("counted"), cached=cached)
    found = {image.numpy().tobytes(): 0 for image in images}
    for image in drawn:
        found[image.numpy().tobytes()] += 1
    assert expected.min() > 5  # as the chi-squared test wants
    assert stats.chisquare([*found.values()], expected).pvalue > 1e-4


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_cached_activations_draw_what_the_whole_network_draws(
    channels: int, temperature: float
) -> None:
    model = made(image_size=5, image_channels=channels, num_levels=256, layers=3)

    def drawn(cached: bool) -> Tensor:
        generators = [generator_of("draw", number) for number in range(3)]
        return model.sample(3, temperature, generators, cached=cached)

    assert torch.equal(drawn(True), drawn(False))
    given = drawn(True)
    generator = generator_of("complete")
    completed = model.complete(given, 2, temperature, generator)
    assert torch.equal(completed[:, :, :2], given[:, :, :2])
    again = model.complete(given, 2, temperature, generator_of("complete"), cached=False)
    assert torch.equal(completed, again)


def test_a_temperature_of_zero_is_the_middle_of_the_likeliest_component() -> None:
    model = made(num_levels=256)
    first, second = (model.sample(1, 0.0, generator_of(seed)) for seed in "ab")
    assert torch.equal(first, second)
    with pytest.raises(UserError, match=r"temperature: -0\.1 is negative"):
        model.sample(1, -0.1)
    with pytest.raises(UserError, match="n: 0 images"):
        model.sample(0)


def test_it_trains_stops_goes_on_and_is_saved_as_a_vae_is(tmp_path: Path) -> None:
    config = made(image_size=8, width=8).config
    assert isinstance(config, PixelCNNConfig)
    training = TrainConfig(
        steps=6, batch_size=4, learning_rate=0.01, warmup_steps=2, log_every=2, checkpoint_every=2,
        device="cpu",
    )  # fmt: skip
    data = levels_to_uint8(torch.randint(0, 3, (64, 1, 8, 8), generator=generator_of("data")), 3)

    def run(folder: str, stop_at: int = 0) -> object:
        def batches(start: int):  # type: ignore[no-untyped-def]
            return iter(data[start:].split(4))

        return train(config, training, batches, tmp_path / folder, lambda p: p.step != stop_at)

    whole = run("whole")
    assert run("parts", stop_at=3) is None
    parts = run("parts")
    assert isinstance(whole, PixelCNN) and isinstance(parts, PixelCNN)
    for name, weights in whole.state_dict().items():
        assert torch.equal(weights, parts.state_dict()[name]), name

    vdvae.save(whole, tmp_path / "model")
    loaded = vdvae.load(tmp_path / "model")
    assert isinstance(loaded, PixelCNN) and loaded.config == config
    scores = score(loaded, data[:5], seed=0)
    assert scores.rate_nats_B.tolist() == [0.0] * 5
    summary = scores.summary()
    assert summary["rate_bits_per_dim"] == 0
    assert summary["bits_per_dim"] == pytest.approx(
        float(whole(data[:5]).distortion_nats_B.mean()) / (64 * np.log(2)), rel=1e-6
    )
    assert torch.equal(draw(loaded, 2, 1.0, seed=3), draw(loaded, 4, 1.0, seed=3)[:2])
    ladder = reconstruction_ladder(loaded, data[:2], seed=0)
    assert [*ladder] == [0, 2, 4, 6]
    assert torch.equal(ladder[6][:, :, :6], data[:2, :, :6])
    assert summarise(config).parameters == sum(p.numel() for p in loaded.parameters())


def test_what_needs_latents_and_other_configs_are_refused() -> None:
    model = made(image_size=8)
    with pytest.raises(UserError, match="has no latents"):
        with_latents(model)
    x_CHW = torch.zeros(1, 8, 8, dtype=torch.uint8)
    with pytest.raises(UserError, match="has no latents"):
        interpolate(model, x_CHW, x_CHW, 3, 0)
    values = dataclasses.asdict(model.config)
    with pytest.raises(UserError, match=r"model\.kind: 'flow' is not one of 'vdvae', 'pixelcnn'"):
        model_config_of({**values, "kind": "flow"})
    with pytest.raises(UserError, match=r"model\.encoder: unknown key"):
        model_config_of({**values, "encoder": "8x1"})
    with pytest.raises(UserError, match=r"model\.layers: 0 is out of bounds"):
        model_config_of({**values, "layers": 0})
    with pytest.raises(UserError, match="this model reads uint8 of shape"):
        model(torch.zeros(1, 1, 4, 4, dtype=torch.uint8))

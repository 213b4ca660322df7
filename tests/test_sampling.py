"""What is drawn can be drawn again; the way between images ends at their reconstructions."""

from __future__ import annotations

import pytest
import torch

import vdvae
from vdvae import UserError
from vdvae.randomness import evaluation_noise
from vdvae.sampling import draw, interpolate, reconstruction_ladder, slerp

CONFIG = vdvae.ModelConfig(
    image_size=8, image_channels=1, num_levels=17, encoder="8x1,8d4,2x1", decoder="2x1,8m2",
    width=8, latent_channels=2, mixtures=2,
)  # fmt: skip


@pytest.fixture
def model() -> vdvae.VDVAE:
    torch.manual_seed(0)
    return vdvae.VDVAE(CONFIG).eval()


def test_the_ends_of_a_way_are_the_reconstructions(model: vdvae.VDVAE) -> None:
    x_BCHW = torch.randint(0, 256, (2, 1, 8, 8), generator=torch.Generator().manual_seed(1)).byte()
    steps_TCHW = interpolate(model, x_BCHW[0], x_BCHW[1], 5, seed=7)
    assert steps_TCHW.shape == (5, 1, 8, 8) and steps_TCHW.dtype == torch.uint8
    for end, image_BCHW in zip((0, -1), x_BCHW.split(1), strict=True):
        noise_BN = evaluation_noise(image_BCHW, CONFIG.num_latents, 7)
        latents = model.encode(image_BCHW, noise_BN=noise_BN)
        expected = model.decode(latents, generator=torch.Generator().manual_seed(7))
        assert torch.equal(steps_TCHW[end], expected[0])
    assert not torch.equal(steps_TCHW[0], steps_TCHW[2])
    same = interpolate(model, x_BCHW[0], x_BCHW[0], 3, seed=7)
    assert torch.equal(same[0], same[1])
    with pytest.raises(UserError, match="steps: 1 leaves no way"):
        interpolate(model, x_BCHW[0], x_BCHW[1], 1, seed=7)


def test_between_two_draws_the_length_stays() -> None:
    a, b = torch.randn(2, 1, 16, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(slerp(a, b, 0.0), a)
    assert torch.equal(slerp(a, b, 1.0), b)
    middle = slerp(a, b, 0.5)
    assert middle.std().item() == pytest.approx(1, abs=0.02)  # on a straight line 0.71
    assert (middle - a).norm().item() == pytest.approx((middle - b).norm().item(), rel=0.02)
    assert torch.equal(slerp(a, a, 0.3), a)


def test_draws_are_repeated_by_their_seed(model: vdvae.VDVAE) -> None:
    first = draw(model, 3, 0.85, 7)
    assert torch.equal(first, draw(model, 3, 0.85, 7))
    assert not torch.equal(first, draw(model, 3, 0.85, 8))
    for n, temperature, seed, word in (
        (0, 1, 0, "n"),
        (1, 3, 0, "temperature"),
        (1, 1, -1, "seed"),
    ):
        with pytest.raises(UserError, match=f"^{word}: .* is out of bounds"):
            draw(model, n, temperature, seed)


def test_an_image_is_drawn_from_its_seed_and_number_alone(model: vdvae.VDVAE) -> None:
    """However many are drawn, and whatever is reconstructed beside it: bit for bit."""
    many = draw(model, 35, 1.0, 7)
    assert len(many.flatten(1).unique(dim=0)) == 35
    for n in (1, 15, 16, 17):
        assert torch.equal(draw(model, n, 1.0, 7), many[:n])

    x_BCHW = torch.randint(0, 256, (3, 1, 8, 8), generator=torch.Generator().manual_seed(1)).byte()
    ladder, other = (reconstruction_ladder(model, x, 7) for x in (x_BCHW, x_BCHW[[2, 0]]))
    assert {*ladder} == {2, 8}
    for resolution, images_BCHW in ladder.items():
        assert torch.equal(other[resolution], images_BCHW[[2, 0]])


def test_generators_of_their_own_draw_each_image(model: vdvae.VDVAE) -> None:
    """In float64, where the batch's own rounding reaches no pixel."""
    model.double()

    def sample(*seeds: int) -> torch.Tensor:
        return model.sample(len(seeds), 1.0, [torch.Generator().manual_seed(s) for s in seeds])

    together = sample(3, 4, 5)
    assert torch.equal(together, torch.cat([sample(3), sample(4), sample(5)]))
    assert torch.equal(together[[2, 0]], sample(5, 3))
    assert torch.equal(sample(4), model.sample(1, 1.0, torch.Generator().manual_seed(4)))

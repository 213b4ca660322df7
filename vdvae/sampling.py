"""Samples, reconstructions from part of the latents (Child 2021, Fig. 4), and interpolations.

Shapes: B batch, C image channels, H W, N images drawn, T steps of an interpolation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vdvae.autoregressive import PixelCNN
from vdvae.config import ImageModelConfig, UserError, shown
from vdvae.model import VDVAE
from vdvae.models import ImageModel, with_latents
from vdvae.randomness import check_seed, content_key, evaluation_noise, generator_of

PIXELS_A_BATCH = 256 * 32 * 32  # bounds memory: 256 images of 32x32, 4 of 256x256, one of more
MOST_SAMPLES = 4096
MOST_STEPS = 1024  # of an interpolation: one picture holds them side by side
_DRAWN_AT_ONCE, _PIXELS_DRAWN = 16, 16 * 32 * 32  # 16 images of 32x32, 4 of 64x64, one of more


def images_a_batch(config: ImageModelConfig) -> int:
    """How many images go through a model at once."""
    return max(1, PIXELS_A_BATCH // config.image_size**2)


def draw(model: ImageModel, n: int, temperature: float, seed: int) -> Tensor:
    """Draws images, each a function of (seed, its number) alone.

    With a larger n the first ones stay the same, bit for bit on one machine: each image has random
    numbers of its own, and is always computed at the same place of a batch of the same size.

    Args:
        model: on its device.
        n: number of images, 1 to MOST_SAMPLES.
        temperature: scale of the prior's standard deviation, 0 to 2.
        seed: of all draws.

    Returns:
        uint8 [N,C,H,W], on the CPU.

    Raises:
        UserError: n, temperature or seed out of bounds.
    """
    if not 1 <= n <= MOST_SAMPLES:
        raise UserError(f"n: {shown(n)} is out of bounds; ask for 1 to {MOST_SAMPLES} images")
    if not 0 <= temperature <= 2:
        raise UserError(f"temperature: {temperature} is out of bounds; use 0 to 2")
    check_seed(seed)
    size = max(1, min(_DRAWN_AT_ONCE, _PIXELS_DRAWN // model.config.image_size**2))

    def batch(start: int) -> Tensor:
        generators = [generator_of("sample", seed, number) for number in range(start, start + size)]
        return model.sample(size, temperature, generators).cpu()

    return torch.cat([batch(start) for start in range(0, n, size)])[:n]


@torch.no_grad()
def reconstruction_ladder(
    model: ImageModel, x_BCHW: Tensor, seed: int, temperature: float = 0.1
) -> dict[int, Tensor]:
    """Reconstructions from the latents up to each resolution.

    The posterior gives the latents of all layers up to the resolution; the prior, at low
    temperature, the rest (Fig. 4: which images are likely given a part of the latents). All draws
    are functions of (seed, content of the image).

    An autoregressive model has no latents: it is given no row, then a quarter of the rows, and so
    on, and draws the others.

    Args:
        model: on its device.
        x_BCHW: images, uint8.
        seed: of all draws.
        temperature: scale of the prior's standard deviation.

    Returns:
        {resolution: uint8 [B,C,H,W]}, the lowest resolution first; or by the number of rows given.

    Raises:
        UserError: a seed out of bounds, or images that are not the model's.
    """
    check_seed(seed)
    if not isinstance(model, VDVAE):
        return _completions(model, x_BCHW, seed)
    resolutions = model.latent_resolutions
    rungs: dict[int, list[Tensor]] = {resolution: [] for resolution in model.decoder.resolutions}
    # One by one: a batch of other size would round otherwise.
    for x_CHW in x_BCHW:
        image_BCHW = x_CHW[None].to(model.decoder.gain.device)
        generator = generator_of("reconstruct", seed, content_key(x_CHW))
        latents = model.encode(image_BCHW, noise_BN=generator)
        for resolution, images in rungs.items():
            until = len([r for r in resolutions if r <= resolution])
            images.append(model.decode(latents, until, temperature, generator))
    return {resolution: torch.cat(images) for resolution, images in rungs.items()}


def _completions(model: PixelCNN, x_BCHW: Tensor, seed: int) -> dict[int, Tensor]:
    size = model.config.image_size
    device = next(model.parameters()).device
    rungs: dict[int, list[Tensor]] = {size * quarters // 4: [] for quarters in range(4)}
    for x_CHW in x_BCHW:
        generator = generator_of("reconstruct", seed, content_key(x_CHW))
        for rows, images in rungs.items():
            images.append(model.complete(x_CHW[None].to(device), rows, generator=generator))
    return {rows: torch.cat(images) for rows, images in rungs.items()}


def interpolate(model: ImageModel, x_CHW: Tensor, y_CHW: Tensor, steps: int, seed: int) -> Tensor:
    """Interpolates between two images; the first and last image are their reconstructions.

    Each layer's latents are interpolated spherically (`slerp`) between draws of the two posteriors.
    On a straight line two such draws would partly cancel: in a layer whose posterior is near its
    prior, their mean is shorter by the square root of 1/2, which looks like a low temperature. All
    steps share the draw of the pixels, so that only the latents change.

    Args:
        model: in evaluation mode.
        x_CHW: the first image, uint8.
        y_CHW: the last one.
        steps: T, the number of images, both ends counted; 2 to MOST_STEPS.
        seed: of the posterior's draws, with each image, and of the pixels'.

    Returns:
        uint8 [T,C,H,W], on the CPU.

    Raises:
        UserError: too few or too many steps, a seed out of bounds, or images that are not the
            model's.
    """
    if steps < 2:
        raise UserError(f"steps: {steps} leaves no way between two images; use 2 or more")
    if steps > MOST_STEPS:
        raise UserError(f"steps: {shown(steps)} is out of bounds; use 2 to {MOST_STEPS} images")
    check_seed(seed)
    model = with_latents(model)
    parameter = model.decoder.gain
    ends = []
    for image_CHW in (x_CHW, y_CHW):
        x_BCHW = image_CHW[None].to(parameter.device)
        noise_BN = evaluation_noise(x_BCHW, model.config.num_latents, seed).to(parameter)
        ends.append(model.encode(x_BCHW, noise_BN=noise_BN))
    # One by one: a batch of other size would round otherwise, and the ends are to be exact.
    images = [
        model.decode(
            [slerp(a, b, step / (steps - 1)) for a, b in zip(*ends, strict=True)],
            generator=torch.Generator().manual_seed(seed),
        )
        for step in range(steps)
    ]
    return torch.cat(images).cpu()


def slerp(a: Tensor, b: Tensor, share: float) -> Tensor:
    """Spherical linear interpolation: on the arc between the directions of two tensors.

    Args:
        a: where `share` is 0, bit for bit.
        b: where `share` is 1, bit for bit.
        share: 0 to 1; between parallel tensors the interpolation is linear.
    """
    cosine = torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0)
    angle = torch.arccos(cosine.clamp(-1, 1))
    sine = torch.sin(angle)
    if sine < 1e-4:
        return torch.lerp(a, b, share)
    first, last = (torch.sin(weight * angle) / sine for weight in (1 - share, share))
    return first * a + last * b

"""What is drawn to be looked at: samples, the ladder of reconstructions (Child 2021, Fig. 4), ways.

Shapes: B batch, C image channels, H W, Z latent channels, N images drawn, T steps of a way.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vdvae.config import ModelConfig, UserError, shown
from vdvae.evaluate import image_noise
from vdvae.model import VDVAE

PIXELS_A_BATCH = 256 * 32 * 32  # bounds memory: 256 images of 32x32, 4 of 256x256, one of more
MOST_SAMPLES = 4096
MOST_STEPS = 1024  # of a way: one picture holds them side by side


def images_a_batch(config: ModelConfig) -> int:
    """How many images go through a model at once."""
    return max(1, PIXELS_A_BATCH // config.image_size**2)


def draw(model: VDVAE, n: int, temperature: float, seed: int) -> Tensor:
    """Draws n images, uint8 [N,C,H,W] on the CPU; the same seed gives the same images.

    Raises:
        UserError: n, temperature or seed out of bounds.
    """
    if not 1 <= n <= MOST_SAMPLES:
        raise UserError(f"n: {shown(n)} is out of bounds; ask for 1 to {MOST_SAMPLES} images")
    if not 0 <= temperature <= 2:
        raise UserError(f"temperature: {temperature} is out of bounds; use 0 to 2")
    return draw_in_batches(model, n, temperature, generator_of(seed), images_a_batch(model.config))


def draw_in_batches(
    model: VDVAE, n: int, temperature: float, generator: torch.Generator, batch_size: int
) -> Tensor:
    """Draws n images, uint8 [N,C,H,W] on the CPU, as many at once as the batch size says."""
    sizes = [min(batch_size, n - start) for start in range(0, n, batch_size)]
    return torch.cat([model.sample(size, temperature, generator).cpu() for size in sizes])


@torch.no_grad()
def reconstruction_ladder(
    model: VDVAE, x_BCHW: Tensor, generator: torch.Generator, temperature: float = 0.1
) -> dict[int, Tensor]:
    """Reconstructions from the latents up to each resolution: {resolution: uint8 [B,C,H,W]}.

    The posterior gives the latents of all layers up to the resolution; the prior, at low
    temperature, the rest (Fig. 4: which images are likely given a part of the latents).
    """
    latents = model.encode(x_BCHW, noise_BN=generator)
    resolutions = [entry.resolution for entry in model.decoder.layout]
    return {
        resolution: model.decode(
            latents,
            until=len([r for r in resolutions if r <= resolution]),
            temperature=temperature,
            generator=generator,
        )
        for resolution in model.decoder.resolutions
    }


def interpolate(model: VDVAE, x_CHW: Tensor, y_CHW: Tensor, steps: int, seed: int) -> Tensor:
    """Images on the way from one image to another, uint8 [T,C,H,W]; the ends are reconstructions.

    Each layer's latents turn on the sphere from one draw of the posterior to the other. In between
    on a straight line two such draws would partly cancel: in a layer whose posterior is near its
    prior the mean of two is shorter by the root of a half, which looks like a low temperature and
    washes the middle out. All steps share the draw of the pixels, so that only the latents move.

    Args:
        model: in evaluation.
        x_CHW: the first image, uint8.
        y_CHW: the last one.
        steps: how many images, both ends counted; 2 to MOST_STEPS.
        seed: of the posterior's draws, with each image, and of the pixels'.

    Raises:
        UserError: too few or too many steps, or images that are not the model's.
    """
    if steps < 2:
        raise UserError(f"steps: {steps} leaves no way between two images; use 2 or more")
    if steps > MOST_STEPS:
        raise UserError(f"steps: {shown(steps)} is out of bounds; use 2 to {MOST_STEPS} images")
    device = model.decoder.gain.device
    ends = []
    for image_CHW in (x_CHW, y_CHW):
        x_BCHW = image_CHW[None].to(device)
        ends.append(model.encode(x_BCHW, noise_BN=image_noise(model, x_BCHW, seed)))
    # One by one: a batch of other size would round otherwise, and the ends are to be exact.
    images = [
        model.decode(
            [slerp(a, b, step / (steps - 1)) for a, b in zip(*ends, strict=True)],
            generator=generator_of(seed),
        )
        for step in range(steps)
    ]
    return torch.cat(images).cpu()


def slerp(a: Tensor, b: Tensor, share: float) -> Tensor:
    """The point at `share` (0 to 1) of the way from a to b on the arc between their directions.

    At 0 and 1 it is a and b bit for bit; where the directions agree, it is on a straight line.
    """
    cosine = torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0)
    angle = torch.arccos(cosine.clamp(-1, 1))
    sine = torch.sin(angle)
    if sine < 1e-4:
        return torch.lerp(a, b, share)
    first, last = (torch.sin(weight * angle) / sine for weight in (1 - share, share))
    return first * a + last * b


def generator_of(seed: int) -> torch.Generator:
    """A generator on the CPU, so that every device draws the same.

    Raises:
        UserError: a seed out of bounds.
    """
    if not 0 <= seed < 2**31:
        raise UserError(f"seed: {seed} is out of bounds; use 0 to {2**31 - 1}")
    return torch.Generator().manual_seed(seed)

"""What is drawn to be looked at: samples, the ladder of reconstructions (Child 2021, Fig. 4), ways.

Shapes: B batch, C image channels, H W, Z latent channels, N images drawn, T steps of a way.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vdvae.config import ModelConfig, UserError, shown
from vdvae.evaluate import content_key, image_noise, seed_of
from vdvae.model import VDVAE

PIXELS_A_BATCH = 256 * 32 * 32  # bounds memory: 256 images of 32x32, 4 of 256x256, one of more
MOST_SAMPLES = 4096
_DRAWN_AT_ONCE, _PIXELS_DRAWN = 16, 16 * 32 * 32  # 16 images of 32x32, 4 of 64x64, one of more
MOST_STEPS = 1024  # of a way: one picture holds them side by side


def images_a_batch(config: ModelConfig) -> int:
    """How many images go through a model at once."""
    return max(1, PIXELS_A_BATCH // config.image_size**2)


def draw(model: VDVAE, n: int, temperature: float, seed: int) -> Tensor:
    """Draws n images, uint8 [N,C,H,W] on the CPU; each depends on (seed, its number) alone.

    So the first images of more are the same ones, bit for bit on one machine: the numbers an image
    is drawn from are its own, and it is always computed at the same place of as many.

    Args:
        model: on its device.
        n: how many.
        temperature: scale of the prior's standard deviation.
        seed: of all draws.

    Raises:
        UserError: n, temperature or seed out of bounds.
    """
    if not 1 <= n <= MOST_SAMPLES:
        raise UserError(f"n: {shown(n)} is out of bounds; ask for 1 to {MOST_SAMPLES} images")
    if not 0 <= temperature <= 2:
        raise UserError(f"temperature: {temperature} is out of bounds; use 0 to 2")
    check_seed(seed)
    size = max(1, min(_DRAWN_AT_ONCE, _PIXELS_DRAWN // model.config.image_size**2))

    def drawn(start: int) -> Tensor:
        seeds = [seed_of("sample", seed, number) for number in range(start, start + size)]
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return model.sample(size, temperature, generators).cpu()

    return torch.cat([drawn(start) for start in range(0, n, size)])[:n]


@torch.no_grad()
def reconstruction_ladder(
    model: VDVAE, x_BCHW: Tensor, seed: int, temperature: float = 0.1
) -> dict[int, Tensor]:
    """Reconstructions from the latents up to each resolution: {resolution: uint8 [B,C,H,W]}.

    The posterior gives the latents of all layers up to the resolution; the prior, at low
    temperature, the rest (Fig. 4: which images are likely given a part of the latents). All draws
    are of (seed, content of the image).

    Args:
        model: on its device.
        x_BCHW: images, uint8.
        seed: of all draws.
        temperature: of the prior.

    Raises:
        UserError: a seed out of bounds, or images that are not the model's.
    """
    check_seed(seed)
    resolutions = [entry.resolution for entry in model.decoder.layout]
    rungs: dict[int, list[Tensor]] = {resolution: [] for resolution in model.decoder.resolutions}
    # One by one: a batch of other size would round otherwise.
    for x_CHW in x_BCHW:
        image_BCHW = x_CHW[None].to(model.decoder.gain.device)
        key = seed_of("reconstruct", seed, content_key(x_CHW))
        generator = torch.Generator().manual_seed(key)
        latents = model.encode(image_BCHW, noise_BN=generator)
        for resolution, images in rungs.items():
            until = len([r for r in resolutions if r <= resolution])
            images.append(model.decode(latents, until, temperature, generator))
    return {resolution: torch.cat(images) for resolution, images in rungs.items()}


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
    check_seed(seed)
    return torch.Generator().manual_seed(seed)


def check_seed(seed: int) -> None:
    """Checks a seed of draws.

    Raises:
        UserError: it is out of bounds.
    """
    if not 0 <= seed < 2**31:
        raise UserError(f"seed: {seed} is out of bounds; use 0 to {2**31 - 1}")

"""Seeds and noise: every draw is a function of what it is for, never of what was drawn before.

Training's noise comes from (seed, step, number in the batch), evaluation's from (seed, content of
the image), samples from (seed, number of the sample).

Shapes: B batch, C image channels, H W, N latent variables per image.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vdvae.config import UserError

# What random numbers come from: one for a whole batch (None: PyTorch's own), or one per image,
# whose draws then depend on no other image.
Generators = torch.Generator | Sequence[torch.Generator] | None


def seed_of(*parts: str | int) -> int:
    """A seed that depends on all parts: the first 63 bits of their sha256."""
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def check_seed(seed: int) -> None:
    """Checks a seed that a user gives.

    Raises:
        UserError: it is not 0 to 2^31 - 1.
    """
    if not 0 <= seed < 2**31:
        raise UserError(f"seed: {seed} is out of bounds; use 0 to {2**31 - 1}")


def generator_of(*parts: str | int) -> torch.Generator:
    """A generator on the CPU, so that every device draws the same, seeded by `seed_of(*parts)`."""
    return torch.Generator().manual_seed(seed_of(*parts))


def content_key(x_CHW: Tensor) -> str:
    """The sha256 of a uint8 image's shape and pixels, in hex: equal images draw equal noise."""
    header = f"{tuple(x_CHW.shape)}".encode()
    return hashlib.sha256(header + x_CHW.cpu().contiguous().numpy().tobytes()).hexdigest()


def draw_like(
    draw: Callable[..., Tensor],
    shape: Sequence[int],
    generator: Generators,
    like: Tensor,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Random numbers, drawn on the generator's own device and moved to a tensor's.

    Args:
        draw: `torch.rand` or `torch.randn`.
        shape: of the numbers, with the batch first.
        generator: one for all, one per image of the batch, or None for PyTorch's global one.
        like: gives the device, and the dtype where none is given.
        dtype: of the numbers.
    """
    if isinstance(generator, Sequence):
        return torch.stack([draw_like(draw, shape[1:], own, like, dtype) for own in generator])
    device = generator.device if generator is not None else like.device
    numbers = draw(tuple(shape), generator=generator, device=device, dtype=dtype or like.dtype)
    return numbers.to(like.device)


def normal(shape: Sequence[int], generator: Generators, like: Tensor) -> Tensor:
    """Standard normal noise of a shape, on the device and in the dtype of `like`."""
    return draw_like(torch.randn, shape, generator, like)


def uniform(generator: Generators, like: Tensor) -> Tensor:
    """Uniform numbers of [0, 1) in the shape and on the device of `like`, in steps of 2^-53.

    They are float64: in float32 the steps would be 2^-24, and the tails would end there.
    """
    return draw_like(torch.rand, like.shape, generator, like, torch.float64)


def training_noise(
    seed: int, step: int, images: range, num_latents: int, device: torch.device
) -> Tensor:
    """The posterior's noise for some images of a training batch.

    It is a function of (seed, step, number in the batch), so any number of ranks draws the same. A
    GPU draws with a generator of its own kind, and gets other numbers than a CPU.

    Args:
        seed: of the run.
        step: number of the update, from 0.
        images: numbers of the images in the batch of all ranks.
        num_latents: N.
        device: that draws and holds the noise.

    Returns:
        Standard normal noise [B,N], float32.
    """
    generator = torch.Generator(device)
    noise_BN = torch.empty(len(images), num_latents, device=device)
    for row_N, image in zip(noise_BN, images, strict=True):
        generator.manual_seed(seed_of("noise", seed, step, image))
        row_N.normal_(generator=generator)
    return noise_BN


def evaluation_noise(x_BCHW: Tensor, num_latents: int, seed: int, draw: int = 0) -> Tensor:
    """The posterior's noise for scoring images, a function of (seed, content, draw) alone.

    Args:
        x_BCHW: images, uint8.
        num_latents: N.
        seed: of the evaluation.
        draw: number of the draw, from 0.

    Returns:
        Standard normal noise [B,N], float32, on the CPU.
    """
    more = (draw,) if draw else ()
    return torch.stack(
        [
            torch.randn(
                num_latents, generator=generator_of("evaluate", seed, content_key(x_CHW), *more)
            )
            for x_CHW in x_BCHW
        ]
    )

"""Pictures for people: grids of images, enlarged where they are small.

Shapes: N images, B batch, C image channels, H W.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from vdvae.files import atomic_path

if TYPE_CHECKING:
    import torch

    from vdvae.models import ImageModel

_GAP = 2  # pixels between images, after enlarging
_WANTED = 96  # an image smaller than this is enlarged by a whole number
_TEMPERATURES = (1.0, 0.85, 0.7, 0.5)  # a row each in pictures of training
_MOST = 256  # pixels a side of an image in them


def save_grid(path: Path, x_NHWC: np.ndarray, columns: int | None = None) -> None:
    """Writes images as one PNG, row by row, atomically.

    Args:
        path: of the PNG.
        x_NHWC: uint8 images, all of one shape, with 1 or 3 channels.
        columns: images a row; as square as possible where it is not given.
    """
    count, height, width, channels = x_NHWC.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    factor = max(1, _WANTED // 2 // height)
    tall, wide = height * factor + _GAP, width * factor + _GAP
    sheet = np.full((rows * tall + _GAP, columns * wide + _GAP, channels), 128, np.uint8)
    for index, image in enumerate(x_NHWC):
        top = _GAP + index // columns * tall
        left = _GAP + index % columns * wide
        enlarged = image.repeat(factor, axis=0).repeat(factor, axis=1)
        sheet[top : top + tall - _GAP, left : left + wide - _GAP] = enlarged
    picture = Image.fromarray(sheet[:, :, 0] if channels == 1 else sheet)
    with atomic_path(path) as temporary:
        picture.save(temporary, format="PNG")


def save_ladder(path: Path, ladder_NHWC: Sequence[np.ndarray], x_NHWC: np.ndarray) -> None:
    """Writes reconstructions as one PNG (Fig. 4): a row an image, the image itself at its end.

    Args:
        path: of the PNG.
        ladder_NHWC: the images from the latents up to each resolution, lowest first.
        x_NHWC: the images.
    """
    save_grid(path, *_rungs([*ladder_NHWC, x_NHWC]))


def _rungs(columns: Sequence[np.ndarray]) -> tuple[np.ndarray, int]:
    """Images row by row, uint8 N H W C, and how many a row has."""
    return np.stack(columns, axis=1).reshape(-1, *columns[0].shape[1:]), len(columns)


def to_NHWC(x_BCHW: torch.Tensor) -> np.ndarray:
    """A model's images as an array N H W C."""
    return x_BCHW.cpu().permute(0, 2, 3, 1).contiguous().numpy()


def draw_samples(model: ImageModel, n: int, temperature: float, seed: int) -> np.ndarray:
    """Draws n images, uint8 N H W C; see `vdvae.sampling.draw`."""
    from vdvae.sampling import draw

    return to_NHWC(draw(model, n, temperature, seed))


def draw_ladder(model: ImageModel, x_BCHW: torch.Tensor, seed: int) -> tuple[np.ndarray, int]:
    """A row an image: the latents up to each resolution, then the image itself (Fig. 4).

    Returns:
        The images row by row, uint8 N H W C, and how many a row has.
    """
    from vdvae.sampling import reconstruction_ladder

    ladder = reconstruction_ladder(model, x_BCHW, seed)
    return _rungs([*map(to_NHWC, ladder.values()), to_NHWC(x_BCHW)])


def draw_progress(
    model: ImageModel,
    x_BCHW: torch.Tensor,
    folder: Path,
    step: int,
    *,
    columns: int,
    seed: int,
    between: Callable[[], None] = lambda: None,
) -> None:
    """Writes what a model in training has learnt: samples by temperature, and a ladder.

    The draws depend on the seed alone, so that pictures of two steps differ by what was learnt.

    Args:
        model: the averaged weights.
        x_BCHW: images to reconstruct, always the same.
        folder: gets samples-<step>.png and reconstructions-<step>.png.
        step: of training.
        columns: samples at each temperature.
        seed: of the draws.
        between: called before each part of the pictures; what it raises leaves no picture half.
    """
    samples = []
    for temperature in _TEMPERATURES:
        between()
        samples.append(draw_samples(model, columns, temperature, seed))
    save_grid(folder / f"samples-{step:09d}.png", small(np.concatenate(samples)), columns)
    parts = []
    for image_BCHW in x_BCHW.split(1):
        between()
        parts.append(draw_ladder(model, image_BCHW, seed))
    rows = np.concatenate([images for images, _ in parts])
    save_grid(folder / f"reconstructions-{step:09d}.png", small(rows), parts[0][1])


def picture_interval(steps: int, log_every: int) -> int:
    """Steps between pictures: at most 20 a run, at least 100 apart, at points of the curves."""
    return math.ceil(max(steps / 20, 100) / log_every) * log_every


def small(x_NHWC: np.ndarray) -> np.ndarray:
    """Images of at most `_MOST` pixels a side: means of squares of pixels."""
    factor = math.ceil(x_NHWC.shape[1] / _MOST)
    if factor == 1:
        return x_NHWC
    reduced = [np.asarray(Image.fromarray(x.squeeze()).reduce(factor)) for x in x_NHWC]
    return np.stack(reduced).reshape(len(x_NHWC), *reduced[0].shape[:2], -1)


def data_uri(path: Path, most_bytes: int = 4_000_000) -> str:
    """A PNG as a `data:` address, which a page shows without asking anybody.

    Its own bytes where they are at most `most_bytes`, else halved until they are.
    """
    content = path.read_bytes()
    if len(content) > most_bytes:
        with Image.open(path) as opened:
            picture = opened.copy()
        while len(content) > most_bytes:
            picture = picture.reduce(2)
            buffer = io.BytesIO()
            picture.save(buffer, format="PNG")
            content = buffer.getvalue()
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"

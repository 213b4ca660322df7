"""Drawing images: a very deep VAE against an autoregressive model, plain and with its cache.

    python benchmarks/sampling.py [--only digits,published] [--threads 2] [--device cpu]

`digits`: 8x8, the two recipes of that data set. `published`: 32x32 in colour, the VAE of the
paper's CIFAR-10 figure (39 million parameters) and an autoregressive model of about PixelCNN++'s
53 million. Weights are random, which changes no time. The three ways alternate in one process; a
ratio is that of one round. Plain sampling runs the whole network for each pixel: of the published
size the last rows are timed, and the time of an image follows from their share of its pixels
(`timed_pixels`).
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial

import torch
from measure import Clock, machine
from rows import keep

from pipeline.params import load_recipe
from vdvae.autoregressive import PixelCNN
from vdvae.config import AnyModelConfig, PixelCNNConfig
from vdvae.model import VDVAE
from vdvae.models import build
from vdvae.precision import arithmetic, exact_float32

ROUNDS = 3
# As many parameters as the paper gives PixelCNN++ in Table 2.
_PUBLISHED = PixelCNNConfig(
    kind="pixelcnn", image_size=32, image_channels=3, num_levels=256, width=250, layers=30,
    mixtures=10,
)  # fmt: skip
_PLAIN_PIXELS = 64  # of one round of plain sampling, at most


def pairs(only: str) -> dict[str, tuple[AnyModelConfig, AnyModelConfig, int]]:
    """VAE, autoregressive model and images at once, by name."""
    known = {
        "digits": (load_recipe("digits").model, load_recipe("digits-pixelcnn").model, 64),
        "published": (load_recipe("cifar10").model, _PUBLISHED, 1),
    }
    return {name: known[name] for name in only.split(",")}


def main() -> None:
    """Measures, prints and appends a row for each way."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="digits,published")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    words = parser.parse_args()
    torch.set_num_threads(words.threads)
    exact_float32()
    device = torch.device(words.device)
    clock = Clock(device)
    for name, (of_vae, of_pixels, batch) in pairs(words.only).items():
        vae, pixelcnn = (build(config).to(device).eval() for config in (of_vae, of_pixels))
        assert isinstance(vae, VDVAE) and isinstance(pixelcnn, PixelCNN)
        size, pixels = of_pixels.image_size, of_pixels.image_size**2
        rows = -(-min(pixels, _PLAIN_PIXELS) // size)
        x_BCHW = torch.zeros(
            batch, of_pixels.image_channels, size, size, dtype=torch.uint8, device=device
        )
        ways: dict[str, tuple[Callable[[], object], int, float]] = {
            # what is timed, network evaluations an image, times what is timed gives a batch
            "vae": (partial(vae.sample, batch), 1, 1),
            "cached": (partial(pixelcnn.sample, batch), pixels, 1),
            "plain": (
                partial(pixelcnn.complete, x_BCHW, size - rows, cached=False),
                pixels,
                size / rows,
            ),
        }
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        with torch.no_grad(), arithmetic("fp32", device):
            for round_ in range(-1, ROUNDS):  # the first is not counted
                for way, (draw, _, times) in ways.items():
                    taken = clock(draw) * times
                    if round_ >= 0:
                        seconds[way].append(taken)
        for way, (_, evaluations, _) in ways.items():
            ratios = sorted(s / v for s, v in zip(seconds[way], seconds["vae"], strict=True))
            model = vae if way == "vae" else pixelcnn
            keep(
                "sampling",
                models=name,
                way=way,
                parameters=sum(p.numel() for p in model.parameters()),
                network_evaluations=evaluations,
                batch=batch,
                timed_pixels=rows * size if way == "plain" else "",
                images_per_second=f"{batch / statistics.median(seconds[way]):.4g}",
                seconds_over_vae=f"{statistics.median(ratios):.4g}",
                range=f"{ratios[0]:.4g}-{ratios[-1]:.4g}",
                **machine(device, ROUNDS),
            )


if __name__ == "__main__":
    main()

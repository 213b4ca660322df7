"""Prints how many bytes training steps hold at most, in a process of their own.

python tests/step_memory.py RECIPE IMAGES PARTS PRECISION
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch

from pipeline.params import load_recipe
from vdvae.training import start, update


def resident(name: str) -> int:
    """VmRSS, what this process holds, or VmHWM, the most that it held; bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


def step(name: str, images: int, parts: int, precision: str, count: int) -> None:
    """A few training steps of so many images at once; what they hold is gone when they return."""
    recipe = load_recipe(name)
    model = recipe.model
    batch = images * parts
    config = replace(
        recipe.train, batch_size=batch, accumulation=parts, precision=precision, skip_threshold=1e30
    )
    state = start(model, config, torch.device("cpu"))
    shape = (batch, model.image_channels, model.image_size, model.image_size)
    for _ in range(count):
        x_BCHW = torch.randint(0, 256, shape, dtype=torch.uint8)
        update(state, config, x_BCHW, torch.randn(batch, model.num_latents))


def main() -> None:
    """Measures the second step, too, when the optimiser has its moments."""
    recipe, images, parts, precision = sys.argv[1:]
    torch.set_num_threads(1)
    step("digits", 1, 1, precision, 1)  # what the libraries take for themselves
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    step(recipe, int(images), int(parts), precision, 2)
    print(resident("VmHWM") - before)


if __name__ == "__main__":
    main()

"""Times what a recipe does against its plain twin, in one process and run, and keeps the rows.

    python benchmarks/recipe.py cifar10 [--batch 4] [--steps 10] [--threads 2] [--device cpu]
        [--precision bf16] [--twin-precision bf16] [--compile] [--checkpoint-activations-from 1]
        [--only step,evaluate,load]

Ours is what the options say, in channels-last memory with fused updates. The twin of `step` and
`evaluate` is the published arithmetic (benchmarks/published_arithmetic.py) in float32 or, with
`--twin-precision bf16`, under autocast; that of the other parts is ours with nothing fused or
compiled, in float32 and PyTorch's default memory layout. The two alternate, so that whatever else
the machine does meets both alike. Peak memory is that of ours, before the twin is made. The limits,
a matrix product and a copy, are measured beside them.

Rows: `step`, a whole training step; `update`, what of it is optimiser and averages alone, whose
limit is memory; `checkpoint`, the pause of a step while a state is taken, where the twin waits for
the disk; `evaluate`, the bound of a batch; `sample`, drawing a batch; `load`, reading some hundred
or thousand made images of the recipe's size in random order, from the cache of decoded shards,
where the twin is a plain WebDataset pipeline on the same tars (more: benchmarks/reading.py).
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from measure import Measure, copy_bytes, machine, matmul_flops
from reading import made, plain
from rows import keep

from pipeline.params import Recipe, load_recipe
from pipeline.shards import BlockCache, Manifest, ShardReader
from pipeline.storage import FileStore
from pipeline.system.process import keep_freed_memory
from vdvae.config import ModelConfig
from vdvae.precision import exact_float32
from vdvae.summary import summarise

PARTS = ("step", "update", "checkpoint", "evaluate", "sample", "load")
_LOADED_BYTES = 2**25  # of pixels, in one call of `load`, unless one batch has more


class WithReading(Measure):
    """The parts that read images, too."""

    def __init__(self, recipe: Recipe, words: argparse.Namespace) -> None:
        from_resolution = words.checkpoint_activations_from
        if from_resolution is None:
            from_resolution = recipe.train.checkpoint_activations_from
        train = replace(
            recipe.train,
            batch_size=words.batch or recipe.train.batch_size // recipe.train.accumulation,
            accumulation=1,
            precision=words.precision,
            compile=words.compile,
            checkpoint_activations_from=from_resolution,
        )
        if not isinstance(recipe.model, ModelConfig):
            raise SystemExit(f"{recipe.name} is no VDVAE, which is what is timed here")
        device = torch.device(words.device)
        super().__init__(
            recipe.model, train, device, words.steps, twin_precision=words.twin_precision
        )
        self.manifest: Manifest | None = None  # of the images of `load`

    def work(self, part: str, who: str) -> Callable[[], object]:
        """One call of what is measured."""
        return self._load(who) if part == "load" else super().work(part, who)

    def images(self, part: str) -> int:
        """In one call."""
        if part != "load":
            return self.batch
        assert self.manifest
        return self.manifest.splits["train"].images // self.batch * self.batch

    def _load(self, who: str) -> Callable[[], object]:
        folder, batch = Path(self.folder.name), self.batch
        store = FileStore(folder / "store")
        if not self.manifest:
            images = max(_LOADED_BYTES // self.model.dims, batch) + 64  # some for the other splits
            self.manifest = made(folder, store, images, self.model.image_size)
        if who == "twin":
            shards = self.manifest.splits["train"].shards
            paths = [str(store.folder / shard.key) for shard in shards]
            return lambda: sum(map(len, plain(paths, 0, s3=False, batch=batch)))
        cache = BlockCache(folder=folder / "cache", limit_bytes=2**40)
        reader = ShardReader(self.manifest, store, "train", cache=cache)

        def once() -> None:
            with contextlib.closing(reader.batches(batch, seed=0)) as batches:
                for _ in range(self.images("load") // batch):
                    next(batches)

        return once


def main() -> None:
    """Measures, prints and appends a row for each part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("--batch", type=int, default=0, help="default: the recipe's, in its parts")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("fp32", "tf32", "bf16"), default="fp32")
    parser.add_argument("--twin-precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--checkpoint-activations-from", type=int, help="default: the recipe's")
    parser.add_argument("--only", default=",".join(PARTS))
    words = parser.parse_args()
    torch.set_num_threads(words.threads)
    keep_freed_memory()  # for both, as the stages do
    exact_float32()
    recipe = load_recipe(words.recipe)
    measure = WithReading(recipe, words)
    parts = [part for part in PARTS if part in words.only.split(",")]
    if "step" not in parts and "update" in parts:
        measure.work("step", "ours")(), measure.work("step", "twin")()  # gradients to update by
    peaks = {part: measure.peak_mib(part) for part in parts}
    device, size = measure.device, 8192 if words.device == "cuda" else 2048
    limits = {"matmul": matmul_flops(device, words.precision, size), "copy": copy_bytes(device)}
    for part in parts:
        pairs = measure.seconds(part)
        moved: dict[str, int] = {
            # weights, moments, averages both ways, gradients
            "update": 10 * 4 * summarise(recipe.model).parameters,
            # pixels, read and written
            "load": 2 * measure.images(part) * recipe.model.dims,
        }
        keep(
            "recipe",
            recipe=words.recipe,
            part=part,
            **measure.settings(),
            **measure.figures(part, pairs, peaks[part], limits, moved.get(part)),
            **machine(device, words.steps),
        )


if __name__ == "__main__":
    main()

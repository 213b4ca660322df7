"""Times what a recipe does against its plain twin, in one process and run, and keeps the rows.

    python benchmarks/recipe.py cifar10 [--batch 4] [--steps 10] [--threads 2] [--device cpu]
        [--precision bf16] [--compile] [--recompute-from 1] [--only step,evaluate,load]

Ours is what the options say, in channels-last memory with fused updates; the twin is PyTorch as it
comes: float32, its default memory layout, nothing compiled, one parameter updated after the other.
The two alternate, so that whatever else the machine does meets both alike. Peak memory is that of
ours, before the twin is made. The limits, a matrix product and a copy, are measured beside them.

Rows: `step`, a whole training step; `update`, what of it is optimiser and averages alone, whose
limit is memory; `checkpoint`, the pause of a step while a state is taken, where the twin waits for
the disk; `evaluate`, the bound of a batch; `sample`, drawing a batch; `load`, reading some hundred
or thousand made images of the recipe's size in random order, from the cache of decoded shards,
where the twin is a plain WebDataset pipeline on the same tars (more: benchmarks/reading.py).
"""

from __future__ import annotations

import argparse
import contextlib
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from reading import made, plain
from rows import keep
from torch import Tensor

from pipeline.params import Recipe, load_recipe
from pipeline.process import keep_freed_memory
from pipeline.shards import BlockCache, Manifest, ShardReader
from pipeline.storage import FileStore
from vdvae.checkpoint import StateWriter
from vdvae.config import TrainConfig
from vdvae.evaluate import score
from vdvae.precision import arithmetic, exact_float32, rounding
from vdvae.summary import summarise
from vdvae.training import TrainState, start, update

PARTS = ("step", "update", "checkpoint", "evaluate", "sample", "load")
_WARM = 3  # calls that are not counted
_LOADED_BYTES = 2**25  # of pixels, in one call of `load`, unless one batch has more


class Clock:
    """Seconds and peak memory of calls on a device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, work: Callable[[], object]) -> float:
        self._settle()
        began = time.perf_counter()
        work()
        self._settle()
        return time.perf_counter() - began

    def _settle(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def forget_peak(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")

    def peak_mib(self) -> float:
        """Of the GPU, or of this process with all its libraries."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 2**20
        status = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024


def plain_update(state: TrainState, config: TrainConfig) -> None:
    """The twin of the fused optimiser and averages: one parameter after the other."""
    step = torch.optim.AdamW(
        state.model.parameters(),
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        weight_decay=config.weight_decay,
        fused=False,
        foreach=False,
    )
    step.state = state.optimiser.state
    step.step()
    with torch.no_grad():
        for average, value in zip(state.ema.parameters(), state.model.parameters(), strict=True):
            average.lerp_(value, 1 - config.ema_decay)


def fused_update(state: TrainState, config: TrainConfig) -> None:
    """What `vdvae.training.update` does after the gradients."""
    state.optimiser.step()
    with torch.no_grad():
        averages: list[Tensor] = list(state.ema.parameters())
        values: list[Tensor] = list(state.model.parameters())
        torch._foreach_lerp_(averages, values, 1 - config.ema_decay)


class Measure:
    """Ours and the twin with the same images and noise."""

    def __init__(self, recipe: Recipe, words: argparse.Namespace) -> None:
        self.device = torch.device(words.device)
        self.clock, self.recipe, self.steps = Clock(self.device), recipe, words.steps
        batch = words.batch or recipe.train.batch_size // recipe.train.accumulation
        recompute = words.recompute_from
        self.recompute_from = recipe.train.recompute_from if recompute is None else recompute
        plain = replace(recipe.train, batch_size=batch, precision="fp32", compile=False,
                        channels_last=False, recompute_from=0, accumulation=1)  # fmt: skip
        ours = replace(plain, precision=words.precision, compile=words.compile,
                       channels_last=True, recompute_from=self.recompute_from)  # fmt: skip
        self.configs = {"ours": ours, "twin": plain}
        generator = torch.Generator().manual_seed(0)
        model = recipe.model
        size = (batch, model.image_channels, model.image_size, model.image_size)
        x_BCHW = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)
        self.x_BCHW = x_BCHW.to(self.device)
        self.noise_BN = torch.randn(batch, model.num_latents, generator=generator).to(self.device)
        self.states: dict[str, TrainState] = {}
        self.manifest: Manifest | None = None  # of the images of `load`
        self.folder = tempfile.TemporaryDirectory()
        self.writers = {who: StateWriter(Path(self.folder.name) / who, 1) for who in self.configs}

    def work(self, part: str, who: str) -> Callable[[], object]:
        """One call of what is measured."""
        config = self.configs[who]
        if part == "load":
            return self._load(who)
        if who not in self.states:
            self.states[who] = start(self.recipe.model, config, self.device)
        state = self.states[who]
        if part == "step":
            return lambda: update(state, config, self.x_BCHW, self.noise_BN)
        if part == "update":
            run = fused_update if who == "ours" else plain_update
            return lambda: run(state, config)

        if part == "checkpoint":
            writer = self.writers[who]
            writer.folder.mkdir(exist_ok=True)

            def save() -> None:
                state.save(writer)
                if who == "twin":
                    writer.wait()

            return save

        def without_gradients() -> object:
            with arithmetic(config.precision, self.device):
                if part == "evaluate":
                    return score(state.ema, self.x_BCHW, seed=0)
                return state.ema.sample(len(self.x_BCHW))

        return without_gradients

    @property
    def loaded(self) -> int:
        """Images in one call of `load`."""
        assert self.manifest
        batch = len(self.x_BCHW)
        return self.manifest.splits["train"].images // batch * batch

    def _load(self, who: str) -> Callable[[], object]:
        folder, batch, model = Path(self.folder.name), len(self.x_BCHW), self.recipe.model
        store = FileStore(folder / "store")
        if not self.manifest:
            images = max(_LOADED_BYTES // model.dims, batch) + 64  # some for the other splits
            self.manifest = made(folder, store, images, model.image_size)
        if who == "twin":
            shards = self.manifest.splits["train"].shards
            paths = [str(store.folder / shard.key) for shard in shards]
            return lambda: sum(map(len, plain(paths, 0, s3=False, batch=batch)))
        cache = BlockCache(folder=folder / "cache", limit_bytes=2**40)
        reader = ShardReader(self.manifest, store, "train", cache=cache)

        def once() -> None:
            with contextlib.closing(reader.batches(batch, seed=0)) as batches:
                for _ in range(self.loaded // batch):
                    next(batches)

        return once

    def peak_mib(self, part: str) -> float:
        """Of ours; called before there is a twin."""
        work = self.work(part, "ours")
        self.clock.forget_peak()
        for _ in range(_WARM):
            work()
        return self.clock.peak_mib()

    def seconds(self, part: str) -> list[tuple[float, float]]:
        """Of ours and of the twin, call by call; the twin's are NaN where it has no room."""
        ours, twin = self.work(part, "ours"), self._warm_twin(part)
        for _ in range(_WARM):
            ours()
        return [
            (self._timed(ours), self._timed(twin) if twin else math.nan) for _ in range(self.steps)
        ]

    def _warm_twin(self, part: str) -> Callable[[], object] | None:
        try:
            twin = self.work(part, "twin")
            for _ in range(_WARM):
                twin()
            return twin
        except torch.OutOfMemoryError:
            self.states.pop("twin", None)
        torch.cuda.empty_cache()
        return None

    def _timed(self, work: Callable[[], object]) -> float:
        for writer in self.writers.values():
            writer.wait()  # nothing is written beside what is timed
        return self.clock(work)

    def matmul_flops(self) -> float:
        """FLOP/s of a large matrix product in ours' precision: the best of several."""
        n = 8192 if self.device.type == "cuda" else 2048
        kind = torch.bfloat16 if self.configs["ours"].precision == "bf16" else torch.float32
        a, b = (torch.randn(n, n, device=self.device).to(kind) for _ in range(2))
        with rounding(self.configs["ours"].precision):
            a @ b
            return float(2 * n**3 / min(self.clock(lambda: a @ b) for _ in range(10)))

    def copy_bytes(self) -> float:
        """Bytes/s, read and written, of a large copy: the best of several."""
        a = torch.zeros(2**26, device=self.device)
        b = torch.empty_like(a)
        b.copy_(a)
        return 2 * a.numel() * 4 / min(self.clock(lambda: b.copy_(a)) for _ in range(10))


def main() -> None:
    """Measures, prints and appends a row for each part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("--batch", type=int, default=0, help="default: the recipe's, in its parts")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("fp32", "tf32", "bf16"), default="fp32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--recompute-from", type=int, help="default: the recipe's")
    parser.add_argument("--only", default=",".join(PARTS))
    words = parser.parse_args()
    torch.set_num_threads(words.threads)
    keep_freed_memory()  # for both, as the stages do
    exact_float32()
    recipe = load_recipe(words.recipe)
    measure = Measure(recipe, words)
    batch, model = len(measure.x_BCHW), summarise(recipe.model)
    parts = [part for part in PARTS if part in words.only.split(",")]
    if "step" not in parts and "update" in parts:
        measure.work("step", "ours")(), measure.work("step", "twin")()  # gradients to update by
    peaks = {part: measure.peak_mib(part) for part in parts}
    limits = {"matmul": measure.matmul_flops(), "copy": measure.copy_bytes()}
    flop = {
        "step": 3 * model.forward_flop * batch,
        "evaluate": model.forward_flop * batch,
        "sample": model.sampling_flop * batch,
    }
    for part in parts:
        pairs = measure.seconds(part)
        mine, theirs = zip(*pairs, strict=True)
        ratios = sorted(twin / ours for ours, twin in pairs)
        middle, quarter = statistics.median(mine), len(ratios) // 4
        slow, fast = sorted(mine)[-quarter - 1], sorted(mine)[quarter]
        images = measure.loaded if part == "load" else batch
        moved = {
            "update": 10 * 4 * model.parameters,  # weights, moments, averages both ways, gradients
            "load": 2 * images * recipe.model.dims,  # pixels, read and written
        }
        keep(
            "recipe",
            recipe=words.recipe,
            part=part,
            batch=batch,
            precision=words.precision,
            compile=words.compile,
            recompute_from=measure.recompute_from,
            ours_ms=f"{1e3 * middle:.1f}",
            quartiles_ms=f"{1e3 * fast:.0f}-{1e3 * slow:.0f}",
            twin_ms=f"{1e3 * statistics.median(theirs):.1f}",
            twin_over_ours=f"{statistics.median(ratios):.2f}",
            quartiles=f"{ratios[quarter]:.2f}-{ratios[-quarter - 1]:.2f}",
            images_per_second=f"{images / middle:.2f}",
            peak_mib=f"{peaks[part]:.0f}",
            gflops=f"{flop[part] / middle / 1e9:.0f}" if part in flop else "",
            matmul_gflops=f"{limits['matmul'] / 1e9:.0f}",
            gbytes_s=f"{moved[part] / middle / 1e9:.2f}" if part in moved else "",
            copy_gbytes_s=f"{limits['copy'] / 1e9:.1f}",
            steps=words.steps,
            threads=words.threads,
            device=torch.cuda.get_device_name() if words.device == "cuda" else "cpu",
            torch=torch.__version__,
        )


if __name__ == "__main__":
    main()

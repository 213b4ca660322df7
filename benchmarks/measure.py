"""A recipe's calls against their plain twin, their memory and the device's limits.

This needs PyTorch and vdvae alone: benchmarks/gpu.py runs where there is nothing else.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from published_arithmetic import negative_elbo, plain_update, train_step
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vdvae.checkpoint import StateWriter
from vdvae.config import ModelConfig, TrainConfig
from vdvae.evaluate import score
from vdvae.model import VDVAE
from vdvae.precision import allow_tf32, arithmetic
from vdvae.summary import summarise
from vdvae.training import TrainState, start, update

WARM = 3  # calls that are not counted
Pairs = list[tuple[float, float]]  # seconds of ours and of the twin, call by call


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


class Traffic(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes that operations read and write, each on its own, as uncompiled code does."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        if not func.is_view and "empty" not in func.__name__:
            touched = tree_leaves((args, kwargs, made))
            if not func._schema.returns:  # what is changed in place is read and written
                changed = zip(func._schema.arguments, args, strict=False)
                touched += tree_leaves(
                    [x for slot, x in changed if slot.alias_info and slot.alias_info.is_write]
                )
            self.bytes += sum(int(x.nbytes) for x in touched if isinstance(x, Tensor))
        return made


def out_of_memory(error: BaseException) -> bool:
    """Whether PyTorch, or a library below it, found no room on the device."""
    words = ("out of memory", "alloc_failed")
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)
    )


def matmul_flops(device: torch.device, precision: str, n: int) -> float:
    """FLOP/s of a product of n x n matrices: the best of several."""
    kind, clock = torch.bfloat16 if precision == "bf16" else torch.float32, Clock(device)
    a, b = (torch.randn(n, n, device=device).to(kind) for _ in range(2))
    with allow_tf32(precision):
        a @ b
        return float(2 * n**3 / min(clock(lambda: a @ b) for _ in range(10)))


def copy_bytes(device: torch.device, numbers: int = 2**26) -> float:
    """Bytes/s, read and written, of a large copy: the best of several."""
    a, clock = torch.zeros(numbers, device=device), Clock(device)
    b = torch.empty_like(a)
    b.copy_(a)
    return 2 * a.numel() * 4 / min(clock(lambda: b.copy_(a)) for _ in range(10))


def fused_update(state: TrainState, config: TrainConfig) -> None:
    """What `vdvae.training.update` does after the gradients."""
    state.optimiser.step()
    with torch.no_grad():
        averages: list[Tensor] = list(state.ema.parameters())
        values: list[Tensor] = list(state.model.parameters())
        torch._foreach_lerp_(averages, values, 1 - config.ema_decay)


class Measure:
    """Ours and the twin with the same images and noise.

    The twin of a step and of an evaluation is the published arithmetic; that of the other parts is
    ours as PyTorch comes: its default memory layout, nothing fused.

    Args:
        model: what is measured.
        train: its recipe's settings, with the batch, precision and the rest that ours is to have.
        device: where.
        steps: calls that are counted.
        states: of another measure of the same model and memory layout, to go on with.
        twin_precision: bf16 is autocast.
    """

    def __init__(
        self,
        model: ModelConfig,
        train: TrainConfig,
        device: torch.device,
        steps: int,
        states: dict[str, TrainState] | None = None,
        twin_precision: Literal["fp32", "bf16"] = "fp32",
    ) -> None:
        self.model, self.device, self.steps = model, device, steps
        self.clock, self.batch = Clock(device), train.batch_size
        ours = replace(train, channels_last=True, accumulation=1)
        plain = replace(ours, precision=twin_precision, compile=False, channels_last=False,
                        checkpoint_activations_from=0)  # fmt: skip
        self.configs = {"ours": ours, "twin": plain}
        generator = torch.Generator().manual_seed(0)
        size = (self.batch, model.image_channels, model.image_size, model.image_size)
        x_BCHW = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)
        self.x_BCHW = x_BCHW.to(device)
        noise_BN = torch.randn(self.batch, model.num_latents, generator=generator)
        self.noise_BN = noise_BN.to(device)
        self.states = {} if states is None else states
        self.folder = tempfile.TemporaryDirectory()
        self.writers = {who: StateWriter(Path(self.folder.name) / who, 1) for who in self.configs}

    def work(self, part: str, who: str) -> Callable[[], object]:
        """One call of what is measured."""
        config = self.configs[who]
        if who not in self.states:
            self.states[who] = start(self.model, config, self.device)
        state = self.states[who]
        if part == "step":
            run_step = update if who == "ours" else train_step
            return lambda: run_step(state, config, self.x_BCHW, self.noise_BN)
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
                if part == "evaluate" and who == "twin":
                    assert isinstance(state.ema, VDVAE)
                    return negative_elbo(state.ema, self.x_BCHW, torch.randn_like(self.noise_BN))
                if part == "evaluate":
                    return score(state.ema, self.x_BCHW, seed=0)
                return state.ema.sample(self.batch)

        return without_gradients

    def images(self, part: str) -> int:
        """In one call."""
        return self.batch

    def peak_mib(self, part: str) -> float:
        """Of ours; called before there is a twin."""
        work = self.work(part, "ours")
        self.clock.forget_peak()
        for _ in range(WARM):
            work()
        return self.clock.peak_mib()

    def traffic(self, part: str) -> int:
        """Bytes that the operations of one call of ours, not compiled, read and write."""
        work = self.work(part, "ours")
        with torch.compiler.set_stance("force_eager"), Traffic() as traffic:
            work()
        return int(traffic.bytes)

    def seconds(self, part: str) -> Pairs:
        """Of ours and of the twin, call by call; the twin's are NaN where it has no room."""
        ours, twin = self.work(part, "ours"), self._warm_twin(part)
        if not self._fits(ours):  # not beside the twin's weights
            twin = None
            self._drop_twin()
            self._fits(ours)
        return [
            (self._timed(ours), self._timed(twin) if twin else math.nan) for _ in range(self.steps)
        ]

    def _warm_twin(self, part: str) -> Callable[[], object] | None:
        if self._fits(lambda: self.work(part, "twin")()):
            return self.work(part, "twin")
        self._drop_twin()
        return None

    def _drop_twin(self) -> None:
        self.states.pop("twin", None)
        torch.cuda.empty_cache()

    def _fits(self, work: Callable[[], object]) -> bool:
        try:
            for _ in range(WARM):
                work()
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            return False
        return True

    def _timed(self, work: Callable[[], object]) -> float:
        for writer in self.writers.values():
            writer.wait()  # nothing is written beside what is timed
        return self.clock(work)

    def settings(self) -> dict[str, object]:
        """What ours is, as columns."""
        ours = self.configs["ours"]
        return {
            "batch": self.batch,
            "precision": ours.precision,
            "compile": ours.compile,
            "checkpoint_activations_from": ours.checkpoint_activations_from,
        }

    def figures(
        self, part: str, pairs: Pairs, peak_mib: float, limits: dict[str, float], moved: int | None
    ) -> dict[str, object]:
        """The columns that these calls give.

        Args:
            part: of the recipe.
            pairs: of `seconds`.
            peak_mib: of `peak_mib`.
            limits: `matmul`, FLOP/s, and `copy`, bytes/s, of the device.
            moved: bytes that one call reads and writes; None: not known.
        """
        mine, theirs = zip(*pairs, strict=True)
        ratios = sorted(twin / ours for ours, twin in pairs)
        middle, quarter = statistics.median(mine), len(ratios) // 4
        slow, fast = sorted(mine)[-quarter - 1], sorted(mine)[quarter]
        operations = flop(self.model, part) * self.images(part)
        return {
            "ours_ms": f"{1e3 * middle:.1f}",
            "quartiles_ms": f"{1e3 * fast:.0f}-{1e3 * slow:.0f}",
            "twin_ms": f"{1e3 * statistics.median(theirs):.1f}",
            "twin": f"published {self.configs['twin'].precision}"
            if part in ("step", "evaluate")
            else "plain",
            "twin_over_ours": f"{statistics.median(ratios):.2f}",
            "quartiles": f"{ratios[quarter]:.2f}-{ratios[-quarter - 1]:.2f}",
            "images_per_second": f"{self.images(part) / middle:.2f}",
            "peak_mib": f"{peak_mib:.0f}",
            "gflops": f"{operations / middle / 1e9:.0f}" if operations else "",
            "matmul_gflops": f"{limits['matmul'] / 1e9:.0f}",
            "gbytes_s": f"{moved / middle / 1e9:.2f}" if moved else "",
            "copy_gbytes_s": f"{limits['copy'] / 1e9:.1f}",
            "gflop": f"{operations / 1e9:.1f}" if operations else "",
            "gbytes": f"{moved / 1e9:.3f}" if moved else "",
            "matmul_share": f"{operations / middle / limits['matmul']:.3f}" if operations else "",
            "copy_share": f"{moved / middle / limits['copy']:.3f}" if moved else "",
        }


_summary = cache(summarise)  # seconds for the largest recipe


def flop(model: ModelConfig, part: str) -> int:
    """Of an image, two for a multiplication with addition; 0 where a part has none to speak of."""
    found = _summary(model)
    of = {
        "step": found.training_flop,
        "evaluate": found.forward_flop,
        "sample": found.sampling_flop,
    }
    return of.get(part, 0)


def machine(device: torch.device, steps: int) -> dict[str, object]:
    """The columns that say where it was measured."""
    return {
        "steps": steps,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
    }

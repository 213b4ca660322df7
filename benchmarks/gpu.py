"""What a CUDA device computes and how fast, on a machine with PyTorch alone, in under nine minutes.

    make gpu [GPU_ARGS="--minutes 8.5"]

It needs Python, torch (2.9 or newer), numpy and safetensors. First it checks the arithmetic: the
published figures, gradients against the CPU's, the five whole recipes against the oracle's figures
and in TF32 and bfloat16, recomputed activations, exact resume, samples. Then it times each recipe
and appends rows to benchmarks/recipe.csv: `step`, at the published batch (a row that says so where
the memory does not hold it) and at the largest of its halves that fits; `evaluate` and `sample`, at
the recipe's batch of evaluation. The twin is that of benchmarks/recipe.py. `gflop` and `gbytes` are
one call's arithmetic and what its operations, each on its own, read and write; their shares are of
a large matrix product in the same precision and of a large copy, both measured here. A compiled
step is set against the same bytes: there a share above 1 is what fusing saves.

What does not fit the time is left out by name, the most telling comes first. Exit code 1: a check
found something wrong. Without a CUDA device, or with --dry-run, the same code runs in sizes of
seconds, nothing is compiled, and the rows go to a temporary file.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # nothing is installed here

if sys.version_info < (3, 11):  # noqa: UP036, this Python is whichever is there
    sys.stderr.write(f"make gpu: {sys.executable} is older than Python 3.11; name another: ")
    sys.stderr.write("make gpu PYTHON=/path/to/python3\n")
    sys.exit(2)

try:
    import numpy as np
    import oracle
    import torch
    from measure import Measure, copy_bytes, machine, matmul_flops, out_of_memory
    from plain_params import recipe
    from rows import append
    from torch import Tensor

    from vdvae.config import ModelConfig, TrainConfig, UserError
    from vdvae.model import VDVAE, bits_per_dim
    from vdvae.precision import allow_tf32, autocast, check_precision, exact_float32
    from vdvae.published import from_published
    from vdvae.sampling import draw
    from vdvae.training import Progress, train
except ModuleNotFoundError as error:
    print(
        f"make gpu: {sys.executable} has no {error.name}; name a Python that has torch, numpy and "
        f"safetensors: make gpu PYTHON=/path/to/python3",
        file=sys.stderr,
    )
    sys.exit(2)

RECIPES = ("cifar10", "imagenet32", "imagenet64", "ffhq256", "ffhq1024")
PRECISIONS = ("bf16", "fp32", "tf32")  # the most telling first
_GOLDEN = ROOT / "tests/golden"
_BOUND = 5e-5  # relative, of float32's KLs and distortions (docs/numerics.md)
_MAP = 2e-5  # absolute, of the likelihood's parameters
_GRADIENT = 1e-4  # relative, of the whole gradient in float32 on two devices
# Of the bound, relative, and the least cosine of the gradients: enough to see what is broken.
_NEAR = {"tf32": (0.01, 0.99), "bf16": (0.05, 0.9)}
_COUNTED_SECONDS = 2.0  # of calls of one kind
_TINY: dict[str, Any] = {  # all kinds of blocks
    "image_size": 8,
    "encoder": "8x1,8d2,4d4,1x1",
    "decoder": "1x1,4m1,8m4",
    "width": 16,
    "widths": "",
}
_TINY_PUBLISHED = {
    "image_size": 8,
    "enc_blocks": _TINY["encoder"],
    "dec_blocks": _TINY["decoder"],
    "width": 16,
    "custom_width_str": "",
}


class OutOfTime(BaseException):
    """The time is over; no `except Exception` of a library is to take it for an error."""

    seen = False  # then it is not raised again


Found = tuple[bool, str]  # whether all is well, and in words


@dataclass
class Part:
    """Something that can be left out."""

    name: str
    run: Callable[[], Found | None]  # a check says what it found, rows are kept on the way
    seconds: float = 20.0  # below which there is no sense in beginning it


@dataclass
class Bench:
    """Where it runs, in which sizes, and what was found."""

    device: torch.device
    dry: bool
    into: Path  # the file of rows
    driver: str = ""
    checks: list[tuple[str, bool, str]] = field(default_factory=list)
    rows: list[dict[str, object]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    batches: dict[tuple[str, str], int] = field(default_factory=dict)  # that fit, of a step

    def run(self, parts: Sequence[Part], seconds_left: Callable[[], float]) -> None:
        """Runs the parts in order, and leaves out by name what does not fit the time."""
        for part in parts:
            if seconds_left() < (0 if self.dry else part.seconds):
                self.left_out.append(part.name)
                continue
            began = time.monotonic()
            try:
                found = part.run()
                self.free()
            except OutOfTime:
                OutOfTime.seen = True
                self.left_out.append(f"{part.name} (cut off)")
                continue
            except Exception as error:
                found = False, _words(error)
                self.free()
            if found is not None:
                good, words = found
                self.checks.append((part.name, good, words))
                state, seconds = "good" if good else "WRONG", time.monotonic() - began
                print(f"{part.name}: {state}: {words} ({seconds:.0f} s)", flush=True)

    def free(self) -> None:
        """Gives back what is not held."""
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()

    def to_device(self, model: VDVAE) -> VDVAE:
        """In the memory layout that training has."""
        model.to(self.device)
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return model

    # Checks: each returns whether all is well, and what it found.

    def golden(self) -> Found:
        """The published code's figures in float32, and gradients against the CPU's."""
        worst = {"terms": 0.0, "parameters": 0.0, "gradients against the CPU": 0.0}
        for case in ("zcut", "zmean"):
            kept = dict(np.load(_GOLDEN / f"small8bit_{case}.npz"))
            model, x_BCHW = _golden_model(case), _bchw(kept["images"])
            noise_BN = torch.randn(
                len(x_BCHW), model.config.num_latents, generator=torch.Generator().manual_seed(0)
            )
            _, reference = bound_and_gradient(model, x_BCHW, noise_BN)
            self.to_device(model)
            x_BCHW, noise_BN = x_BCHW.to(self.device), noise_BN.to(self.device)
            found, gradient = bound_and_gradient(model, x_BCHW, noise_BN)
            dims = model.config.dims
            distortion = torch.from_numpy(kept["distortion"]).double().flatten() * dims
            wanted = torch.cat([torch.from_numpy(kept["kl_per_block"]).double().T.flatten(),
                                distortion])  # fmt: skip
            latents = model.encode(x_BCHW, noise_BN=noise_BN)
            params_BPHW = model.likelihood_parameters(len(x_BCHW), latents).cpu()
            apart = (params_BPHW - _bchw(kept["likelihood_params"])).abs().max().item()
            for name, value in zip(
                worst, (relative(found, wanted), apart, _distance(gradient, reference)), strict=True
            ):
                worst[name] = max(worst[name], value)
        good = all(w <= bound for w, bound in zip(worst.values(), (_BOUND, _MAP, _GRADIENT),
                                                  strict=True))  # fmt: skip
        return good, ", ".join(f"{name} {value:.1e}" for name, value in worst.items())

    def whole(self, name: str) -> Found:
        """A whole recipe: the oracle's figures, other precisions, recomputed activations."""
        case, image = self._case(name)
        config = case["config"]
        weights = {key: torch.from_numpy(w) for key, w in oracle.made_weights(config).items()}
        model = from_published(config, weights, shift=case["shift"], scale=case["scale"])
        del weights
        x_BCHW = _bchw(image)
        noise_BN = torch.cat(
            [torch.from_numpy(eps).flatten(1) for eps in oracle.made_noise(config, 1)], 1
        )
        good, words = True, []

        def say(text: str, well: bool) -> None:
            nonlocal good
            good = good and well
            words.append(text if well else f"{text} (!)")

        reference = None
        if name == "cifar10":  # the others' backward passes would take a CPU too long
            _, reference = bound_and_gradient(model, x_BCHW, noise_BN)
        self.to_device(model)
        x_BCHW, noise_BN = x_BCHW.to(self.device), noise_BN.to(self.device)
        found, gradient = bound_and_gradient(model, x_BCHW, noise_BN)
        kept = torch.tensor([*case["kl_per_block"], case["distortion"]], dtype=torch.float64)
        apart = relative(found, kept)
        say(f"oracle {apart:.1e}", apart <= _BOUND)
        if reference is not None:
            apart = _distance(gradient, reference)
            say(f"gradients against the CPU {apart:.1e}", apart <= _GRADIENT)
        for precision, (most, least) in _NEAR.items():
            try:
                check_precision(precision, self.device)
            except UserError:
                words.append(f"no {precision} here")
                continue
            terms, other = bound_and_gradient(model, x_BCHW, noise_BN, precision)
            bits = float(bits_per_dim(float(terms.sum() - found.sum()), model.config.dims))
            cosine = torch.nn.functional.cosine_similarity(other, gradient, dim=0).item()
            near = abs(float(terms.sum() / found.sum()) - 1) <= most and cosine >= least
            say(f"{precision} {bits:+.5f} bits/dim, gradient's cosine {cosine:.5f}", near)
        with deterministic() as others:
            plain, again = (
                bound_and_gradient(model, x_BCHW, noise_BN, from_resolution=resolution)
                for resolution in (0, 1)
            )
        same = torch.equal(plain[0], again[0]) and torch.equal(plain[1], again[1])
        apart = _distance(again[1], plain[1])
        say("recomputed equal" if same else f"recomputed {apart:.1e} apart", same)
        return good, ", ".join(words + others)

    def resume(self) -> Found:
        """Training that was stopped half-way against training that was not, weight by weight."""
        model, config, _ = self._recipe("cifar10")
        batch = 2 if self.dry else 8
        config = replace(
            config,
            steps=4,
            batch_size=batch,
            accumulation=1,
            warmup_steps=0,
            device="cuda" if self.device.type == "cuda" else "cpu",
            skip_threshold=1e6,
            log_every=1,
            validate_every=0,
        )
        words, good = [], True
        for demanded in (True, False):
            with contextlib.ExitStack() as stack:
                others = stack.enter_context(deterministic()) if demanded else []
                whole, parted = (self._trained(model, config, stops) for stops in ((), (2,)))
            apart = _distance(parted, whole)
            same = torch.equal(parted, whole)
            good = good and (same or not demanded)
            what = "equal" if same else f"{apart:.1e} apart"
            words.append(f"deterministic algorithms {'on' if demanded else 'off'}: {what}")
            words += others
        return good, ", ".join(words)

    def _trained(self, model: ModelConfig, config: TrainConfig, stops: Sequence[int]) -> Tensor:
        def batches(seen: int) -> Iterator[Tensor]:
            size = (config.batch_size, model.image_channels, model.image_size, model.image_size)
            for step in range(seen // config.batch_size, config.steps + 2):
                generator = torch.Generator().manual_seed(step)
                yield torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)

        def stopping(progress: Progress) -> bool:
            return progress.step not in stops

        with tempfile.TemporaryDirectory() as folder:
            ended = train(model, config, batches, Path(folder), stopping)
            if ended is None:
                ended = train(model, config, batches, Path(folder), lambda progress: True)
        assert ended is not None
        weights = _flat(ended)
        self.free()
        return weights

    def sampling(self) -> Found:
        """The same seed draws the same images, again and (but for rounding) on the CPU."""
        model = _golden_model("zcut")
        here = draw(model, 16, 1.0, seed=0)
        self.to_device(model)
        there, again = (draw(model, 16, 1.0, seed=0) for _ in range(2))
        share = (here == there).double().mean().item()
        same = torch.equal(there, again)
        words = f"{100 * share:.2f}% of values are the CPU's, a second draw is "
        return same and share >= 0.99, words + ("the same" if same else "another")

    # Rows.

    def timed(self, name: str, precisions: Sequence[str], compiled: bool) -> None:
        """Rows of one recipe: all parts; compiled, the step alone, as nothing else is compiled."""
        model, config, evaluated = self._recipe(name)
        states: dict[str, Any] = {}
        for precision in precisions:
            ours = replace(config, precision=precision, compile=compiled)  # type: ignore[arg-type]
            try:
                check_precision(precision, self.device)
                self._timed(name, model, ours, evaluated, {} if compiled else states)
            except UserError as error:
                self._keep_note(name, "step", ours, str(error))
            except Exception as error:
                what = f"{'compiling ' if compiled else ''}failed: {_words(error)}"
                self._keep_note(name, "step", ours, what)
                if (
                    not compiled
                ):  # Triton, or a compiler, may be missing here; the rest may not fail
                    self.checks.append((f"rows {name} {precision}", False, what))
                states.clear()
                torch._dynamo.reset()
            states.pop("twin", None)  # its memory is not ours
            self.free()

    def _timed(
        self,
        name: str,
        model: ModelConfig,
        config: TrainConfig,
        evaluated: int,
        states: dict[str, Any],
    ) -> None:
        step = self._fitting(name, model, config, states)
        if step is None:
            return
        measures = {"step": step}
        if not config.compile:
            other = Measure(model, replace(config, batch_size=evaluated), self.device, 3, states)
            measures |= {"evaluate": other, "sample": other}
        peaks, moved = {}, {}
        for part in [*measures]:
            try:
                peaks[part] = measures[part].peak_mib(part)
                moved[part] = measures[part].traffic(part)
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                self._keep_note(name, part, measures.pop(part).configs["ours"], "out of memory")
            self.free()
        for part, measure in measures.items():
            seconds = measure.clock(measure.work(part, "ours"))
            measure.steps = 1 if self.dry else min(20, max(3, int(_COUNTED_SECONDS / seconds)))
            pairs = measure.seconds(part)
            limits = _limits(self.device, config.precision, self.dry)
            skipped = states["ours"].skipped if part == "step" else 0
            self._keep(
                recipe=name,
                part=part,
                **measure.settings(),
                **measure.figures(part, pairs, peaks[part], limits, moved[part]),
                **machine(self.device, measure.steps),
                driver=self.driver,
                note=f"{skipped} of all updates skipped" if skipped else "",
            )

    def _fitting(
        self, name: str, model: ModelConfig, config: TrainConfig, states: dict[str, Any]
    ) -> Measure | None:
        """A step at the published batch, or at the largest of its halves that fits."""
        published = config.batch_size
        batch = self.batches.get((name, config.precision), published)
        while batch:
            smaller = replace(config, batch_size=batch)
            measure = Measure(model, smaller, self.device, 3, states)
            try:
                measure.work("step", "ours")()
                measure.work("step", "ours")()  # now with the optimiser's moments, too
                self.batches[name, config.precision] = batch
                return measure
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
            del measure
            if "ours" in states:  # what was left half-way
                states["ours"].optimiser.zero_grad(set_to_none=True)
                states["ours"].optimiser.state.clear()
            self.free()
            if batch in (published, 1):
                self._keep_note(name, "step", smaller, "out of memory")
            batch //= 2
        return None

    def _keep_note(self, name: str, part: str, config: TrainConfig, note: str) -> None:
        self._keep(
            recipe=name,
            part=part,
            batch=config.batch_size,
            precision=config.precision,
            compile=config.compile,
            checkpoint_activations_from=config.checkpoint_activations_from,
            **machine(self.device, 0),
            driver=self.driver,
            note=note,
        )

    def _keep(self, **row: object) -> None:
        self.rows.append(row)
        append(self.into, row)

    # Sizes.

    def _recipe(self, name: str) -> tuple[ModelConfig, TrainConfig, int]:
        model, config, evaluated = recipe(name)
        config = replace(config, accumulation=1)
        if not self.dry:
            return model, config, evaluated
        return (
            replace(model, **_TINY),
            replace(config, batch_size=4, checkpoint_activations_from=0),
            2,
        )

    def _case(self, name: str) -> tuple[dict[str, Any], np.ndarray]:
        """A whole recipe with the oracle's figures, and its image."""
        case = json.loads(oracle.WHOLE.read_text())[name]
        if self.dry:
            case["config"] |= _TINY_PUBLISHED
        image, config = oracle.image_of(case["config"]), case["config"]
        if self.dry:
            weights = oracle.made_weights(config)
            figures = oracle.forward(config, weights, image, case["shift"], case["scale"])
            case["kl_per_block"] = figures.kl_BL[0].tolist()
            case["distortion"] = figures.distortion_B[0].item()
        return case, image


@cache
def _limits(device: torch.device, precision: str, dry: bool) -> dict[str, float]:
    numbers = 2**18 if dry else 2**26
    product = matmul_flops(device, precision, 256 if dry else 8192)
    return {"matmul": product, "copy": copy_bytes(device, numbers)}


def bound_and_gradient(
    model: VDVAE,
    x_BCHW: Tensor,
    noise_BN: Tensor,
    precision: str = "fp32",
    from_resolution: int = 0,
) -> tuple[Tensor, Tensor]:
    """KLs and distortions in nats, float64 on the CPU, and the gradient of nats/dim, flat."""
    model.checkpoint_activations_from = from_resolution
    model.zero_grad(set_to_none=True)
    with allow_tf32(precision):
        with autocast(precision, x_BCHW.device):
            elbo = model(x_BCHW, noise_BN)
        (elbo.neg_elbo_nats_B.mean() / model.config.dims).backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    terms = torch.cat([elbo.kl_nats_LB.flatten(), elbo.distortion_nats_B])
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    model.zero_grad(set_to_none=True)
    return terms.detach().double().cpu(), flat


@contextlib.contextmanager
def deterministic() -> Iterator[list[str]]:
    """Deterministic algorithms; gives what has none, which is known when the block ends."""
    without: list[str] = []
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            yield without
        names = {str(one.message).partition(" does not have a deterministic")[0] for one in told
                 if " does not have a deterministic" in str(one.message)}  # fmt: skip
        without += [f"{name} has no deterministic algorithm" for name in sorted(names)]
    finally:
        torch.use_deterministic_algorithms(False)


def relative(found: Tensor, wanted: Tensor) -> float:
    """The largest relative difference."""
    return float((found / wanted - 1).abs().max())


def _distance(found: Tensor, wanted: Tensor) -> float:
    """Of all numbers together, relative to the length of what is wanted."""
    wanted = wanted.to(found.device)
    return float((found - wanted).norm() / wanted.norm())


def _flat(model: torch.nn.Module) -> Tensor:
    return torch.cat([weight.detach().flatten().cpu() for weight in model.parameters()])


def _bchw(array_BHWC: np.ndarray) -> Tensor:
    return torch.from_numpy(array_BHWC).permute(0, 3, 1, 2).contiguous()


def _golden_model(case: str) -> VDVAE:
    kept = dict(np.load(_GOLDEN / f"small8bit_{case}.npz"))
    weights = dict(np.load(_GOLDEN / f"small8bit_{case}_weights.npz"))
    config = json.loads(str(kept["config"]))
    return from_published(config, weights, shift=float(kept["shift"]), scale=float(kept["scale"]))


def _words(error: BaseException) -> str:
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first}"[:200]


def driver_version() -> str:
    """The NVIDIA driver's; empty where nothing tells it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.partition("\n")[0].strip()


def parts_of(bench: Bench) -> list[Part]:
    """Everything, the most telling first."""
    first, *others = RECIPES[::4] if bench.dry else RECIPES
    checks = [
        Part("golden figures", bench.golden),
        Part("whole cifar10", partial(bench.whole, "cifar10")),
        Part("resume", bench.resume),
        Part("sampling", bench.sampling),
        *(Part(f"whole {r}", partial(bench.whole, r)) for r in others),
    ]
    more = () if bench.dry else ("fp32", "tf32")

    def rows(name: str, precisions: Sequence[str], compiled: bool = False) -> Part:
        how = f"{', '.join(precisions)}{', compiled' if compiled else ''}"
        run = partial(bench.timed, name, precisions, compiled)
        return Part(f"rows {name} {how}", run, 60 if compiled else 20)

    return [
        *checks,
        rows(first, PRECISIONS),
        rows(first, ["bf16"], compiled=True),
        *(rows(name, PRECISIONS) for name in others),
        *(rows(name, ["bf16"], compiled=True) for name in others),
        *(rows(name, [p], compiled=True) for p in more for name in RECIPES),
    ]


def table(bench: Bench) -> str:
    """What was found, in a screen or two; all of it is in the rows."""
    lines = [
        f"{'good ' if good else 'WRONG'}  {name}: {words}" for name, good, words in bench.checks
    ]
    heads = ("recipe", "", "batch", "step ms", "images/s", "twin/ours", "GiB", "of product",
             "of copy", "evaluate/s", "sample/s")  # fmt: skip
    cells: list[tuple[str, ...]] = [heads]
    drawn = {(r["recipe"], r["precision"], r["part"]): r for r in bench.rows if not r["compile"]}
    for row in (row for row in bench.rows if row["part"] == "step"):
        how = f"{row['precision']}{' compiled' if row['compile'] else ''}"
        start = (row["recipe"], how, row["batch"])
        if "ours_ms" not in row:
            cells.append((*map(str, start), str(row["note"])))
            continue
        of = [drawn.get((row["recipe"], row["precision"], p), {}) for p in ("evaluate", "sample")]
        rest = [found.get("images_per_second", "") for found in of]
        if row["compile"]:
            rest = ["", ""]
        figures = [row[key] for key in ("ours_ms", "images_per_second", "twin_over_ours")]
        peak = f"{float(str(row['peak_mib'])) / 1024:.1f}"
        shares = [row["matmul_share"], row["copy_share"]]
        cells.append(tuple(map(str, (*start, *figures, peak, *shares, *rest))))
    if len(cells) > 1:
        whole = [row for row in cells if len(row) == len(heads)]
        widths = [max(len(row[i]) for row in whole) for i in range(len(heads))]
        lines += ["", *("  ".join(f"{c:<{w}}" for c, w in zip(row, widths, strict=False)).rstrip()
                        for row in cells)]  # fmt: skip
    if bench.left_out:
        lines += ["", f"left out: {'; '.join(bench.left_out)}"]
    return "\n".join(lines)


@contextlib.contextmanager
def ending_after(seconds: float) -> Iterator[None]:
    """Raises OutOfTime in the block after so many seconds, and again where it was swallowed."""

    def end(*_: object) -> None:
        if not OutOfTime.seen:
            raise OutOfTime

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3), 2.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def main(arguments: list[str] | None = None) -> int:
    """Checks, measures, prints a table, and returns the exit code."""
    began = time.monotonic()
    assert __doc__
    parser = argparse.ArgumentParser(
        prog="gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=8.5)
    parser.add_argument("--dry-run", action="store_true", help="in sizes of seconds, to no row")
    words = parser.parse_args(arguments)
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 9):
        print(f"make gpu: torch is {torch.__version__}; it must be 2.9 or newer", file=sys.stderr)
        return 2
    available = torch.cuda.is_available()
    dry = words.dry_run or not available
    if not available:
        print("make gpu: no CUDA device here: the same code runs on the CPU in sizes of seconds, "
              "and its figures say nothing of a GPU", flush=True)  # fmt: skip
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic products
    exact_float32()
    into = Path(tempfile.mkdtemp(prefix="vdvae-gpu-")) if dry else Path(__file__).parent
    bench = Bench(
        torch.device("cuda" if available else "cpu"),
        dry,
        into / "recipe.csv",
        driver_version() if available else "",
    )
    ends = began + (60 * words.minutes if words.minutes > 0 else math.inf)
    stance = torch.compiler.set_stance("force_eager") if dry else contextlib.nullcontext()
    with contextlib.suppress(OutOfTime), stance, ending_after(ends - time.monotonic()):
        bench.run(parts_of(bench), lambda: ends - time.monotonic())
    print()
    print(table(bench))
    print(f"\n{time.monotonic() - began:.0f} s; rows: {bench.into}")
    return int(not all(good for _, good, _ in bench.checks))


if __name__ == "__main__":
    sys.exit(main())

"""The stage `train`: from shards to a model, through any number of interruptions.

The training state lives outside DVC's outputs, which DVC deletes before a stage runs: in
`runs/<recipe>-<digest>/`, where the digest covers everything that determines the weights. To
resume, run the same command again.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.dvc import code_of, lock_entries
from pipeline.params import Places, Recipe, load_recipe, project_root
from pipeline.pictures import draw_progress, picture_interval, save_grid, shown
from pipeline.shards import Manifest, ShardReader
from pipeline.stages import check_manifest, main
from pipeline.stages.scoring import scores_of
from pipeline.storage import open_store
from pipeline.system import machine
from pipeline.system.events import tell
from pipeline.system.exits import CANCELLED
from pipeline.system.process import StopRequest, alone
from pipeline.system.progress import Bar
from pipeline.tracking import BufferedRun
from vdvae.files import atomic_write, sha256_of

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.stages.scoring import Batch
    from vdvae.distributed import Ranks
    from vdvae.doctor import Point
    from vdvae.model import VDVAE
    from vdvae.training import Progress

# Whatever else of `train` determines the weights may not change between stop and go on.
_MAY_CHANGE = (
    *("steps", "device", "max_skipped_in_a_row"),
    *("checkpoint_every", "checkpoint_minutes", "keep_checkpoints"),
    *("compile", "channels_last", "accumulation", "recompute_from"),  # these move the rounding
)
_BAR = Bar("training", "steps")
_SAMPLES, _LADDERS = 8, 4  # most columns and rows in pictures of training


def train(name: str) -> None:
    """Trains a recipe; exits with 143 where a signal ended it after a checkpoint."""
    stop = StopRequest(begun=False)
    recipe = load_recipe(name)

    from vdvae.distributed import ranks
    from vdvae.training import check_machine, device_of

    device = device_of(recipe.train)  # before any data are read: a wrong machine is told at once
    check_machine(recipe.train, device)
    places = Places.from_env()
    manifest = check_manifest(recipe, Manifest.load(places.manifest(name)))
    folder = places.runs / f"{name}-{run_digest(recipe, manifest)}"
    lock = folder.with_suffix(".lock")
    # In a grid several experiments may share a training; only a person is told to wait.
    patience = None if project_root() == Path.cwd() else math.inf
    with ranks(device) as group, alone(lock, patience) if group.first else nullcontext():
        if group.first and _recorded_by_dvc(recipe, folder):
            # Finished and taken over: `dvc repro -f` starts afresh. Renamed first, so that a kill
            # leaves all of it or nothing.
            finished = folder.with_suffix(".finished")
            shutil.rmtree(finished, ignore_errors=True)
            folder.rename(finished)
            shutil.rmtree(finished)
        group.wait()  # until the folder is as it is to be
        part = _Part(recipe, places, manifest, folder, group, stop)
        if group.first:
            _lead(part, str(device))
        else:
            _follow(part)


@dataclass(frozen=True)
class _Part:
    """What every rank of a run knows and does."""

    recipe: Recipe
    places: Places
    manifest: Manifest
    folder: Path
    group: Ranks
    stop: StopRequest

    def reader(self, split: str) -> ShardReader:
        return ShardReader(self.manifest, open_store(self.places.store_url), split)

    def train(
        self,
        on_progress: Callable[[Progress], bool],
        look: Callable[[int, VDVAE], None] | None = None,
    ) -> VDVAE:
        """Trains this rank's part; where a signal asks for it, ends after a checkpoint."""
        from vdvae.precision import exact_float32
        from vdvae.training import train

        exact_float32()
        recipe, group = self.recipe, self.group
        reader, validation = self.reader("train"), self.reader("validation")

        def batches(start: int) -> Iterator[Tensor]:
            size, seed = recipe.train.batch_size, recipe.train.seed
            return reader.batches(size, seed, start, group.rank, group.size)

        def validate(model: VDVAE) -> float:
            watched = partial(self.until_stopped, validation.images)
            scores = scores_of(group, model, validation, recipe.evaluate, watched=watched)
            return group.shared(scores.summary()["bits_per_dim"] if scores else 0.0)

        model = train(
            recipe.model,
            recipe.train,
            batches,
            self.folder / "checkpoints",
            on_progress,
            validate,
            look,
            group,
        )
        if model is None:
            if group.first:
                print("stopped after a checkpoint; run the same command again to go on", flush=True)
            raise SystemExit(CANCELLED)  # which the run takes for KILLED
        return model

    def until_stopped(self, images: int, batches: Iterator[Batch]) -> Iterator[Batch]:
        """This rank's batches of so many images, until any rank is asked to stop.

        Raises:
            Stopped: then, on every rank.
        """
        from vdvae.training import Stopped

        # The same number of questions on every rank, with a batch or without.
        for _ in range(math.ceil(images / (self.group.size * self.recipe.evaluate.batch_size))):
            if not self.group.all_agree(not self.stop.asked):
                raise Stopped
            batch = next(batches, None)
            if batch is not None:
                yield batch
        yield from batches  # none: a reader counts as we do

    def goes_on(self) -> bool:
        """Whether no signal asked this rank to stop; from the first call on they wait for this."""
        self.stop.begun = True
        return not self.stop.asked

    def check_stop(self) -> None:
        """Raises Stopped where a signal has asked for it."""
        from vdvae.training import Stopped

        if self.stop.asked:
            raise Stopped


def _follow(part: _Part) -> None:
    part.train(lambda progress: part.goes_on())


def _lead(part: _Part, device: str) -> None:
    """Trains, tells the world of it, and writes what the stage makes."""
    from pipeline import tracking
    from vdvae.checkpoint import save

    recipe, places, folder = part.recipe, part.places, part.folder
    fresh = not (folder / "checkpoints").exists()
    opened = tracking.open_run(
        recipe.name,
        places,
        folder / "run.json",
        params=recipe.flat(),
        tags={"device": device, "ranks": str(part.group.size), **machine.facts(device)},
        manifest=part.manifest,
        fresh=fresh,
    )
    usage = machine.Usage(device, opened.last_values(), part.group.size)
    every = picture_interval(recipe.train.steps, recipe.train.log_every)
    history: list[Point] = []
    told = 0  # points of it

    def look(step: int, model: VDVAE) -> None:
        if step % every == 0 or step == recipe.train.steps:
            draw_progress(
                model,
                originals,
                run.files / "pictures" / "training",
                step,
                columns=min(recipe.sample.n, _SAMPLES),
                seed=recipe.train.seed,
                between=part.check_stop,
            )

    def on_progress(progress: Progress) -> bool:
        nonlocal history, told
        history = progress.history
        points = [tracking.curve_point(point) for point in history[told:]]  # after a kill, all
        told = len(history)
        if progress.point is not None:
            points[-1] |= usage.sample()
        run.log_points(points)
        for finding in progress.findings:
            text = f"step {progress.step}: {finding.text}"
            run.set_tags({f"doctor.{finding.kind}": text})
            print(f"doctor: {text}", flush=True)
        if progress.saved:
            run.sync()
        if progress.point is not None:
            _tell(progress, progress.point, recipe.train.batch_size)
        return part.goes_on()

    with BufferedRun(opened, places.runs) as run:
        count = min(recipe.sample.reconstructions, _LADDERS)
        _, originals = next(part.reader("validation").scan(count))
        if fresh:
            first = next(part.reader("train").batches(recipe.train.batch_size, recipe.train.seed))
            save_grid(run.files / "pictures" / "data.png", shown(first[: recipe.sample.n]))
        for sheet in sorted(places.results(recipe.name).glob("contact_*.png")):
            run.log_artifact(sheet, "pictures")
        # Of a training that goes on to more steps: it counts as finished no longer.
        (folder / "curves.csv").unlink(missing_ok=True)
        model = part.train(on_progress, look)
        results = places.results(recipe.name)
        curves = _curves_csv(history)
        atomic_write(folder / "curves.csv", curves)
        save(model, places.model(recipe.name))
        atomic_write(results / "curves.csv", curves)
        atomic_write(results / "run.json", (folder / "run.json").read_bytes())
        run.log_artifact(results / "curves.csv")


def run_digest(recipe: Recipe, manifest: Manifest) -> str:
    """What the weights depend on, in 12 hex digits: settings, data and the code that computes.

    The code is what dvc.yaml lists, so that what DVC takes for new is new here, too.
    """
    train = {k: v for k, v in recipe.train.to_dict().items() if k not in _MAY_CHANGE}
    facts = {
        "model": recipe.model.to_dict(),
        "train": train,
        "validation_seed": recipe.evaluate.seed,
        "manifest": manifest.digest,
        "code": {path: sha256_of(Path(path)) for path in code_of("train")},
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


def _recorded_by_dvc(recipe: Recipe, folder: Path) -> bool:
    """Whether dvc.lock holds this very run's curves: then DVC has taken over what it made.

    A stage that was killed between its end and DVC's record gives its outputs once more instead,
    and one that is to train for more steps than it did goes on.
    """
    curves, lock = folder / "curves.csv", Path("dvc.lock")
    if not curves.exists() or not lock.exists():
        return False
    name = recipe.name
    stage = lock_entries(name).get(f"train@{name}", {})
    recorded = stage.get("params", {}).get("params.yaml", {}).get(f"recipes.{name}.train", {})
    if recipe.train.steps > recorded.get("steps", 0):
        return False
    md5 = hashlib.md5(curves.read_bytes(), usedforsecurity=False).hexdigest()
    return any(out.get("md5") == md5 for out in stage.get("outs", []))


def _curves_csv(history: list[Point]) -> str:
    columns = list(dict.fromkeys(key for point in history for key in point))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({**point, "step": int(point["step"])} for point in history)
    return text.getvalue()


def _tell(progress: Progress, point: Point, batch_size: int) -> None:
    """Tells where the run stands: an event, or one line an interval, or a bar on a terminal."""
    left = progress.steps - progress.step
    seconds = round(left * batch_size / max(point["images_per_second"], 1e-9))
    figures = (
        f"bits/dim {point['bits_per_dim']:.3f}  "
        f"rate {point['rate_bits_per_dim']:.3f}  "
        f"distortion {point['distortion_bits_per_dim']:.3f}  "
        f"grad {point['gradient_norm']:.3g}  skipped {point['skipped']}  "
        f"{point['images_per_second']:.0f} img/s"
    )
    text = f"step {progress.step}/{progress.steps}  {figures}  eta {timedelta(seconds=seconds)}"
    if "validation_bits_per_dim" in point:
        text += f"  validation {point['validation_bits_per_dim']:.4f}"
    facts = {"step": progress.step, "steps": progress.steps, "seconds_left": seconds, **point}
    if tell("progress", text=text, **facts):
        return
    _BAR.show(progress.step, progress.steps, text, figures)


if __name__ == "__main__":
    main(train, in_ranks=True, computes=True)

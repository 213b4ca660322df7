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
from pipeline.pictures import draw_progress, picture_interval, save_grid, to_NHWC
from pipeline.shards import Manifest, ShardReader
from pipeline.stages import check_manifest, main
from pipeline.stages.scoring import scores_of
from pipeline.storage import open_store
from pipeline.system import machine
from pipeline.system.events import tell
from pipeline.system.exits import CANCELLED
from pipeline.system.process import StopRequest, exclusive_lock
from pipeline.system.progress import Bar
from pipeline.tracking import BufferedRun
from vdvae.files import atomic_write, sha256_of

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.stages.scoring import Batch
    from vdvae.distributed import Ranks
    from vdvae.doctor import Point
    from vdvae.models import ImageModel
    from vdvae.training import Progress

_BAR = Bar("training", "steps")
_SAMPLES, _LADDERS = 8, 4  # most columns and rows in pictures of training


def train(name: str) -> None:
    """Trains a recipe; exits with 143 where a signal ended it after a checkpoint."""
    stop = StopRequest(begun=False)
    recipe = load_recipe(name)

    from vdvae.distributed import ranks
    from vdvae.training import check_machine, device_of

    device = device_of(recipe.train)  # before any data are read: a wrong machine fails at once
    check_machine(recipe.train, device)
    places = Places.from_env()
    manifest = check_manifest(recipe, Manifest.load(places.manifest(name)))
    folder = _state_folder(recipe, places, run_digest(recipe, manifest))
    lock = folder.with_suffix(".lock")
    # Experiments of a grid may share a training, so there this waits for as long as it takes.
    wait_seconds = None if project_root() == Path.cwd() else math.inf
    with (
        ranks(device) as group,
        exclusive_lock(lock, wait_seconds) if group.is_main else nullcontext(),
    ):
        if group.is_main and _recorded_by_dvc(recipe, folder):
            # `dvc repro -f` of a finished training starts afresh. The folder is renamed first, so
            # that after a kill it is there completely or not at all.
            finished = folder.with_suffix(".finished")
            shutil.rmtree(finished, ignore_errors=True)
            folder.rename(finished)
            shutil.rmtree(finished)
        group.barrier()  # the other ranks read the folder after that
        trainer = _RankTrainer(recipe, places, manifest, folder, group, stop)
        if group.is_main:
            _train_main_rank(trainer, str(device))
        else:
            trainer.train(lambda progress: trainer.goes_on())


@dataclass(frozen=True)
class _RankTrainer:
    """The training of a recipe as every rank runs it."""

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
        on_log: Callable[[int, ImageModel], None] | None = None,
    ) -> ImageModel:
        """Trains this rank's share; see `vdvae.training.train`.

        Raises:
            SystemExit: with 143, if a signal ended it after a checkpoint.
        """
        from vdvae.precision import exact_float32
        from vdvae.training import train

        exact_float32()
        recipe, group = self.recipe, self.group
        reader, validation = self.reader("train"), self.reader("validation")

        def batches(start: int) -> Iterator[Tensor]:
            size, seed = recipe.train.batch_size, recipe.train.seed
            return reader.batches(size, seed, start, group.rank, group.size)

        def validate(model: ImageModel) -> float:
            watched = partial(self.until_stopped, validation.images)
            scores = scores_of(group, model, validation, recipe.evaluate, watched=watched)
            return group.broadcast(scores.summary()["bits_per_dim"] if scores else 0.0)

        model = train(
            recipe.model,
            recipe.train,
            batches,
            self.folder / "checkpoints",
            on_progress,
            validate,
            on_log,
            group,
        )
        if model is None:
            if group.is_main:
                print("stopped after a checkpoint; run the same command again to go on", flush=True)
            raise SystemExit(CANCELLED)  # marks the MLflow run KILLED
        return model

    def until_stopped(self, images: int, batches: Iterator[Batch]) -> Iterator[Batch]:
        """This rank's batches of a split, until any rank is asked to stop.

        Args:
            images: of the split, over all ranks.
            batches: of this rank.

        Raises:
            Stopped: any rank is asked to stop; on every rank.
        """
        from vdvae.training import Stopped

        # The same number of exchanges on every rank, with a batch or without.
        for _ in range(math.ceil(images / (self.group.size * self.recipe.evaluate.batch_size))):
            if not self.group.all_true(not self.stop.asked):
                raise Stopped
            batch = next(batches, None)
            if batch is not None:
                yield batch
        yield from batches  # lets the reader end; there are no more batches

    def goes_on(self) -> bool:
        """Whether no signal has asked this rank to stop.

        From the first call on, signals wait for this question instead of ending the process.
        """
        self.stop.begun = True
        return not self.stop.asked

    def check_stop(self) -> None:
        """Raises Stopped if a signal has asked this rank to stop."""
        from vdvae.training import Stopped

        if self.stop.asked:
            raise Stopped


def _train_main_rank(trainer: _RankTrainer, device: str) -> None:
    """Trains, logs progress to MLflow and the terminal, and writes the stage's outputs."""
    from pipeline import tracking
    from vdvae.checkpoint import save

    recipe, places, folder = trainer.recipe, trainer.places, trainer.folder
    fresh = not (folder / "checkpoints").exists()
    opened = tracking.open_run(
        recipe.name,
        places,
        folder / "run.json",
        params=recipe.flat(),
        tags={"device": device, "ranks": str(trainer.group.size), **machine.facts(device)},
        manifest=trainer.manifest,
        fresh=fresh,
    )
    usage = machine.Usage(device, opened.last_values(), trainer.group.size)
    every = picture_interval(recipe.train.steps, recipe.train.log_every)
    history: list[Point] = []
    logged = 0  # points of it

    def on_log(step: int, model: ImageModel) -> None:
        if step % every == 0 or step == recipe.train.steps:
            draw_progress(
                model,
                originals,
                run.files / "pictures" / "training",
                step,
                columns=min(recipe.sample.n, _SAMPLES),
                seed=recipe.train.seed,
                between=trainer.check_stop,
            )

    def on_progress(progress: Progress) -> bool:
        nonlocal history, logged
        history = progress.history
        points = [tracking.curve_point(point) for point in history[logged:]]  # resumed: all
        logged = len(history)
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
            _report(progress, progress.point, recipe.train.batch_size)
        return trainer.goes_on()

    with BufferedRun(opened, places.runs) as run:
        count = min(recipe.sample.reconstructions, _LADDERS)
        _, originals = next(trainer.reader("validation").scan(count))
        if fresh:
            first = next(
                trainer.reader("train").batches(recipe.train.batch_size, recipe.train.seed)
            )
            save_grid(run.files / "pictures" / "data.png", to_NHWC(first[: recipe.sample.n]))
        for sheet in sorted(places.results(recipe.name).glob("contact_*.png")):
            run.log_artifact(sheet, "pictures")
        # A finished training that goes on to more steps is no longer finished.
        (folder / "curves.csv").unlink(missing_ok=True)
        model = trainer.train(on_progress, on_log)
        results = places.results(recipe.name)
        curves = _curves_csv(history)
        atomic_write(folder / "curves.csv", curves)
        save(model, places.model(recipe.name))
        atomic_write(results / "curves.csv", curves)
        atomic_write(results / "run.json", (folder / "run.json").read_bytes())
        run.log_artifact(results / "curves.csv")


def run_digest(recipe: Recipe, manifest: Manifest) -> str:
    """A digest of what determines the weights: settings, data and code.

    The code is what dvc.yaml lists, so DVC and this digest agree on what has changed.

    Returns:
        12 hex digits.
    """
    facts = {
        "model": recipe.model.fixed(),
        "train": recipe.train.fixed(),
        "validation_seed": recipe.evaluate.seed,
        "manifest": manifest.digest,
        "code": {path: sha256_of(Path(path)) for path in code_of("train")},
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


def _state_folder(recipe: Recipe, places: Places, digest: str) -> Path:
    """Where the training's state is. One that went beyond the recipe's steps is left as it is: its
    weights are those of more steps."""
    folder = places.runs / f"{recipe.name}-{digest}"
    trained = [int(path.stem[5:]) for path in folder.glob("checkpoints/step-*.json")]
    if max(trained, default=0) > recipe.train.steps:
        return places.runs / f"{recipe.name}-{recipe.train.steps}steps-{digest}"
    return folder


def _recorded_by_dvc(recipe: Recipe, folder: Path) -> bool:
    """Whether dvc.lock lists this run's curves.csv: then DVC has its outputs.

    If not, the stage was killed before DVC recorded it, and writes its outputs again. A recipe with
    more steps than the recorded ones goes on training.
    """
    curves = folder / "curves.csv"
    if not curves.exists():
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


def _report(progress: Progress, point: Point, batch_size: int) -> None:
    """Reports progress: an event, or one line per interval, or a bar on a terminal."""
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

"""What Prefect shows of a run: how far it is, figures, pictures, links, and its lines."""

from __future__ import annotations

import contextlib
import re
import shlex
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from prefect import get_run_logger
from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)

from pipeline.params import Places
from pipeline.registry.receipt import registration
from vdvae.files import read_json

_REMEDY = "run it again"
_LINE_SECONDS = 1.0  # of the trainer's lines, one in this time goes to the log
_LINES_A_SECOND = 100  # of all others
_ARTIFACT_SECONDS = 2.0  # between two updates of the progress


class Throttle:
    """Passes lines on at a pace that a log can bear; the newest progress is never lost."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._said = self._window = -1e9
        self._count = self._left_out = 0
        self._held: str | None = None
        self._mutex = threading.Lock()

    def __call__(self, line: str) -> None:
        """Takes a line that a stage printed."""
        with self._mutex:
            now = time.monotonic()
            if now - self._window >= 1:
                self._flush()
                self._window, self._count = now, 0
            self._count += 1
            if self._count > _LINES_A_SECOND:
                self._left_out += 1
                return
            if self._held:
                self._say(self._held)
                self._held = None
            self._say(line)

    def progress(self, line: str) -> None:
        """Takes how far a stage is, in words."""
        with self._mutex:
            now = time.monotonic()
            if now - self._said < _LINE_SECONDS:
                self._held = line
                return
            self._said, self._held = now, None
            self._say(line)

    def flush(self) -> None:
        """Says what was held back."""
        with self._mutex:
            self._flush()

    def _flush(self) -> None:
        if self._held:
            self._say(self._held)
        if self._left_out:
            self._say(f"({self._left_out} more lines in that second)")
        self._held, self._left_out = None, 0


@dataclass
class Page:
    """What the run's page shows: how far it is, then figures, pictures and links.

    A page that cannot be written is a warning, never the end of a run.
    """

    recipe: str
    stages: tuple[str, ...]
    places: Places
    _ended: dict[str, str] = field(default_factory=dict)
    _artifacts: dict[str, uuid.UUID] = field(default_factory=dict)
    _updated: float = -1e9
    _training: float = 0.0

    def __post_init__(self) -> None:
        self._progress()

    def progress(self, facts: Mapping[str, Any]) -> None:
        """Takes how far training is, as the stage tells it."""
        now, last = time.monotonic(), facts["step"] == facts["steps"]
        self._training = facts["step"] / facts["steps"]
        if now - self._updated < _ARTIFACT_SECONDS and not last:
            return
        self._updated = now
        left = timedelta(seconds=facts["seconds_left"])
        rows = {
            "step": f"{facts['step']} of {facts['steps']}",
            "bits/dim": f"{facts['bits_per_dim']:.3f}",
            "rate, bits/dim": f"{facts['rate_bits_per_dim']:.3f}",
            "distortion, bits/dim": f"{facts['distortion_bits_per_dim']:.3f}",
            "images/s": f"{facts['images_per_second']:.0f}",
            "time left": str(left),
        }
        # The artifacts tab shows the first line alone.
        first = f"step {rows['step']}, {rows['bits/dim']} bits/dim, {left} left"
        table = "| | |\n|---|---|\n" + "\n".join(f"| {k} | {v} |" for k, v in rows.items())
        self._show("training", 100 * self._training, f"{first}\n\n{table}")
        self._progress()

    def end(self, stage: str, how: str) -> None:
        """Takes the end of a stage, and shows what it made."""
        self._ended[stage] = how
        self._progress()
        shown = {
            "train": self._link_run,
            "evaluate": self._table,
            "sample": self._pictures,
            "register": self._link_version,
        }
        if how == "done" and stage in shown:
            with _no_matter_what():
                shown[stage]()

    def _progress(self) -> None:
        # Training is nearly all of the time; the rest share a fifth.
        share = {name: 80.0 if name == "train" else 20 / (len(self.stages) - 1)
                 for name in self.stages}  # fmt: skip
        done = sum(share[name] for name, how in self._ended.items() if how == "done")
        if "train" not in self._ended:
            done += share["train"] * self._training
        stages = dict.fromkeys(self.stages, "") | self._ended
        waiting = [name for name, how in stages.items() if not how]
        if waiting and "failed" not in self._ended.values():
            stages[waiting[0]] = "running"
        # The artifacts tab shows the first line alone.
        first = ", ".join(f"{name} {how}" for name, how in stages.items() if how)
        rows = "\n".join(f"| {name} | {how} |" for name, how in stages.items())
        self._show("progress", done, f"{first}\n\n| stage | |\n|---|---|\n{rows}")

    def _show(self, key: str, percent: float, description: str) -> None:
        with _no_matter_what():
            if key in self._artifacts:
                update_progress_artifact(self._artifacts[key], percent, description)
            else:
                made = create_progress_artifact(percent, self._key(key), description)
                assert isinstance(made, uuid.UUID)
                self._artifacts[key] = made

    def _key(self, key: str) -> str:
        return f"{re.sub('[^a-z0-9]+', '-', self.recipe.lower())}-{key}"

    def _table(self) -> None:
        metrics = read_json(self.places.results(self.recipe) / "metrics.json", _REMEDY)
        rows = [
            {"split": split} | {name: round(value, 4) for name, value in figures.items()}
            for split, figures in metrics.items()
        ]
        create_table_artifact(rows, self._key("metrics"), "bits/dim by split")

    def _pictures(self) -> None:
        from pipeline.pictures import data_uri

        for name, title in (
            ("samples", "Samples"),
            ("reconstructions", "Reconstructions: latents up to each resolution, then the image"),
        ):
            uri = data_uri(self.places.results(self.recipe) / f"{name}.png")
            create_markdown_artifact(f"## {title}\n\n![{name}]({uri})\n", self._key(name), title)

    def _link_run(self) -> None:
        from pipeline.tracking import find_run

        found = find_run(self.places, self.places.results(self.recipe) / "run.json")
        if found:
            address = "#/experiments/{}/runs/{}".format(*found)
            self._link("mlflow-run", address, f"MLflow run {found[1]}")

    def _link_version(self) -> None:
        registered = registration(self.places, self.recipe)
        if registered is None:
            return
        name, version = registered["name"], registered["version"]
        text = f"{name} version {version}"
        if registered["alias"]:
            text += f", {registered['alias']}"
        self._link("registered-version", f"#/models/{name}/versions/{version}", text)

    def _link(self, key: str, address: str, text: str) -> None:
        from pipeline.tracking import is_server, without_credentials

        server = without_credentials(self.places.tracking_uri)
        if is_server(server):
            link = f"{server.rstrip('/')}/{address}"
            create_link_artifact(link, text, self._key(key), text)
        else:
            how = f"mlflow ui --backend-store-uri {shlex.quote(server)} --host 127.0.0.1"
            create_markdown_artifact(f"{text}\n\n    {how}\n", self._key(key), text)


@contextlib.contextmanager
def _no_matter_what() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        get_run_logger().warning("the page is not up to date: %s: %s", type(error).__name__, error)

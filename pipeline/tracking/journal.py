"""What MLflow is to get is on disk first: no step waits for a server, and no outage loses a point.

Each opening of a run has a folder, $VDVAE_RUNS/mlflow/<run id>-<random>/: `journal.jsonl` holds
what is to be logged, a line each, and `files/` what is to be uploaded, each under its own path.
What was delivered is removed. A folder whose process is gone is delivered by whoever opens a run
next; `Run` logs nothing twice.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

from pipeline.settings import Settings
from pipeline.system.exits import innermost
from pipeline.system.process import try_lock
from vdvae.files import atomic_write

if TYPE_CHECKING:
    from pipeline.tracking.run import Run, Status

_LAST_SECONDS = 10.0  # what the end of a stage waits for MLflow; a cancelled one has little more


class Journal:
    """The folder of one opening of a run, locked for as long as this object is open."""

    def __init__(self, folder: Path, file: IO[str]) -> None:
        self.folder = folder
        self.files = folder / "files"  # what lies below it is uploaded under its path from here
        self.run_id = folder.name.partition("-")[0]
        self._file = file
        self._mutex = threading.Lock()
        self._delivered = 0  # bytes of the file

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def append(self, kind: str, value: Any) -> None:
        """Adds a line; kinds are the ones that `deliver` knows."""
        with self._mutex:
            self._file.write(json.dumps({kind: value}) + "\n")
            self._file.flush()

    def sync(self) -> None:
        """Returns when the disk has it: then it survives a loss of power, too."""
        os.fsync(self._file.fileno())

    def deliver(self, run: Run) -> None:
        """Logs all that is here and was not delivered yet, and removes it.

        Raises:
            UserError: MLflow fails; what was not delivered stays for the next call.
        """
        with self._mutex:
            lines = self._path.read_bytes()[self._delivered :].rpartition(b"\n")[0]
        entries = list(_whole(lines))
        points = [value for kind, value in entries if kind == "point"]
        if points:
            run.log_points(points)
        for kind, log in (("metrics", run.log_metrics), ("tags", run.set_tags)):
            merged = {key: v for of, value in entries if of == kind for key, v in value.items()}
            if merged:
                log(merged)
        for path in self._waiting_files():
            folder = path.relative_to(self.files).parent
            run.log_artifact(path, "" if folder == Path() else str(folder))
            path.unlink()
        for kind, value in entries:
            if kind == "end":
                run.finish(**value)
        with self._mutex:
            self._delivered += len(lines) + 1 if lines else 0
            if self._delivered == self._path.stat().st_size:
                self._file.truncate(0)
                self._delivered = 0

    def waiting(self) -> int:
        """How many lines and files are not delivered yet."""
        with self._mutex:
            lines = self._path.read_bytes()[self._delivered :].count(b"\n")
        return lines + len(self._waiting_files())

    def remove(self) -> None:
        """Removes the folder with whatever is in it."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self._file.close()

    @property
    def _path(self) -> Path:
        return Path(self._file.name)

    def _waiting_files(self) -> list[Path]:
        return sorted(
            path
            for path in self.files.rglob("*")
            if path.is_file() and not path.name.startswith(".")  # being written
        )


def new_journal(runs: Path, run_id: str) -> Journal:
    """A journal of our own.

    Args:
        runs: the folder of VDVAE_RUNS.
        run_id: MLflow's.
    """
    folder = runs / "mlflow" / f"{run_id}-{uuid.uuid4().hex[:8]}"
    folder.mkdir(parents=True)
    file = try_lock(folder / "journal.jsonl")
    assert file is not None, "nobody else knows its name"
    return Journal(folder, file)


def left_journals(runs: Path, run_id: str = "*") -> Iterator[Journal]:
    """What processes left that have ended, of one run or of all; each locked while it is used."""
    for path in sorted((runs / "mlflow").glob(f"{run_id}-*/journal.jsonl")):
        try:
            file = try_lock(path)
        except OSError:  # its process has just removed it, or it is another user's
            continue
        if file is not None:
            with Journal(path.parent, file) as journal:
                yield journal


def _whole(lines: bytes) -> Iterator[tuple[str, Any]]:
    for line in lines.splitlines():
        with suppress(ValueError, StopIteration):  # cut short by a loss of power
            yield next(iter(json.loads(line).items()))


class BufferedRun:
    """A run whose server may go away: what is logged goes to disk, and a thread delivers it.

    As a context it ends by itself, as `Run` does. Where MLflow does not answer at the end, that is
    said in one line, and what it lacks waits for the next stage: the stage itself has not failed.
    """

    def __init__(self, run: Run, runs: Path) -> None:
        """Takes over an open run.

        Args:
            run: is finished by us.
            runs: the folder of VDVAE_RUNS.

        Raises:
            UserError: VDVAE_TRACKING_SECONDS is no number from 0.01 to 3600.
        """
        self._seconds = Settings().tracking_seconds
        # Trying again is ours. For the whole process: the thread cannot set them for itself alone.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        self._run = run
        self._journal = new_journal(runs, run.run_id)
        self._ending = threading.Event()
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._deliver, name="mlflow", daemon=True)
        self._thread.start()

    def __enter__(self) -> BufferedRun:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if kind is None:
            self._finish("FINISHED")
        else:
            try:
                self._finish("FAILED" if issubclass(kind, Exception) else "KILLED")
            except OSError:  # a full disk, say; what ended the block matters more
                self._run.close()

    @property
    def files(self) -> Path:
        """Files that appear below this folder are uploaded under their path in it."""
        return self._journal.files

    def log_points(self, points: Sequence[Mapping[str, float]]) -> None:
        """As `Run.log_points`, later."""
        for point in points:
            self._journal.append("point", point)

    def log_metrics(self, metrics: Mapping[str, float]) -> None:
        """As `Run.log_metrics`, later."""
        self._journal.append("metrics", metrics)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """As `Run.set_tags`, later."""
        self._journal.append("tags", tags)

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """As `Run.log_artifact`, later, of the file as it is now."""
        atomic_write(self.files / folder / path.name, path.read_bytes())

    def sync(self) -> None:
        """Returns when the disk has all that was logged."""
        self._journal.sync()

    def _deliver(self) -> None:
        last = False
        while not last:
            last = self._ending.wait(self._seconds)
            try:
                self._journal.deliver(self._run)
                failure, self._failure = self._failure, None
                if failure is not None:
                    print(f"MLflow at {self._run.address} answers again", flush=True)
            except Exception as error:  # whatever it is, it is no reason to stop training
                if self._failure is None and not last:
                    print(
                        f"{self._trouble(error)}; what it is to get waits in "
                        f"{self._journal.folder} and is tried again every {self._seconds:g} s",
                        flush=True,
                    )
                self._failure = error

    def _finish(self, status: Status) -> None:
        end = {"status": status, "milliseconds": round(time.time() * 1000)}
        self._journal.append("end", end)
        self._journal.sync()
        self._ending.set()
        self._thread.join(_LAST_SECONDS)
        if not self._thread.is_alive() and self._failure is None:
            self._journal.remove()
            return
        reason = self._failure or TimeoutError(f"not done after {_LAST_SECONDS:g} s")
        print(
            f"{self._trouble(reason)}; {self._journal.waiting()} lines and files wait in "
            f"{self._journal.folder}: the next stage delivers them, or, when it answers, "
            f"'python -m pipeline.tracking'",
            flush=True,
        )
        self._journal.__exit__()
        self._run.close()

    def _trouble(self, error: Exception) -> str:
        return f"MLflow at {self._run.address} fails ({innermost(error)})"

"""Runs the cells that are missing, each in a clone by a process of its own, some side by side."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean

from pipeline.flows import experiment
from pipeline.flows.overrides import Overrides
from pipeline.git import git
from pipeline.params import Places
from pipeline.studies.declaration import Cell
from pipeline.system.exits import CANCELLED, UNAVAILABLE, ServerUnavailable
from pipeline.system.process import end_with_parent
from vdvae.config import UserError

# What cells depend on besides their settings must be committed: a cell works in a clone.
_SOURCES = ("vdvae", "pipeline", "dvc.yaml", "params.yaml")
_LAST_LINES = 5
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def missing(cells: Sequence[Cell]) -> list[Cell]:
    """The cells that have no experiment yet, each once: equal settings are one cell."""
    wanted = {cell.experiment: cell for cell in cells}
    return [cell for name, cell in wanted.items() if experiment.find(name) is None]


def run_cells(cells: Sequence[Cell], jobs: int, note: str, tell: Callable[[str], None]) -> None:
    """Runs what is missing of the cells, `jobs` at once; the same again goes on after any kill.

    Args:
        cells: of a study.
        jobs: cells at once on this machine.
        note: of their experiments.
        tell: gets a sentence for each cell that begins or ends.

    Raises:
        UserError: uncommitted changes, or cells that failed; the others are done.
        SystemExit: 143 after a signal; what trains has written a checkpoint.
    """
    todo = missing(cells)
    if not todo:
        return
    changed = git("status", "--porcelain", "--untracked-files=no", "--", *_SOURCES)
    if changed:
        raise UserError(
            f"{changed.split(maxsplit=1)[1].splitlines()[0]}: differs from the commit, which is "
            f"what cells are made from; commit it, then run the same command again"
        )
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    try:
        failed = asyncio.run(_run_all(todo, jobs, note, experiment.head(), tell))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if failed:
        kind = ServerUnavailable if {*failed.values()} == {UNAVAILABLE} else UserError
        raise kind(f"{len(failed)} of {len(todo)} cells failed: {'; '.join(failed)}")


async def _run_all(
    todo: Sequence[Cell],
    jobs: int,
    note: str,
    commit: str,
    tell: Callable[[str], None],
) -> dict[str, int]:
    """Runs cells; returns the exit codes of those that failed, by what is to be said of them."""
    slots = asyncio.Semaphore(jobs)
    failed: dict[str, int] = {}
    running: set[asyncio.subprocess.Process] = set()
    seconds: list[float] = []  # of each cell that has ended

    def stop() -> None:
        for number in _SIGNALS:
            loop.remove_signal_handler(number)
        task.cancel()
        for child in running:  # what trains writes a checkpoint
            with contextlib.suppress(ProcessLookupError):
                child.terminate()

    async def run(number: int, cell: Cell) -> None:
        async with slots:
            began = time.monotonic()
            name = f"{cell.variant}, seed {cell.seed} ({number} of {len(todo)})"
            log = Places.from_env().runs / "studies" / f"{cell.experiment}.log"
            tell(f"{name}: begins; its output: {log}")
            code = await _run(cell, note, commit, log, running)
            seconds.append(time.monotonic() - began)
            if code:
                last = " / ".join(log.read_text(errors="replace").splitlines()[-_LAST_LINES:])
                failed[f"{name}, exit code {code}: {last[-500:]}"] = code
            left = fmean(seconds) * (len(todo) - len(seconds)) / jobs  # as if none had begun
            tell(f"{name}: {'failed' if code else 'done'}; about {left / 60:.0f} min to go")

    loop = asyncio.get_running_loop()
    task = asyncio.ensure_future(asyncio.gather(*(run(n, c) for n, c in enumerate(todo, 1))))
    for number in _SIGNALS:
        loop.add_signal_handler(number, stop)
    try:
        await task
    except asyncio.CancelledError:
        for child in running:
            await child.wait()
        raise SystemExit(CANCELLED) from None
    return failed


async def _run(
    cell: Cell,
    note: str,
    commit: str,
    log: Path,
    running: set[asyncio.subprocess.Process],
) -> int:
    """One cell; returns the exit code."""
    chosen = {**cell.overrides.model_dump(), "note": cell.overrides.note or note[:500]}
    words = json.dumps([cell.recipe.name, chosen, cell.experiment, cell.settings, commit])
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as file:
        child = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            __name__,
            words,
            stdout=file,
            stderr=file,
            # A cell is a flow run of its own, not that of the study's form.
            env={k: v for k, v in os.environ.items() if not k.startswith("PREFECT__")},
            start_new_session=True,  # Ctrl-C is ours to pass on, once
            preexec_fn=partial(end_with_parent, os.getpid()),
        )
    running.add(child)
    code = await child.wait()
    running.discard(child)
    return code


if __name__ == "__main__":
    from pipeline.flows.run_recipe import main
    from pipeline.system.exits import as_a_command

    with as_a_command():
        recipe, chosen, name, settings, commit = json.loads(sys.argv[1])
        if experiment.head() != commit:  # the name is that of the other commit's code
            raise UserError("a commit was made meanwhile; run the same command again")
        main(recipe, Overrides(**chosen), name, settings)

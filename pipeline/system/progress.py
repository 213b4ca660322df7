"""How far long work is: a bar with rate and time left on a terminal, lines elsewhere."""

from __future__ import annotations

import atexit
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, Self, TypeVar

T = TypeVar("T")


class Bar:
    """Of one piece of work; it appears at the first `show`, and its rate is that from there on."""

    def __init__(self, what: str, unit: str, every: float = 0) -> None:
        """Shows nothing yet.

        Args:
            what: is done, in a word or two.
            unit: of what is counted; "bytes" are shown in MB.
            every: seconds between two lines, where there is no terminal.
        """
        self._what, self._unit, self._every = what, unit, every
        self._spoke = time.monotonic()
        self._bar: Any = None  # rich's Progress

    def show(
        self, done: float, total: float | None = None, line: str = "", figures: str = ""
    ) -> None:
        """Moves the bar, or prints the line; an empty line is none.

        Args:
            done: units.
            total: None: it is not known.
            line: says it all, where there is no terminal.
            figures: stand behind the bar.
        """
        if sys.stdout.isatty():
            if self._bar is None:
                self._begin(done)
            self._bar.update(0, completed=done, total=total, figures=figures)
            if done == total:
                self.close()
        elif line and time.monotonic() - self._spoke >= self._every:
            self._spoke = time.monotonic()
            print(line, flush=True)

    def _begin(self, done: float) -> None:
        from rich import progress

        class Rate(progress.ProgressColumn):
            def render(self, task: progress.Task) -> str:
                return f"{task.speed:.3g}/s" if task.speed else ""

        amount: tuple[str | progress.ProgressColumn, ...] = (
            (progress.DownloadColumn(), progress.TransferSpeedColumn())
            if self._unit == "bytes"
            else (progress.MofNCompleteColumn(), self._unit, Rate())
        )
        self._bar = progress.Progress(
            "{task.description}",
            progress.BarColumn(20),
            *amount,
            progress.TimeRemainingColumn(),
            "{task.fields[figures]}",
            refresh_per_second=4,
            speed_estimate_period=600,  # between two points of training there may be minutes
        )
        self._bar.add_task(self._what, completed=done, total=None, figures="")
        self._bar.start()
        atexit.register(self.close)  # the cursor comes back, however the program ends

    def close(self) -> None:
        """Leaves the bar as it is."""
        if self._bar is not None:
            self._bar.stop()
            atexit.unregister(self.close)
            self._bar = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def counted(
    batches: Iterable[tuple[list[str], T]], what: str, total: int, ranks: int = 1
) -> Iterator[tuple[list[str], T]]:
    """Batches of named images as they come, with a bar of how many of `total` are done.

    Args:
        batches: this rank's.
        what: is done with them.
        total: images of all ranks.
        ranks: that do it at once, each with as many.
    """
    done = 0
    with Bar(what, "images") as bar:
        for names, rest in batches:
            yield names, rest
            done = min(done + ranks * len(names), total)
            bar.show(done, total)

"""Other programs, run to their end."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence


class CommandFailed(RuntimeError):
    """A program failed; the message is its last line, `output` all that it printed."""

    def __init__(self, output: str) -> None:
        self.output = output.strip()
        lines = self.output.splitlines() or ["it said nothing"]
        super().__init__(lines[-1].removeprefix("ERROR: "))


def output_of(command: Sequence[str]) -> str:
    """What a program prints, without white space at both ends.

    Raises:
        CommandFailed: it fails.
        OSError: it is not there.
    """
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise CommandFailed(f"{done.stdout}\n{done.stderr}")
    return done.stdout.strip()

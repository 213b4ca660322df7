"""The dated rows of the benchmarks: what was measured, on which machine, at which commit."""

from __future__ import annotations

import csv
import datetime
import io
import subprocess
from pathlib import Path

from pipeline.system.machine import processor
from vdvae.files import atomic_write


def keep(benchmark: str, **figures: object) -> None:
    """Appends a row to <benchmark>.csv beside this file, and prints it."""
    append(Path(__file__).with_name(f"{benchmark}.csv"), figures)


def append(path: Path, figures: dict[str, object]) -> None:
    """Appends a row to a file, and prints it.

    A column that the file lacks is added behind its others; earlier rows have nothing in it.
    """
    row = {
        "date": datetime.date.today().isoformat(),
        **figures,
        "machine": processor(),
        "commit": _commit(),
    }
    columns, rows = read(path)
    columns += [name for name in row if name not in columns]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows([*rows, row])
    atomic_write(path, text.getvalue())
    print("  ".join(f"{key} {value}" for key, value in row.items() if value != ""), flush=True)


def read(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """The columns and rows of a file; none where there is no such file."""
    if not path.exists():
        return [], []
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        return list(reader.fieldnames or ()), list(reader)


def _commit() -> str:
    """The short name of the commit, `+` behind it where files differ; empty without git."""

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", *words], capture_output=True, text=True, check=True, cwd=Path(__file__).parent
        )
        return done.stdout.strip()

    try:
        # Earlier rows of the same measurements are no change of what is measured.
        changed = git(
            "status", "--porcelain", "--untracked-files=no", "--", ":(top,exclude)benchmarks/*.csv"
        )
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return ""

"""The dated rows of the benchmarks: what was measured, on which machine, at which commit."""

from __future__ import annotations

import csv
import datetime
import subprocess
from pathlib import Path

from pipeline.machine import processor


def keep(benchmark: str, **figures: object) -> None:
    """Appends a row to <benchmark>.csv beside this file, and prints it."""
    path = Path(__file__).with_name(f"{benchmark}.csv")
    row = {
        "date": datetime.date.today().isoformat(),
        **figures,
        "machine": processor(),
        "commit": _commit(),
    }
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(row), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)
    print("  ".join(f"{key} {value}" for key, value in row.items()))


def _commit() -> str:
    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    # Earlier rows of the same measurements are no change of what is measured.
    changed = git(
        "status", "--porcelain", "--untracked-files=no", "--", ":(top,exclude)benchmarks/*.csv"
    )
    dirty = "+" if changed else ""
    return git("rev-parse", "--short", "HEAD") + dirty

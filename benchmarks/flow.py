"""Times a run from the form against a bare `dvc repro` of the same settings, and keeps the row.

    python benchmarks/flow.py [--pairs 3] [--steps 200]

Both rebuild the five stages of a narrow digits recipe in projects of their own, in turn, with a new
seed each time. A run from the form has a clone, Prefect's server and worker, the page, and the
experiment on top.
"""

from __future__ import annotations

import argparse
import datetime
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

from conftest import Project, narrow
from rows import keep
from services_project import Services

from pipeline.flows.overrides import shrink


def form(services: Services, seed: int, steps: int) -> tuple[float, float]:
    """Seconds from the click to the first line of training, and to the run's end."""
    clicked = time.time()
    status, run = services.begin("digits", preset="smoke", seed=seed, steps=steps)
    assert status in (200, 201), run
    assert services.wait(run["id"], {"COMPLETED", "FAILED", "CRASHED"}) == "COMPLETED"
    body = {"logs": {"flow_run_id": {"any_": [run["id"]]}}, "sort": "TIMESTAMP_ASC"}
    first = next(  # among the first 200 lines, which the server gives at once
        line["timestamp"]
        for line in services.api("/logs/filter", body)[1]
        if re.match(r"step \d+/", line["message"])
    )
    ended = services.api(f"/flow_runs/{run['id']}")[1]["end_time"]
    return tuple(  # type: ignore[return-value]
        datetime.datetime.fromisoformat(moment).timestamp() - clicked for moment in (first, ended)
    )


def bare(project: Project, seed: int, steps: int) -> float:
    """Seconds of `dvc repro` with what the form's run sets."""

    def change(params: dict[str, Any]) -> None:
        shrink(params["recipes"]["digits"])
        params["recipes"]["digits"]["train"] |= {"seed": seed, "steps": steps, "device": "cpu"}

    project.set(change)
    began = time.perf_counter()
    project.repro()
    return time.perf_counter() - began


def main() -> None:
    """Measures, prints and appends one row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    words = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        project = Project(Path(folder) / "bare")
        project.set(narrow)
        services = Services(Path(folder) / "form")
        services.services("start")
        try:
            measured = []
            for seed in range(words.pairs + 1):
                clicks = form(services, seed, words.steps)
                measured.append((*clicks, bare(project, seed, words.steps)))
                print(
                    "first step {:.1f} s, form {:.1f} s, dvc repro {:.1f} s".format(*measured[-1])
                )
        finally:
            services.services("stop")
    measured = measured[1:]  # the first made databases and read every file from the disk
    first, whole, alone = (statistics.median(column) for column in zip(*measured, strict=True))
    keep(
        "flow",
        click_to_first_step_s=f"{first:.1f}",
        form_s=f"{whole:.1f}",
        dvc_repro_s=f"{alone:.1f}",
        overhead_s=f"{statistics.median(w - a for _, w, a in measured):.1f}",
        steps=words.steps,
        pairs=len(measured),
    )


if __name__ == "__main__":
    main()

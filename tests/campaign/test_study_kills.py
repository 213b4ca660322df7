"""A study killed in the middle of its cells, then stopped by SIGTERM, gives the same table."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import Project, narrow
from test_studies import STUDY, VDVAE

WORDS = ("study", "wide", "--jobs", "2")
SET = {"train.steps": 120, "train.log_every": 10, "train.checkpoint_every": 10}


def project_with_study(folder: Path) -> Project:
    project = Project(folder)
    project.set(narrow)
    project.set(lambda params: params.update(studies={"wide": {**STUDY, "set": SET}}))
    project.run("git", "commit", "-qam", "study")
    return project


def figures(project: Project) -> list[dict[str, Any]]:
    """What of the table does not depend on when and where it was made."""
    table = json.loads((project.folder / "results/studies/wide/table.json").read_text())
    assert table["verdict"] in ("supported", "not supported", "undecided")
    return [table["comparisons"], *([c["variant"], c["seed"], c["test"]] for c in table["cells"])]


def wait_for_training(project: Project, cells: int) -> None:
    """Until so many cells have printed a step, or the test's own time is over."""
    logs = project.folder / "runs/studies"
    while sum(bool(re.search(r"step \d+/", p.read_text())) for p in logs.glob("*.log")) < cells:
        time.sleep(0.1)


@pytest.mark.integration
@pytest.mark.timeout(900)
def test_a_study_killed_and_stopped_gives_the_table_of_one_left_alone(tmp_path: Path) -> None:
    alone = project_with_study(tmp_path / "alone")
    alone.run(*VDVAE, *WORDS)

    project = project_with_study(tmp_path / "project")
    for number, cells in ((signal.SIGKILL, 2), (signal.SIGTERM, 3)):
        child = project.start(*VDVAE, *WORDS)
        wait_for_training(project, cells)
        os.kill(child.pid, number)
        child.communicate()
        assert child.returncode == (-9 if number == signal.SIGKILL else 143)
        assert not (project.folder / "results/studies/wide/table.json").exists()
    printed = project.run(*VDVAE, *WORDS)
    logs = [path.read_text() for path in (project.folder / "runs/studies").glob("*.log")]
    assert any("resuming at step" in log for log in logs), printed
    assert figures(project) == figures(alone)
    assert project.run("git", "status", "--porcelain", "-uno") == ""

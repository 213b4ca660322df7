"""Several seeds of a recipe: killed and begun again, their mean and spread."""

from __future__ import annotations

import json
import os
import signal
import statistics
import sys
from pathlib import Path

import pytest
from conftest import Project, narrow
from test_studies import VDVAE
from test_study_kills import wait_for_training


@pytest.mark.integration
def test_seeds_killed_in_between_go_on_and_are_read_from_their_experiments(tmp_path: Path) -> None:
    project = Project(tmp_path / "project")
    project.set(narrow)
    project.run("git", "commit", "-qam", "narrow")
    words = ("seeds", "digits", "--seeds", "0,1", "--steps", "150", "--no-sample", "--no-register")
    child = project.start(*VDVAE, *words)
    wait_for_training(project, 2)  # one after the other: the first seed's run is done
    os.kill(child.pid, signal.SIGKILL)
    child.communicate()
    result = project.folder / "results/digits/seeds.json"
    assert not result.exists()

    said = project.run(*VDVAE, *words)
    assert "seed 1 (1 of 1): begins" in said  # the first seed's experiment is there
    first = result.read_bytes()
    found = json.loads(first)
    assert [row["seed"] for row in found["seeds"]] == [0, 1]
    assert [row["training_precision"] for row in found["seeds"]] == ["fp32", "fp32"]
    assert len({row["mlflow_run_id"] for row in found["seeds"]} - {None}) == 2
    shown = project.run(sys.executable, "-m", "dvc", "exp", "show", "--json")
    for split in ("validation", "test"):
        bits = [row[split]["bits_per_dim"] for row in found["seeds"]]
        assert bits[0] != bits[1]
        assert all(str(value) in shown for value in bits)
        mean, spread = statistics.mean(bits), abs(bits[0] - bits[1]) / 2**0.5
        assert found[split]["bits_per_dim"] == pytest.approx({"mean": mean, "stdev": spread})
        assert (
            f"{split}, mean ± spread over n = 2 seeds, bits/dim: {mean:.4f} ± {spread:.4f}" in said
        )
    assert project.run("git", "status", "--porcelain") == ""

    again = project.run(*VDVAE, *words)
    assert "begins" not in again
    assert result.read_bytes() == first

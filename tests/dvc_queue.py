"""A grid of experiments through DVC's own queue, and what must be there afterwards."""

from __future__ import annotations

import json
import subprocess
from collections import Counter
from typing import Any

from conftest import Project

from pipeline.system.process import try_lock


def run_grid(project: Project, *words: str, jobs: int = 2) -> None:
    """Queues `dvc exp run WORDS` and works the queue off; returns when its workers are gone."""
    project.run("dvc", "exp", "run", "--queue", *words)
    child = project.start("dvc", "queue", "start", "-j", str(jobs))
    try:
        child.communicate(timeout=600)  # its workers keep the pipe: it ends with the last of them
    except subprocess.TimeoutExpired:
        project.run("dvc", "queue", "stop", "--kill")
        raise


def experiments(project: Project) -> dict[str, dict[str, Any]]:
    """What `dvc exp show` says of each experiment on the current commit, by its name."""
    [_, baseline] = json.loads(project.run("dvc", "exp", "show", "--json"))  # workspace, commit
    found = {each["name"]: each["revs"][0] for each in baseline["experiments"] or ()}
    assert all(each["executor"] is None or each["executor"]["state"] != "failed"
               for each in baseline["experiments"] or ()), found  # fmt: skip
    assert None not in found, found
    return {name: each["data"] for name, each in found.items()}


def check_everything_arrived(project: Project, seeds: list[int]) -> None:
    """Every seed once in `dvc exp show`, MLflow and the registry; no lock held, no copy left."""
    from mlflow import MlflowClient

    shown = experiments(project)
    params = [each["params"]["params.yaml"]["data"]["recipes"] for each in shown.values()]
    assert sorted(each["digits"]["train"]["seed"] for each in params) == seeds
    figures = [each["metrics"]["results/digits/metrics.json"]["data"] for each in shown.values()]
    client = MlflowClient(f"sqlite:///{project.folder}/mlruns/mlflow.db")
    experiment = client.get_experiment_by_name("vdvae")
    assert experiment is not None
    runs = list(client.search_runs([experiment.experiment_id]))
    assert sorted(int(run.data.params["train.seed"]) for run in runs) == seeds
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert Counter(run.data.metrics["test/bits_per_dim"] for run in runs) == Counter(
        each["test"]["bits_per_dim"] for each in figures
    )
    versions = client.search_model_versions("name = 'vdvae-digits'")
    assert {version.run_id for version in versions} == {run.info.run_id for run in runs}
    assert len(versions) == len(seeds)
    assert client.get_model_version_by_alias("vdvae-digits", "champion")
    for lock in [*project.folder.glob("runs/**/*.lock"), *project.folder.glob("mlruns/*.lock")]:
        held = try_lock(lock)
        assert held is not None, lock
        held.close()
    for lock in (project.folder / ".dvc/tmp").rglob("rwlock"):
        assert not any(json.loads(lock.read_text()).values()), lock
    assert not list((project.folder / ".dvc/tmp/exps").rglob("params.yaml"))
    assert not (project.folder / "runs/flows").exists()

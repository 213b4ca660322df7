"""The services for real: Prefect, MLflow and a worker on free ports, started, used and stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, Project
from services_project import Services

from pipeline.services import folder
from pipeline.services.commands import stop

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

DEPLOYED = {
    *yaml.safe_load((ROOT / "params.yaml").read_text())["recipes"],
    "evaluate-champion-digits",
    "study",
}


def test_stop_waits_for_a_supervisor_that_has_just_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder.FOLDER.mkdir()
    begins = """
import os, time
from pipeline.system.process import try_lock
from pipeline.services import folder
lock = try_lock(folder.LOCK)
print("holds the lock", flush=True)
time.sleep(1)
folder.write_record({"supervisor": os.getpid()})
time.sleep(60)
"""
    child = subprocess.Popen(
        [sys.executable, "-c", begins],
        env={**os.environ, folder.MARK: str(folder.FOLDER.resolve())},
        stdout=subprocess.PIPE,
    )
    assert child.stdout is not None
    with child.stdout:
        child.stdout.readline()
        stop()
    assert child.wait(timeout=10) == -signal.SIGTERM


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    made = Services(tmp_path_factory.mktemp("services") / "project")
    made.services("start")
    yield made
    made.services("stop")
    assert made.marked() == []


def test_every_recipe_is_deployed_and_a_second_start_changes_nothing(services: Services) -> None:
    status, deployments = services.api("/deployments/filter", {})
    assert status == 200
    assert {each["name"] for each in deployments} == DEPLOYED
    before = sorted(services.marked())
    output = services.services("start")
    assert f"127.0.0.1:{services.prefect_port}" in output
    assert sorted(services.marked()) == before
    with urllib.request.urlopen(f"http://127.0.0.1:{services.mlflow_port}/health") as answer:
        assert answer.status == 200


def test_the_nightly_check_is_on_the_schedule(services: Services) -> None:
    body = {"deployments": {"name": {"any_": ["evaluate-champion-digits"]}}}
    while not (runs := services.api("/flow_runs/filter", body)[1]):
        time.sleep(1)
    assert "SCHEDULED" in {run["state"]["type"] for run in runs}  # at 3 one of them runs


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("preset", "tiny"), ("preset", 1), ("data", "/etc"), ("data", "http://x/y"),
        ("data", "s3://user:secret@bucket/x"), ("data", 3), ("steps", -1), ("steps", "many"),
        ("steps", 10**9), ("batch_size", -1), ("batch_size", 10**6), ("learning_rate", -0.1),
        ("learning_rate", 5), ("learning_rate", "fast"), ("seed", -2), ("seed", 2**31),
        ("precision", "fp8"), ("gpus", 9), ("evaluate", "perhaps"), ("note", "x" * 100_000),
    ],
)  # fmt: skip
def test_bad_form_values_are_refused_by_name(services: Services, field: str, value: Any) -> None:
    status, answer = services.begin("digits", **{field: value})
    assert status in (409, 422), answer
    assert field in json.dumps(answer)


def test_a_run_from_the_form_arrives_as_an_experiment_and_a_version(services: Services) -> None:
    status, run = services.begin("digits", preset="smoke", seed=11, note="from a test")
    assert status in (200, 201), run
    state = services.wait(run["id"], {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"})
    assert state == "COMPLETED", services.logs(run["id"])
    keys = {
        artifact["key"]
        for artifact in services.api(
            "/artifacts/filter", {"artifacts": {"flow_run_id": {"any_": [run["id"]]}}}
        )[1]
    }
    assert any("sample" in str(key) for key in keys), keys
    shown = services.run(sys.executable, "-m", "dvc", "exp", "show", "--csv")
    assert "seed11" in shown
    assert services.run("git", "status", "--porcelain") == ""

    from mlflow import MlflowClient

    client = MlflowClient(f"http://127.0.0.1:{services.mlflow_port}")
    (version,) = client.search_model_versions("name = 'vdvae-digits'")
    assert client.get_run(version.run_id).info.status == "FINISHED"


def test_cancelled_in_the_ui_it_leaves_nothing_and_goes_on_when_started_again(
    services: Services,
) -> None:
    def begin() -> str:
        status, run = services.begin("digits", preset="smoke", seed=12, steps=4000)
        assert status in (200, 201), run
        return str(run["id"])

    first = begin()
    services.wait(first, {"RUNNING"})
    services.wait_for_log(first, "bits/dim")
    services.api(f"/flow_runs/{first}/set_state", {"state": {"type": "CANCELLING"}})
    # A page stays at the first end that it hears of, and an automation may have acted on it.
    ended = services.wait(first, {"CANCELLED", "CRASHED", "FAILED", "COMPLETED"})
    assert ended == "CANCELLED"
    assert "Crash" not in services.logs(first)
    while services.marked("pipeline.stages"):
        time.sleep(0.2)
    second = begin()
    services.wait_for_log(second, "resuming at step")
    services.api(f"/flow_runs/{second}/set_state", {"state": {"type": "CANCELLING"}})
    services.wait(second, {"CANCELLED"})


def test_the_example_of_an_automation_is_accepted(services: Services) -> None:
    example = yaml.safe_load((ROOT / "docs/automation-failed-run.yaml").read_text())
    status, made = services.api("/automations/", example)
    assert status == 201, made
    _, found = services.api(f"/automations/{made['id']}")
    assert set(found["trigger"]["expect"]) == {
        "prefect.flow-run.Failed",
        "prefect.flow-run.Crashed",
    }
    assert found["actions"][0]["subject"] == example["actions"][0]["subject"]


def test_what_cannot_start_is_named(services: Services, tmp_path: Path) -> None:
    other = Project(tmp_path / "project")
    (other.folder / "prefect.yaml").write_bytes((ROOT / "prefect.yaml").read_bytes())
    words = (sys.executable, "-m", "pipeline.services", "start")
    output = other.run(*words, code=2, VDVAE_PREFECT_PORT=str(services.prefect_port))
    assert output.startswith("error: ")
    assert str(services.prefect_port) in output
    output = other.run(*words, code=2, VDVAE_HOST="0.0.0.0")
    assert "VDVAE_AUTH" in output
    output = other.run(*words, code=2, VDVAE_ORIGIN="https://me:hunter2@example.org/x.git")
    assert "VDVAE_ORIGIN" in output
    assert "hunter2" not in output
    assert not list((other.folder / "services").rglob("*.db"))  # nothing was begun


def test_a_killed_supervisor_is_replaced_and_nothing_is_lost(services: Services) -> None:
    (supervisor,) = services.marked("supervise")
    os.kill(supervisor, signal.SIGKILL)
    services.services("start")
    assert supervisor not in services.marked()
    assert len(services.api("/deployments/filter", {})[1]) == len(DEPLOYED)

"""The flow as a whole: in a clone of its own, on its page, cancelled, failed and scored again."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from conftest import ROOT, Project, narrow
from prefect.client.orchestration import get_client
from prefect.exceptions import ParameterTypeError
from prefect.flows import load_flow_from_entrypoint
from prefect.testing.utilities import prefect_test_harness
from prefect.utilities.callables import parameter_schema
from test_overrides import BAD

from pipeline.flows import run_recipe as flows
from pipeline.flows.champion import evaluate_champion
from pipeline.flows.overrides import Overrides
from pipeline.flows.repro import StageFailed, run_stage
from pipeline.params import load_recipe
from pipeline.services.settings import Settings
from pipeline.system import machine, process
from pipeline.system.launch import ranks_here
from vdvae.config import UserError

pytestmark = pytest.mark.integration
VDVAE = (sys.executable, "-c", "from pipeline.cli.main import main; main()")


@pytest.fixture(scope="module")
def server() -> Iterator[None]:
    with prefect_test_harness(server_startup_timeout=120):
        yield


@contextmanager
def inside(project: Project) -> Iterator[None]:
    """As if this process had been started in the project; what it starts in turn is forked."""
    before, folder, python = dict(os.environ), Path.cwd(), sys.executable
    for name in list(os.environ):
        if name.startswith(("VDVAE_", "MLFLOW_", "GIT_")):
            del os.environ[name]
    settings = ("PATH", "OMP_NUM_THREADS", "GIT_")
    os.environ.update({k: v for k, v in project.environment.items() if k.startswith(settings)})
    os.chdir(project.folder)
    sys.executable = str(Path(os.environ["WARM_PYTHON"], "python"))
    try:
        yield
    finally:
        sys.executable = python
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(before)


def made(folder: Path, **train: int) -> Project:
    project = Project(folder)

    def change(params: dict[str, Any]) -> None:
        narrow(params)
        params["recipes"]["digits"]["train"] |= train

    project.set(change)
    project.run("git", "commit", "-qam", "narrow")
    return project


def newest_run() -> Any:
    with get_client(sync_client=True) as client:
        return client.read_flow_runs(limit=1, sort="START_TIME_DESC")[0]


def artifacts(flow_run: Any) -> dict[str, Any]:
    with get_client(sync_client=True) as client:
        found = client.request("POST", "/artifacts/filter", json={}).json()
    return {a["key"]: a for a in found if a["flow_run_id"] == str(flow_run.id)}


@pytest.fixture(scope="module")
def finished(server: None, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A project, one run of it with settings of its own, and that run's page."""
    project = made(tmp_path_factory.mktemp("finished") / "project")
    with inside(project):
        flows.main("digits", Overrides(preset="smoke", steps=6, seed=3, note="a try"))
    run = newest_run()
    return project, run, artifacts(run)


def test_a_run_comes_back_as_an_experiment_with_its_page(finished: Any) -> None:
    project, run, page = finished
    assert run.name == "digits-smoke-seed3"
    assert run.state.is_completed()
    assert project.run("git", "status", "--porcelain") == ""
    assert not (project.folder / "results").exists()
    assert not list((project.folder / "runs/flows").iterdir())

    assert page["digits-progress"]["data"] == 100
    assert page["digits-training"]["data"] == 100
    for words in ("step | 6 of 6", "bits/dim", "rate", "distortion", "images/s", "time left"):
        assert words in page["digits-training"]["description"]
    table = json.loads(page["digits-metrics"]["data"])
    assert [row["split"] for row in table] == ["validation", "test"]
    assert "vdvae-digits version 1, champion" in page["digits-registered-version"]["data"]
    assert "MLflow run" in page["digits-mlflow-run"]["data"]
    assert [run.data.tags["prefect_flow_run"] for run in _mlflow_runs(project)] == [str(run.id)]

    shown = project.run(sys.executable, "-m", "dvc", "exp", "show", "--json")
    assert '"bits_per_dim_se"' in shown
    (name,) = set(re.findall(r"digits-smoke-seed3-[0-9a-f]{8}", shown))
    project.run(sys.executable, "-m", "dvc", "exp", "apply", name)
    params = yaml.safe_load((project.folder / "params.yaml").read_text())
    train = params["recipes"]["digits"]["train"]
    assert (train["seed"], train["steps"], train["device"]) == (3, 6, "cpu")
    results = project.folder / "results/digits"
    metrics = json.loads((results / "metrics.json").read_text())
    assert table[1] == {"split": "test"} | {k: round(v, 4) for k, v in metrics["test"].items()}
    for picture in ("samples", "reconstructions"):
        (embedded,) = re.findall(r"base64,([^)]+)\)", page[f"digits-{picture}"]["data"])
        assert base64.b64decode(embedded) == (results / f"{picture}.png").read_bytes()


def test_the_champion_is_scored_again_and_a_changed_figure_is_loud(finished: Any) -> None:
    project, _, _ = finished
    with inside(project):
        state = evaluate_champion("digits", return_state=True)
        assert state.is_completed(), state.message
        (figures,) = (project.folder / "mlruns").rglob("evaluation/per_image.csv")
        text = figures.read_text()
        row = next(line for line in text.splitlines() if line.startswith("test,"))
        split, key, bits, *rest = row.split(",")
        changed = ",".join([split, key, repr(float(bits) + 2e-4), *rest])
        figures.write_text(text.replace(row, changed))
        state = evaluate_champion("digits", return_state=True)
        figures.write_text(text)
        assert state.is_failed()
        assert key in state.message
        assert "more than 0.0001 apart" in state.message

        state = evaluate_champion("cifar10", return_state=True)
        assert "no version of vdvae-cifar10 has the alias 'champion'" in state.message


def test_bad_form_values_are_refused_by_name() -> None:
    count = 0
    for field, values in BAD.items():
        for value in values:
            with pytest.raises(ParameterTypeError, match=field):
                flows.run_recipe.validate_parameters({field: value})
            count += 1
    assert count >= 20


def test_each_form_names_the_recipes_own_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `prefect deploy` makes a deployment's form of, and what a run of it is called."""
    monkeypatch.chdir(ROOT)
    deployments = yaml.safe_load(Path("prefect.yaml").read_text())["deployments"]
    entries = {each["name"]: each["entrypoint"] for each in deployments}
    for recipe in yaml.safe_load(Path("params.yaml").read_text())["recipes"]:
        flow = load_flow_from_entrypoint(entries[recipe], use_placeholder_flow=False)
        assert flow.name == "run-recipe"
        form = parameter_schema(flow).properties
        train = load_recipe(recipe).train
        said = {name: field["description"] for name, field in form.items()}
        assert f"the recipe's own, {train.steps:,} (smoke: 30)" in said["steps"]
        for field in ("batch_size", "learning_rate", "seed", "precision"):
            assert f"the recipe's own, {getattr(train, field)}" in said[field]
        smoke = " (smoke: cpu)" if train.device != "cpu" else ""
        assert f"the recipe's own, device {train.device}{smoke}" in said["gpus"]
        assert "the recipe's own, the source " in said["data"]
        defaults = {name: field.get("default") for name, field in form.items()}
        assert defaults == Overrides().model_dump()
        assert not any(field.keys() & {"anyOf", "$ref", "allOf"} for field in form.values())


def test_a_run_is_named_by_the_seed_that_it_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for seed, named in ((5, 5), (-1, load_recipe("digits").train.seed)):
        run = SimpleNamespace(parameters={"preset": "full", "seed": seed})
        told = SimpleNamespace(flow_run=run, deployment=SimpleNamespace(name="digits"))
        monkeypatch.setattr(flows, "runtime", told)
        assert flows._run_name() == f"digits-full-seed{named}"


@pytest.mark.parametrize(
    ("chosen", "own", "visible", "wanted"),
    [({}, "auto", "0,1,2", 2), ({}, "cpu", "0,1", 0), ({}, "auto", "", 0), ({}, "cuda", "5", 1),
     ({"preset": "smoke"}, "cuda", "0", 0), ({"gpus": 0}, "auto", "0", 0),
     ({"gpus": 3}, "cpu", "0,1,2", 3)],
)  # fmt: skip
def test_a_run_has_the_gpus_to_itself_that_its_recipe_takes(
    project: Project, monkeypatch: pytest.MonkeyPatch,
    chosen: dict[str, Any], own: str, visible: str, wanted: int,
) -> None:  # fmt: skip
    project.set(lambda params: params["recipes"]["digits"]["train"].update(device=own))
    monkeypatch.chdir(project.folder)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert flows._gpus_wanted(Overrides(**chosen), "digits") == wanted


def test_a_recipe_for_a_gpu_is_refused_where_there_is_none(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.set(lambda params: params["recipes"]["digits"]["train"].update(device="cuda"))
    monkeypatch.chdir(project.folder)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(UserError, match=r"^train.device: 'cuda' is asked for"):
        flows._gpus_wanted(Overrides(), "digits")


@pytest.mark.parametrize(
    ("told", "end", "code"),
    [(2, "exit 255", 2), (143, "exit 255", 143), (None, "exit 255", 255), (143, "kill -9 $$", 137)],
)
def test_a_stage_ends_with_its_own_code_unless_dvc_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: int | None, end: str, code: int
) -> None:
    event = f'echo \'{{"event": "end", "code": {told}}}\' > "$VDVAE_EVENTS"' if told else ":"
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{event}\n{end}\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(StageFailed) as failed:
        run_stage("train", "digits", print, print)
    assert failed.value.code == code


def test_a_stage_that_fails_three_times_ends_the_run_with_its_last_lines(
    server: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    project = made(tmp_path / "project")
    broken = "from pipeline.stages import main\ndef shard(name):\n  for i in range(30):\n    "
    broken += "print('line', i)\n  raise RuntimeError('lost')\nmain(shard)\n"
    (project.folder / "pipeline/stages/shard.py").write_text(broken)
    monkeypatch.setattr(flows, "_PAUSE_SECONDS", (0, 0))
    with inside(project), pytest.raises(SystemExit) as ended:
        flows.main("digits")
    assert ended.value.code == 1
    run = newest_run()
    assert run.state.is_failed()
    first, *tail = run.state.message.splitlines()
    assert first == "shard@digits ended with exit code 1:"
    assert len(tail) == 20
    assert any("RuntimeError: lost" in line for line in tail)

    # Bad input is not tried again, and is one sentence.
    (project.folder / "pipeline/stages/shard.py").write_text(
        "from pipeline.stages import fail, main\n"
        "def shard(name):\n  print('once')\n  fail('mend it')\nmain(shard)\n"
    )
    with inside(project), pytest.raises(SystemExit) as ended:
        flows.main("digits")
    assert ended.value.code == 2
    assert newest_run().state.message.count("once") == 1

    # A server that does not answer may be starting again: it is given more time, and asked again.
    (project.folder / "pipeline/stages/shard.py").write_text(
        "from pipeline.stages import main\nfrom pipeline.system.exits import ServerUnavailable\n"
        "def shard(name):\n  raise ServerUnavailable('S3 is away')\nmain(shard)\n"
    )
    pauses: list[float] = []
    # Its own: others of this process, Prefect's threads among them, sleep as before.
    clock = SimpleNamespace(sleep=pauses.append, monotonic=time.monotonic)
    monkeypatch.setattr(flows, "time", clock)
    with inside(project), pytest.raises(SystemExit):
        flows.main("digits")
    assert "error: S3 is away" in newest_run().state.message
    assert pauses == [30, 120]


def test_a_cancelled_run_leaves_a_checkpoint_and_nothing_else(tmp_path: Path) -> None:
    project = made(tmp_path / "project")
    words = ("run", "digits", "--preset", "smoke", "--seed", "7")
    child = _begin_training(project, *words, "--steps", "100000")
    os.kill(child.pid, signal.SIGTERM)
    assert child.stdout is not None
    rest = child.stdout.read()
    assert child.wait(timeout=60) == 143
    assert not project.processes()
    assert "stopped after a checkpoint" in rest
    assert "Traceback" not in rest
    assert not list((project.folder / "runs/flows").iterdir())
    assert [run.info.status for run in _mlflow_runs(project)] == ["KILLED"]
    stopped = max(int(path.stem[5:]) for path in project.folder.rglob("checkpoints/*.json"))
    said = project.run(*VDVAE, *words, "--steps", str(stopped + 10))
    assert f"resuming at step {stopped}/" in said
    assert [run.info.status for run in _mlflow_runs(project)] == ["FINISHED"]
    assert project.run("git", "status", "--porcelain") == ""


def test_a_killed_flow_leaves_nothing_that_trains_and_the_next_start_ends_the_rest(
    tmp_path: Path,
) -> None:
    project = made(tmp_path / "project")
    child = _begin_training(project, "run", "digits", "--preset", "smoke", "--steps", "100000")
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    while any("pipeline.stages" in command for command in project.processes().values()):
        time.sleep(0.1)
    assert list(project.folder.rglob("checkpoints/*.json"))
    assert project.processes()  # the server that Prefect started for the run
    assert process.reap(project.folder / "runs") >= 1
    assert not project.processes()
    assert not list((project.folder / "runs/flows").iterdir())


def _begin_training(project: Project, *words: str) -> subprocess.Popen[str]:
    child = project.start(*VDVAE, *words)
    assert child.stdout is not None
    for line in child.stdout:
        if re.search(r"step \d{2,}/", line):
            return child
    pytest.fail("the run ended before it trained")


def _mlflow_runs(project: Project) -> list[Any]:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{project.folder}/mlruns/mlflow.db")
    experiment = client.get_experiment_by_name("vdvae")
    assert experiment is not None
    return list(client.search_runs([experiment.experiment_id]))


def test_one_run_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,6")
    taken = process.take_gpus(tmp_path, 2)
    assert taken is not None
    assert taken[0] == "3,5"
    assert process.take_gpus(tmp_path, 2) is None
    one = process.take_gpus(tmp_path, 1)  # what was refused has let go of the third
    assert one is not None
    assert one[0] == "6"
    taken[1].close()
    again = process.take_gpus(tmp_path, 2)
    assert again is not None
    again[1].close()
    with pytest.raises(UserError, match=r"^gpus: 4 asked for, .* lists 3 .*choose at most 3"):
        process.take_gpus(tmp_path, 4)


@pytest.mark.parametrize(
    ("visible", "names"),
    [("", []), ("-1", []), ("1,-1,0", ["1"]), ("GPU-5a, 2", ["GPU-5a", "2"]), (None, ["0", "1"])],
)
def test_one_owner_says_which_gpus_are_visible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str | None, names: list[str]
) -> None:
    """Empty text is none, for everyone who asks, although nvidia-smi lists two."""
    listing = tmp_path / "nvidia-smi"
    listing.write_text(
        '#!/bin/sh\n[ "$1" = -L ] || { echo "Some GPU"; exit; }\n'
        'echo "GPU 0: A (UUID: GPU-5a)"; echo "  MIG 1g Device 0: (UUID: MIG-1)"\n'
        'echo "GPU 1: A (UUID: GPU-5b)"\n'
    )
    listing.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert process.visible_gpus() == names
    assert Settings().at_once == max(1, len(names))
    assert machine.facts("cuda")["hardware.gpu"] == ("Some GPU" if names else "unknown")
    if names:
        taken = process.take_gpus(tmp_path, len(names))
        assert taken is not None and taken[0] == ",".join(names)
        taken[1].close()
        return
    with pytest.raises(UserError, match=r"^gpus: 1 asked for, but CUDA_VISIBLE_DEVICES lists none"):
        process.take_gpus(tmp_path, 1)
    assert ranks_here(load_recipe("digits", ROOT / "params.yaml")) == 1

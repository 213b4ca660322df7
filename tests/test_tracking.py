"""One run through kills, restarts and a wiped store, with curves that have no gap and no double."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from mlflow_server import MlflowServer
from requests.adapters import HTTPAdapter

from pipeline import tracking
from pipeline.dvc import lock_entries
from pipeline.params import Places
from pipeline.system import machine
from pipeline.tracking import BufferedRun, open_run, opening
from pipeline.tracking import run as run_module
from pipeline.tracking.journal import new_journal
from vdvae import UserError
from vdvae.files import sha256_of

pytestmark = pytest.mark.integration

PARAMS = {"train.steps": 100, "model.width": 8}


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> Places:
    """A store of our own: creating MLflow's tables takes two seconds, so once for all tests."""
    root = tmp_path_factory.mktemp("places")
    uri = f"sqlite:///{root}/mlruns/mlflow.db"
    tracking.connect(uri)
    shutil.copy(root / "mlruns/mlflow.db", root / "empty.db")
    return Places(store_url=f"file://{root}/store", runs=root / "runs", tracking_uri=uri)


def opened(places, run_file, params=PARAMS, **options):
    return open_run("digits", places, run_file, params, {}, None, **options)


def points(start, end):
    """Points of steps start..end - 1: the loss at each, a validation at every fifth."""
    return [
        {"step": step, "time": 1e9 + step, "loss": step / 7}
        | ({"validation": step / 3} if step % 5 == 0 else {})
        for step in range(start, end)
    ]


def curve(run, key):
    history = run.client.get_metric_history(run.run_id, key)
    return [(metric.step, metric.value) for metric in history]


def expected(end, key):
    return [(point["step"], point[key]) for point in points(0, end) if key in point]


def test_a_restarted_stage_continues_the_run(places, tmp_path):
    run_file = tmp_path / "run.json"
    first = opened(places, run_file)
    first.finish("KILLED")
    second = opened(places, run_file, {**PARAMS, "evaluate.seed": 1})
    assert second.run_id == first.run_id
    run = first.client.get_run(first.run_id)
    assert run.info.status == "RUNNING"
    assert run.data.params == {"train.steps": "100", "model.width": "8", "evaluate.seed": "1"}


def test_a_kill_while_the_run_is_created_leaves_no_second_run(places, tmp_path, monkeypatch):
    run_file, before = tmp_path / "run.json", len(all_runs(places))
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(opening, "Run", killed)  # the run is created, and nothing more done
        opened(places, run_file)
    key = run_file.read_text()
    opened(places, run_file)
    assert len(all_runs(places)) == before + 1
    assert run_file.read_text() == key


def killed(*arguments, **options):
    raise KeyboardInterrupt


def all_runs(places):
    client = tracking.connect(places.tracking_uri)
    experiment = client.get_experiment_by_name(tracking.EXPERIMENT)
    return client.search_runs([experiment.experiment_id]) if experiment else []


def test_a_run_whose_process_was_killed_does_not_run_for_ever(places, tmp_path):
    run_file = tmp_path / "run.json"
    script = f"""
import os, signal
from pathlib import Path
from pipeline.params import Places
from pipeline.tracking import open_run
places = Places(store_url={places.store_url!r}, runs=Path({str(places.runs)!r}),
                tracking_uri={places.tracking_uri!r})
run = open_run("digits", places, Path({str(run_file)!r}), {{}}, {{}}, None)
print(run.run_id, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    run_id = done.stdout.strip()
    other = opened(places, tmp_path / "other.json")
    client = other.client
    assert client.get_run(run_id).info.status == "KILLED"
    assert client.get_run(other.run_id).info.status == "RUNNING"
    tracking.settle(places)
    assert client.get_run(other.run_id).info.status == "RUNNING"
    again = opened(places, run_file)
    assert (again.run_id, client.get_run(run_id).info.status) == (run_id, "RUNNING")
    again.finish()
    other.finish()
    keys = {json.loads(path.read_text())["run_key"] for path in tmp_path.glob("*.json")}
    assert len(keys) == 2
    assert not keys & {path.stem for path in places.runs.glob("mlflow/*.lock")}


def test_training_from_its_first_step_begins_a_new_run(places, tmp_path):
    run_file = tmp_path / "run.json"
    first = opened(places, run_file, fresh=True)
    assert opened(places, run_file, fresh=True).run_id == first.run_id  # nothing happened yet
    other = opened(places, run_file, {**PARAMS, "train.steps": 200}, fresh=True)
    assert other.run_id != first.run_id
    assert first.client.get_run(first.run_id).info.status == "KILLED"
    other.log_points(points(0, 3))
    assert opened(places, run_file, fresh=True).run_id != other.run_id


def test_a_changed_parameter_of_a_continued_run_is_a_tag(places, tmp_path):
    run_file = tmp_path / "run.json"
    opened(places, run_file)
    run = opened(places, run_file, {**PARAMS, "train.steps": 200})
    data = run.client.get_run(run.run_id).data
    assert (data.params["train.steps"], data.tags["new.train.steps"]) == ("100", "200")
    opened(places, run_file)
    assert run.client.get_run(run.run_id).data.tags["new.train.steps"] == "100"


def test_points_are_delivered_exactly_once(places, tmp_path, monkeypatch):
    run_file = tmp_path / "run.json"
    run = opened(places, run_file)
    run.log_points(points(0, 12))
    run.log_points(points(0, 20))  # all of them again, and more

    monkeypatch.setattr(run_module, "_METRICS_A_BATCH", 7)
    deliver, batches = run.client.log_batch, []

    def killed(run_id, metrics=(), **others):
        if len(batches) == 2:
            raise KeyboardInterrupt
        batches.append(len(metrics))
        deliver(run_id, metrics=metrics, **others)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(run.client, "log_batch", killed)
        run.log_points(points(10, 60))
    assert max(batches) <= 7
    # Training goes on from its checkpoint at step 15, of which later points were delivered.
    resumed = opened(places, run_file)
    resumed.log_points([point | {"time": time.time()} for point in points(15, 60)])
    for key in ("loss", "validation"):
        assert sorted(curve(resumed, key)) == expected(60, key)


def test_figures_are_logged_when_they_change(places, tmp_path):
    run = opened(places, tmp_path / "run.json")
    figures = tracking.flat_metrics({"test": {"bits_per_dim": 1.8, "images": 360}, "note": "x"})
    assert figures == {"test/bits_per_dim": 1.8, "test/images": 360.0}
    for _ in range(2):
        run.log_metrics(figures)
    assert len(curve(run, "test/bits_per_dim")) == 1
    run.log_metrics({"test/bits_per_dim": 1.7})
    assert run.client.get_run(run.run_id).data.metrics["test/bits_per_dim"] == 1.7


def test_data_revision_and_files_are_recorded_without_credentials(places, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VDVAE_FLOW_RUN", "the-flow-run")
    Path("dvc.lock").write_text("stages: {}\n")
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        subprocess.run(["git", *identity, *arguments], check=True)
    entry = {"cmd": "python", "outs": [{"md5": "1"}]}
    stages = {"train@digits": entry, "train@other-digits": entry, "train@digits2": entry}
    Path("dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": stages}))
    places = replace(places, store_url="s3://key:secret@bucket/prefix?token=secret")
    for _ in range(2):
        run = open_run("digits", places, Path("run.json"), PARAMS, {"stage": "train"}, manifest())
    run.log_artifact(Path("dvc.lock"), "files")

    record = run.client.get_run(run.run_id)
    tags = record.data.tags
    assert tags["manifest_digest"] == "d" * 64 and tags["stage"] == "train"
    assert tags["dvc_lock_sha256"] == sha256_of(Path("dvc.lock"))
    assert tags["git_dirty"] == "false" and len(tags["git_revision"]) == 40
    assert tags["prefect_flow_run"] == "the-flow-run"
    copy = run.client.download_artifacts(run.run_id, "lineage/dvc.lock.yaml", str(tmp_path))
    assert yaml.safe_load(Path(copy).read_text()) == {"train@digits": entry}
    Path("dvc.lock").write_text("[")
    with pytest.raises(UserError, match=r"dvc.lock: is damaged; restore it with"):
        lock_entries("digits")
    [dataset_input] = record.inputs.dataset_inputs
    assert dataset_input.dataset.digest == "d" * 36
    assert json.loads(dataset_input.dataset.source)["uri"] == "s3://bucket/prefix/shards/digits"
    assert "secret" not in str(record.to_dictionary())
    [file] = run.client.list_artifacts(run.run_id, "files")
    assert file.path == "files/dvc.lock"
    database = tracking.sqlite_path(places.tracking_uri)
    assert record.info.artifact_uri.startswith((database.parent / "artifacts").as_uri())


def manifest():
    split = SimpleNamespace(images=3)
    return SimpleNamespace(
        recipe="digits", digest="d" * 64, shape=(8, 8, 1), num_levels=17, splits={"train": split}
    )


def test_a_wiped_store_gets_the_run_again_from_the_files(places, tmp_path):
    run_file, curves = tmp_path / "run.json", tmp_path / "curves.csv"
    run = opened(places, run_file)
    key = run_file.read_text()
    run.log_points(points(0, 9))
    with curves.open("w", newline="") as file:
        table = csv.DictWriter(file, ["step", "time", "loss", "validation"])
        table.writeheader()
        table.writerows(points(0, 9))

    wiped = replace(places, tracking_uri=f"sqlite:///{places.runs.parent}/empty.db")
    again = opened(wiped, run_file)
    again.log_points(tracking.read_curves(curves))
    assert again.run_id != run.run_id and run_file.read_text() == key
    assert again.client.get_run(again.run_id).data.params["model.width"] == "8"
    assert curve(again, "train/validation") == expected(9, "validation")
    curves.write_text("step,time,loss\n1,2,x\n")
    with pytest.raises(UserError, match=r"curves.csv: cannot read the row"):
        tracking.read_curves(curves)


@pytest.mark.timeout(100)  # MLflow's own patience is 120 s, seven times
def test_a_store_that_does_not_answer_is_told_in_seconds(places, tmp_path):
    with socket.socket() as deaf:  # accepts, and says nothing
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        nobody = socket.socket()
        nobody.bind(("127.0.0.1", 0))  # refuses: bound, but not listening
        for server in (nobody, deaf):
            uri = f"http://user:secret@127.0.0.1:{server.getsockname()[1]}"
            with pytest.raises(UserError, match=r"does not answer .*; start it or unset") as caught:
                opened(replace(places, tracking_uri=uri), tmp_path / "run.json")
            assert "secret" not in str(caught.value) and "\n" not in str(caught.value)
        nobody.close()
    (tmp_path / "file").write_text("not a database, nor a folder")
    for path in (tmp_path / "file", tmp_path / "file" / "mlflow.db"):
        with pytest.raises(UserError, match=r"file.*MLflow's database cannot be written"):
            opened(replace(places, tracking_uri=f"sqlite:///{path}"), tmp_path / "run.json")
    assert not (tmp_path / "run.json").exists()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    made = MlflowServer(tmp_path_factory.mktemp("server"))
    made.start()
    yield made
    made.kill()


@pytest.fixture
def impatient(monkeypatch):
    """Deliveries and answers in tenths of the seconds that they have in earnest."""
    monkeypatch.setenv("VDVAE_TRACKING_SECONDS", "0.2")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "4")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


def served(places, server, tmp_path):
    return replace(places, tracking_uri=server.url, runs=tmp_path / "runs")


def wait_for(holds):
    while not holds():
        time.sleep(0.05)


def left_over(places):
    return [path for path in (places.runs / "mlflow").iterdir() if places.runs.exists()]


def test_no_call_waits_for_mlflow_and_an_outage_loses_nothing(
    places, server, impatient, tmp_path, capsys, monkeypatch
):
    here = served(places, server, tmp_path)
    opened_run = opened(here, tmp_path / "run.json")
    askers = set()
    send = HTTPAdapter.send

    def watched(*request, **how):
        askers.add(threading.current_thread())
        return send(*request, **how)

    said = ""

    def told(words):
        nonlocal said
        said += capsys.readouterr().out
        return words in said

    with BufferedRun(opened_run, here.runs) as run:
        run.log_points(points(0, 10))
        wait_for(lambda: len(curve(opened_run, "loss")) == 10)
        monkeypatch.setattr(HTTPAdapter, "send", watched)
        for end, outage, back in (
            (20, server.pause, server.go_on),
            (30, server.kill, server.start),
        ):
            outage()
            for point in points(end - 10, end):
                run.log_points([point])
            (run.files / "pictures").mkdir(parents=True, exist_ok=True)
            (run.files / "pictures" / f"{end}.png").write_bytes(b"picture")
            run.log_metrics({"test/images": float(end)})
            wait_for(lambda: told("what it is to get waits in"))
            assert threading.current_thread() not in askers
            back()
            wait_for(lambda: told("answers again"))
            assert not list(run.files.rglob("*.png"))  # it is not sent again and again
            assert said.count("waits in") == said.count("answers again") == 1
            said = ""
    assert "wait" not in capsys.readouterr().out
    for key in ("loss", "validation"):
        assert curve(opened_run, key) == expected(30, key)
    assert curve(opened_run, "test/images") == [(0, 20.0), (0, 30.0)]
    client = opened_run.client
    assert [file.path for file in client.list_artifacts(opened_run.run_id, "pictures")] == [
        "pictures/20.png",
        "pictures/30.png",
    ]
    assert client.get_run(opened_run.run_id).info.status == "FINISHED"
    assert left_over(here) == []


@pytest.mark.parametrize("by", ["the next stage", "the command"])
def test_what_the_end_of_a_stage_could_not_deliver_goes_out_later(
    places, server, impatient, tmp_path, capsys, by
):
    here = served(places, server, tmp_path)
    first = opened(here, tmp_path / "run.json")
    server.kill()
    with BufferedRun(first, here.runs) as run:
        run.log_points(points(0, 10))
        (tmp_path / "figures.json").write_text("{}")
        run.log_artifact(tmp_path / "figures.json", "figures")
    said = capsys.readouterr().out
    assert f"MLflow at {server.url} fails (" in said
    # Ten points and the status; one file.
    assert "12 lines and files wait in" in said and "'python -m pipeline.tracking'" in said
    server.start()
    if by == "the next stage":
        second = opened(here, tmp_path / "run.json")
        assert second.run_id == first.run_id
        assert first.client.get_run(first.run_id).info.status == "RUNNING"
        second.finish()
    else:
        elsewhere = replace(here, tracking_uri=places.tracking_uri)
        [sentence] = tracking.settle(elsewhere)  # a store that does not know the run
        assert re.match(r".*does not take it \(.*not found\); set MLFLOW_TRACKING_URI", sentence)
        assert tracking.settle(here) == []
    run = first.client.get_run(first.run_id)
    assert run.info.status == "FINISHED"
    for key in ("loss", "validation"):
        assert curve(first, key) == expected(10, key)
    assert [file.path for file in first.client.list_artifacts(first.run_id, "figures")] == [
        "figures/figures.json"
    ]
    assert left_over(here) == []


def test_a_killed_process_leaves_its_points_to_the_next(places, tmp_path):
    places = replace(places, runs=tmp_path / "runs")
    run_file = tmp_path / "run.json"
    script = f"""
import json, os, signal, sys
from pathlib import Path
from pipeline.tracking import BufferedRun
from pipeline.params import Places
from pipeline.tracking import open_run
places = Places(store_url={places.store_url!r}, runs=Path({str(places.runs)!r}),
                tracking_uri={places.tracking_uri!r})
opened = open_run("digits", places, Path({str(run_file)!r}), {{}}, {{}}, None)
run = BufferedRun(opened, places.runs)
run.log_points(json.loads(sys.argv[1]))
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(points(0, 20))],
        env={**os.environ, "VDVAE_TRACKING_SECONDS": "3600"},  # it never gets to deliver
    )
    assert done.returncode == -signal.SIGKILL
    [journal] = places.runs.glob("mlflow/*/journal.jsonl")
    assert journal.read_bytes().count(b"\n") == 20
    with journal.open("a") as file:  # losses of power cut lines short
        file.write('{"tags": {"a": \n{"point": {"step": 20, "ti')

    resumed = opened(places, run_file)  # from a checkpoint at step 15
    with BufferedRun(resumed, places.runs) as run:
        run.log_points(points(0, 15))
        run.log_points([point | {"time": time.time()} for point in points(15, 40)])
    for key in ("loss", "validation"):
        assert curve(resumed, key) == expected(40, key)
    assert left_over(places) == []


def test_an_end_that_is_told_late_does_not_end_the_next_stage(places, tmp_path, monkeypatch):
    first = opened(places, tmp_path / "run.json")
    with new_journal(places.runs, first.run_id) as journal:
        journal.append("point", points(0, 1)[0])
        journal.append("end", {"status": "KILLED", "milliseconds": 1})
    first.close()
    deliver, calls = tracking.Run.log_points, []

    def fails_once(run, points):
        calls.append(points)
        if len(calls) == 1:
            raise UserError("MLflow fails")
        deliver(run, points)

    monkeypatch.setattr(tracking.Run, "log_points", fails_once)
    second = opened(places, tmp_path / "run.json")
    assert len(calls) == 2
    assert curve(second, "loss") == expected(1, "loss")
    assert second.client.get_run(second.run_id).info.status == "RUNNING"
    tracking.settle(places)  # another process looks: somebody has this run
    assert second.client.get_run(second.run_id).info.status == "RUNNING"
    second.finish()
    assert left_over(places) == []


def test_what_is_logged_while_another_is_delivered_waits_its_turn(places, tmp_path, monkeypatch):
    run = opened(places, tmp_path / "run.json")
    deliver = run.log_points

    def meanwhile(delivered):
        deliver(delivered)
        if len(delivered) == 3:
            journal.append("point", points(3, 4)[0])

    monkeypatch.setattr(run, "log_points", meanwhile)
    with new_journal(tmp_path, run.run_id) as journal:
        for point in points(0, 3):
            journal.append("point", point)
        journal.deliver(run)
        assert journal.waiting() == 1
        journal.deliver(run)
        assert journal.waiting() == 0
        assert (journal.folder / "journal.jsonl").stat().st_size == 0
    assert curve(run, "loss") == expected(4, "loss")


def test_a_stage_that_fails_or_is_ended_says_so(places, tmp_path):
    for error, status in ((ValueError, "FAILED"), (SystemExit, "KILLED")):
        run = opened(places, tmp_path / "run.json")
        with pytest.raises(error), BufferedRun(run, places.runs):
            raise error
        assert run.client.get_run(run.run_id).info.status == status


def test_a_wrong_interval_is_named(places, tmp_path, monkeypatch):
    run = opened(places, tmp_path / "run.json")
    for wrong in ("soon", "0", "nan"):
        monkeypatch.setenv("VDVAE_TRACKING_SECONDS", wrong)
        with pytest.raises(UserError, match=rf"VDVAE_TRACKING_SECONDS: '{wrong}' is not a number"):
            BufferedRun(run, places.runs)


def test_a_machine_says_what_it_is_and_what_a_run_used(tmp_path, monkeypatch):
    facts = machine.facts("cpu")
    assert facts["environment.torch"] and int(facts["hardware.cores"]) == len(
        os.sched_getaffinity(0)
    )
    assert "hardware.gpu" not in facts
    gpu = tmp_path / "nvidia-smi"
    gpu.write_text(
        '#!/bin/sh\ntest "$2" = 3 || exit 1\n'
        'case "$3" in *name) echo "Some GPU";; *) echo "87, 1000";; esac\n'
    )
    gpu.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert machine.facts("cuda")["hardware.gpu"] == "Some GPU"

    usage = machine.Usage("cuda", {"train/cpu_hours": 5.0, "train/gpu_hours": 7.0})
    began = time.process_time()
    while time.process_time() - began < 0.3:
        pass
    figures = usage.sample()
    assert 5 + 0.3 / 3600 < figures["train/cpu_hours"] < 6
    assert 7 + 0.3 / 3600 <= figures["train/gpu_hours"] < 7.1
    assert 100 / os.cpu_count() / 3 < figures["system/cpu_utilization_percentage"] <= 100
    assert figures["system/gpu_0_utilization_percentage"] == 87
    assert figures["system/gpu_0_memory_usage_megabytes"] == pytest.approx(1048.576)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4")  # it does not answer
    assert "system/gpu_0_utilization_percentage" not in usage.sample()
    only_cpu = machine.Usage("cpu", {}).sample()
    assert not [key for key in only_cpu if "gpu" in key]

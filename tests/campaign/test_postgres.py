"""Where one machine is outgrown: MLflow on PostgreSQL, artifacts in S3, users with passwords."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest
from conftest import ROOT
from postgres_server import postgres_server
from registry_project import NAME, PARAMS, Project
from s3_server import S3Server

from pipeline import storage, tracking
from pipeline.commands import space
from pipeline.params import Places
from pipeline.services.definitions import free_ports
from pipeline.shards import Manifest
from vdvae.config import UserError

if TYPE_CHECKING:
    from mlflow import MlflowClient

pytestmark = pytest.mark.integration

PASSWORDS = {"admin": "admin-password-1", "trainer": "trainer-password-2", "guest": "guest-pass-3"}


class Server(NamedTuple):
    """MLflow's, and what a client of it needs in its environment."""

    url: str
    s3: S3Server

    def environment(self, user: str, password: str | None = None) -> dict[str, str]:
        return {
            **self.s3.environment(),
            "MLFLOW_TRACKING_URI": self.url,
            "MLFLOW_TRACKING_USERNAME": user,
            "MLFLOW_TRACKING_PASSWORD": password or PASSWORDS[user],
        }


@pytest.fixture(scope="module")
def server(s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The server of docs/servers.md with two users, `trainer` and `guest`."""
    folder = tmp_path_factory.mktemp("server")
    config = folder / "auth.ini"
    (port,) = free_ports(1)
    running = Server(f"http://127.0.0.1:{port}", s3)
    with postgres_server("mlflow", "auth") as (backend, auth):
        config.write_text(
            f"[mlflow]\ndefault_permission = NO_PERMISSIONS\ndatabase_uri = {auth}\n"
            f"admin_username = admin\nauth_cache_ttl_seconds = 60\n"
        )
        command = [
            *(sys.executable, "-m", "mlflow", "server", "--app-name", "basic-auth"),
            *("--backend-store-uri", backend),
            *("--default-artifact-root", "s3://bucket/mlflow", "--no-serve-artifacts"),
            *("--host", "127.0.0.1", "--port", str(port), "--workers", "1"),
        ]
        environment = {
            **os.environ,
            **s3.environment(),  # for its pages, which show pictures
            "MLFLOW_AUTH_CONFIG_PATH": str(config),
            "MLFLOW_AUTH_ADMIN_PASSWORD": PASSWORDS["admin"],
            "MLFLOW_FLASK_SERVER_SECRET_KEY": "signs the sessions of this test",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(
                command, env=environment, cwd=folder, stdout=log, stderr=log, start_new_session=True
            )
        try:
            _wait(running.url, process, folder / "log")
            with pytest.MonkeyPatch.context() as patched:
                for name, value in running.environment("admin").items():
                    patched.setenv(name, value)
                from mlflow.server import get_app_client

                admin = get_app_client("basic-auth", tracking_uri=running.url)
                for user in ("trainer", "guest"):
                    admin.create_user(user, PASSWORDS[user])
            yield running
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    pytest.fail(f"MLflow did not start: {log.read_text()[-3000:]}")


def checkout(folder: Path, weights: int, bits: float) -> Path:
    """A folder in which training and evaluation of a model are done."""
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        Path("params.yaml").write_text(PARAMS)
        Path("dvc.lock").write_text("stages: {}\n")
        Project().finish_training(weights, bits)
    return folder


def start(folder: Path, runs: Path, environment: dict[str, str]) -> subprocess.Popen[str]:
    """Starts `register` there."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("VDVAE_", "MLFLOW_", "AWS_"))}
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline.stages.register", "tiny"],
        cwd=folder,
        env={**clean, **environment, "VDVAE_RUNS": str(runs), "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def champion(client: MlflowClient) -> int:
    return int(client.get_registered_model(NAME).aliases["champion"])


def test_four_register_at_once_and_a_stranger_is_refused(server, tmp_path, monkeypatch):
    # The guest's own model is better than all: only rights keep it out.
    quality = {0: 2.1, 1: 2.0, 2: 1.2, 3: 2.2}
    folders = [checkout(tmp_path / str(n), n, bits) for n, bits in quality.items()]
    runs = tmp_path / "runs"
    started = [start(folder, runs, server.environment("trainer")) for folder in folders]
    ended = [process.communicate(timeout=200) for process in started]
    assert [process.returncode for process in started] == [0] * 4, ended

    records = [json.loads((f / "results/tiny/registered.json").read_text()) for f in folders]
    assert sorted(record["version"] for record in records) == [1, 2, 3, 4]
    best = records[2]["version"]

    for name, value in server.environment("trainer").items():
        monkeypatch.setenv(name, value)
    storage._s3_client.cache_clear()
    client = tracking.connect(server.url)
    assert champion(client) == best
    version = client.get_model_version_by_alias(NAME, "champion")
    assert version.tags["weights_sha256"] == records[2]["weights_sha256"]
    # The model's bytes went to S3 without the server, and come back from there.
    assert version.source.startswith("s3://bucket/mlflow/")
    keys = [stored.key for stored in storage.open_store("s3://bucket/mlflow").list()]
    assert len([key for key in keys if key.endswith("/model.safetensors")]) == 4
    import mlflow

    # By the environment: what MLflow sets for the process would outlive this test.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", server.url)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    loaded = mlflow.pyfunc.load_model(f"models:/{NAME}@champion")
    import numpy as np

    draw = {"mode": "sample", "n": 2, "temperature": 0.85, "seed": 7}
    assert loaded.predict(np.zeros((0, 8, 8, 1), np.uint8), params=draw).shape == (2, 8, 8, 1)
    # What `vdvae gc` must know before it removes anything.
    needs = space.Needs()
    places = Places(store_url="file:///nowhere", runs=runs, tracking_uri=server.url)
    space.add_registered(needs, places, ["tiny"])
    assert (needs.versions, needs.recipes) == (4, {})
    assert list(needs.keys) == [f"shards/tiny/{'0' * 64}.tar"]

    # Without rights: one sentence, and nothing has changed.
    stranger = checkout(tmp_path / "stranger", 4, 0.5)
    process = start(stranger, tmp_path / "else", server.environment("guest"))
    printed, error = process.communicate(timeout=100)
    assert process.returncode == 2, (printed, error)
    assert re.fullmatch(rf"error: MLflow at {server.url} .*Permission denied.*\n", error), error
    for name, value in server.environment("guest").items():
        monkeypatch.setenv(name, value)
    with pytest.raises(Exception, match="Permission denied"):
        tracking.connect(server.url).set_registered_model_alias(NAME, "champion", "1")
    needs = space.Needs()
    space.add_registered(needs, places, ["tiny"])
    assert needs.recipes == {"tiny": f"the model {NAME}, which you may not read in MLflow"}
    for name, value in server.environment("trainer", "wrong").items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"MLflow at {server.url} does not answer .*401"):
        tracking.connect(server.url)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORDS["trainer"])
    assert champion(client) == best
    assert len(client.search_model_versions(f"name = '{NAME}'")) == 4


def test_runs_that_bring_the_same_new_data_at_once(server, tmp_path, monkeypatch):
    for name, value in server.environment("trainer").items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(checkout(tmp_path / "project", 0, 2.0))
    project = Project()
    client = tracking.connect(server.url)
    experiment = client.create_experiment("at once")

    def bring(manifest: Manifest) -> int:
        run_id = client.create_run(experiment).info.run_id
        store = "file:///store"
        run = tracking.Run(client, run_id, tracking_uri=server.url, store_url=store, lock=None)
        run.log_dataset(manifest)
        return len(client.get_run(run_id).inputs.dataset_inputs)

    with ThreadPoolExecutor(6) as pool:
        for data in range(1, 6):
            project.write_manifest(data)
            manifest = Manifest.load(project.places.manifest("tiny"))
            assert list(pool.map(bring, [manifest] * 6)) == [1] * 6

"""Opening a run: found by a key of our own, or made; what ended processes left comes first."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from pipeline.dvc import LOCK
from pipeline.git import revision_tags
from pipeline.params import Places, project_root
from pipeline.system.exits import innermost
from pipeline.system.process import try_lock
from pipeline.tracking.journal import left_journals
from pipeline.tracking.run import Run, changed
from pipeline.tracking.store import (
    connect,
    is_server,
    mlflow_errors,
    sqlite_path,
    without_credentials,
)
from vdvae.config import UserError
from vdvae.files import atomic_write_json, read_json, sha256_of

if TYPE_CHECKING:
    import mlflow.entities
    from mlflow import MlflowClient

    from pipeline.shards import Manifest


EXPERIMENT = "vdvae"
_KEY_TAG = "vdvae_run_key"


def open_run(
    recipe_name: str,
    places: Places,
    run_file: Path,
    params: Mapping[str, Any],
    tags: Mapping[str, Any],
    manifest: Manifest | None,
    *,
    fresh: bool = False,
) -> Run:
    """Continues the run that `run_file` names, or creates one and writes `run_file`.

    Args:
        run_file: JSON `{"run_key", "experiment"}`. The key is written before the run is created
            and is a tag of it, so a kill in between leaves no second run. Where the store does
            not know the key (it was wiped, or is another one), the run is made anew and the file
            stays as it is: DVC may keep it among a stage's outputs.
        params: flat parameters; tags: further tags.
        fresh: training starts from its first step. The run of an earlier training (one that has
            points, or other parameters) is then left as it is, and a new one begun.

    Raises:
        UserError: MLflow does not answer or refuses.
    """
    uri = places.tracking_uri
    client = connect(uri)
    claim: IO[str] | None
    with mlflow_errors(uri):
        experiment = experiment_of(client, uri)
        key = _key_of(run_file)
        claim = _claim(places, key) if key else None
        _settle(client, experiment, places)
        run = _find(client, experiment, key)
        if fresh and run and (run.data.metrics or changed(params, run.data.params)):
            if run.info.status == "RUNNING":
                client.set_terminated(run.info.run_id, "KILLED")
            key = run = None
        if key is None:
            key = uuid.uuid4().hex
            atomic_write_json(run_file, {"run_key": key, "experiment": EXPERIMENT})
            claim = _claim(places, key)
        if run is None:
            settings = json.dumps([dict(params), manifest and manifest.digest], sort_keys=True)
            run = client.create_run(
                experiment,
                run_name=f"{recipe_name}-{hashlib.sha256(settings.encode()).hexdigest()[:8]}",
                tags={_KEY_TAG: key, "recipe": recipe_name, **revision_tags()},
            )
    assert claim is not None
    run_id, store_url = run.info.run_id, places.store_url
    for left in left_journals(places.runs, run_id):  # again: now it must not fail
        left.deliver(Run(client, run_id, tracking_uri=uri, store_url=store_url, lock=None))
        left.remove()
    with mlflow_errors(uri):
        client.update_run(run_id, status="RUNNING")  # whatever end was told
    opened = Run(client, run_id, tracking_uri=uri, store_url=store_url, lock=claim)
    opened.log_params(params)
    data_tags = {"manifest_digest": manifest.digest} if manifest else {}
    lock_tags = {"dvc_lock_sha256": sha256_of(LOCK)} if LOCK.exists() else {}
    flow_run = os.environ.get("VDVAE_FLOW_RUN")  # set by the flow for its stages
    flow_tags = {"prefect_flow_run": flow_run} if flow_run else {}
    opened.set_tags({**data_tags, **lock_tags, **flow_tags, **tags})
    opened.log_lock_entries(recipe_name)
    if manifest:
        opened.log_dataset(manifest)
    return opened


def settle(places: Places) -> list[str]:
    """Delivers what ended processes left, and calls KILLED what only MLflow takes for running.

    Returns:
        A sentence for each journal that cannot be delivered.

    Raises:
        UserError: MLflow does not answer or refuses.
    """
    client = connect(places.tracking_uri)
    with mlflow_errors(places.tracking_uri):
        return _settle(client, experiment_of(client, places.tracking_uri), places)


def _settle(client: MlflowClient, experiment: str, places: Places) -> list[str]:
    undelivered = []
    for left in left_journals(places.runs):
        uri, store_url = places.tracking_uri, places.store_url
        try:
            client.get_run(left.run_id)
            left.deliver(Run(client, left.run_id, tracking_uri=uri, store_url=store_url, lock=None))
            left.remove()
        except Exception as error:  # whatever it is, other runs are not to suffer from it
            undelivered.append(
                f"{left.folder}: MLflow at {without_credentials(uri)} does not take it "
                f"({innermost(error)}); set MLFLOW_TRACKING_URI to the store of that run, or "
                f"remove the folder"
            )
    for path in (places.runs / "mlflow").glob("*.lock"):
        lock = try_lock(path)
        if lock is not None:
            with lock:
                run = _find(client, experiment, path.stem)
                if run and run.info.status == "RUNNING":
                    client.set_terminated(run.info.run_id, "KILLED")
                path.unlink(missing_ok=True)
    return undelivered


def _claim(places: Places, key: str) -> IO[str]:
    """A lock on a run that several may share; the system frees it with the last of them."""
    path = places.runs / "mlflow" / f"{key}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    while (file := try_lock(path, fcntl.LOCK_SH)) is None:
        time.sleep(0.05)  # somebody looks whether its process is gone
    return file


def find_run(places: Places, run_file: Path) -> tuple[str, str] | None:
    """Ids of the experiment and of the run that `run_file` names; None where it is not known.

    Raises:
        UserError: MLflow does not answer or refuses.
    """
    client = connect(places.tracking_uri)
    with mlflow_errors(places.tracking_uri):
        experiment = experiment_of(client, places.tracking_uri)
        run = _find(client, experiment, _key_of(run_file))
    return (experiment, run.info.run_id) if run else None


def experiment_of(client: MlflowClient, tracking_uri: str) -> str:
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(EXPERIMENT)
    if experiment is None:
        # The place is fixed when the experiment is created, so it must not depend on the folder
        # one stands in. A server has its own.
        database = sqlite_path(tracking_uri)
        root = (database.parent if database else project_root().resolve() / "mlruns") / "artifacts"
        location = None if is_server(tracking_uri) else root.as_uri()
        try:
            return client.create_experiment(EXPERIMENT, artifact_location=location)
        except MlflowException:  # another process was faster, or it is a real error
            experiment = client.get_experiment_by_name(EXPERIMENT)
            if experiment is None:
                raise
    if experiment.lifecycle_stage != "active":
        raise UserError(
            f"MLflow at {without_credentials(tracking_uri)}: the experiment {EXPERIMENT!r} is "
            f"deleted; run 'mlflow experiments restore -x {experiment.experiment_id}'"
        )
    return experiment.experiment_id


def _find(client: MlflowClient, experiment: str, key: str | None) -> mlflow.entities.Run | None:
    if key is None:
        return None
    runs = client.search_runs([experiment], f"tags.{_KEY_TAG} = '{key}'", max_results=1)
    return runs[0] if runs else None


def _key_of(run_file: Path) -> str | None:
    try:
        key = read_json(run_file, "remove it to begin a new run")["run_key"]
        return uuid.UUID(key).hex
    except FileNotFoundError:
        return None
    except UserError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError):
        raise UserError(f"{run_file}: holds no run_key; remove it to begin a new run") from None

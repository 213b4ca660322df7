"""MLflow runs: one run accompanies a recipe through all its stages and survives any kill.

Everything here may be called again by a stage that was killed and started anew: the run is found
by a key of our own that is on disk before the run exists, parameters are logged once, and points
of curves are delivered exactly once.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import time
import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

import yaml

from pipeline.exits import Away, innermost
from pipeline.journal import left_journals
from pipeline.lineage import lock_entries
from pipeline.params import Places, project_root
from pipeline.process import try_lock
from vdvae.config import UserError, shown
from vdvae.files import atomic_write_json, open_lock, read_csv, read_json, sha256_of, target_of

# Read by mlflow when it is imported.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # a stage says one line

if TYPE_CHECKING:
    import mlflow.entities
    from mlflow import MlflowClient

    from pipeline.shards import Manifest

EXPERIMENT = "vdvae"
_KEY_TAG = "vdvae_run_key"
_METRICS_A_BATCH = 1000  # MLflow's limits of one request
_PARAMS_A_BATCH = 100  # and tags

Status = Literal["FINISHED", "KILLED", "FAILED"]


def without_credentials(url: str) -> str:
    """The URL without user name, password and query, fit for tags and messages."""
    return re.sub(r"(?<=//)[^/]*@", "", url).partition("?")[0]


def is_server(tracking_uri: str) -> bool:
    """Whether it names an MLflow server; urlsplit would raise for `http://[`."""
    return tracking_uri.startswith(("http://", "https://"))


def sqlite_path(tracking_uri: str) -> Path | None:
    """The database file of a sqlite tracking URI, absolute, links followed; None for any other URI.

    Raises:
        UserError: it names no file: the database would end with the process.
    """
    if not tracking_uri.startswith("sqlite"):
        return None
    scheme, _, path = tracking_uri.partition(":///")
    path = path.partition("?")[0]
    if scheme != "sqlite" or path in ("", ":memory:"):
        raise UserError(
            f"MLFLOW_TRACKING_URI: {shown(tracking_uri)} names no file, so that what is told to it "
            f"would be lost; write sqlite:///PATH, or unset it"
        )
    return Path(os.path.realpath(path))


@contextmanager
def mlflow_errors(tracking_uri: str) -> Iterator[None]:
    """Turns what MLflow raises into a UserError of one sentence that names the URI."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        text = str(error).strip().splitlines() or [type(error).__name__]
        raise _refusal(tracking_uri, error)(
            f"MLflow at {without_credentials(tracking_uri)} fails ({text[0][:300]}); "
            f"mend it, or set MLFLOW_TRACKING_URI to another"
        ) from error


def _refusal(tracking_uri: str, error: Exception) -> type[UserError]:
    """Away, unless it is a server that has said what is wrong, or none is asked."""
    from mlflow.exceptions import MlflowException

    refused = isinstance(error, MlflowException) and error.get_http_status_code() < 500
    return Away if is_server(tracking_uri) and not refused else UserError


def connect(tracking_uri: str) -> MlflowClient:
    """A client of the tracking store and registry, which has answered once.

    Raises:
        UserError: within about ten seconds where nobody answers or the database is not writable.
    """
    import mlflow  # sets up its logger, which would fill a page at the first use

    for name in (mlflow.__name__, "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    database = sqlite_path(tracking_uri)
    if database is not None:
        _prepare(database)
    try:
        return _client(tracking_uri)
    except Exception as error:  # requests, SQLAlchemy, sqlite and MLflow raise their own
        raise _refusal(tracking_uri, error)(
            f"MLflow at {without_credentials(tracking_uri)} does not answer "
            f"({innermost(error)}); start it or unset MLFLOW_TRACKING_URI"
        ) from error


def _client(tracking_uri: str) -> MlflowClient:
    from mlflow import MlflowClient

    with _quick_and_quiet():
        client = MlflowClient(tracking_uri=tracking_uri, registry_uri=tracking_uri)
        client.search_experiments(max_results=1)
    return client


def _prepare(database: Path) -> None:
    """Creates the database, or checks that it can be written."""
    try:
        database = target_of(database)
        with locked(database.with_name(f"{database.name}.lock")):
            if database.exists() and database.stat().st_size:
                # SQLAlchemy would retry for over a minute what sqlite says at once.
                with closing(sqlite3.connect(database, timeout=8)) as connection:
                    connection.execute("BEGIN IMMEDIATE")
            else:
                # MLflow builds its tables in steps that a kill or a second process leaves
                # broken for good, so they are built beside and appear whole.
                beside = database.with_name(f".{database.name}.new")
                shutil.rmtree(beside, ignore_errors=True)
                beside.mkdir()
                _client(f"sqlite:///{beside / database.name}")
                (beside / database.name).replace(database)
                beside.rmdir()
    except UserError:
        raise
    except Exception as error:  # of the system, sqlite or SQLAlchemy
        raise UserError(
            f"{database}: MLflow's database cannot be written ({innermost(error)}); "
            f"mend it, or set MLFLOW_TRACKING_URI to another"
        ) from error


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds a lock among processes while the block runs; the system frees that of a dead one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open_lock(path) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _quick_and_quiet() -> Iterator[None]:
    # By default MLflow tries again for minutes: right in mid-training, wrong at the start.
    own = {
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
        # As a URI: MLflow writes it into a statement of SQL, where a path may hold an apostrophe.
        "_MLFLOW_SERVER_ARTIFACT_ROOT": Path("mlruns").absolute().as_uri(),
    }
    before = {name: os.environ.get(name) for name in own}
    os.environ.update(own)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # alembic and SQLAlchemy, of MLflow's own migrations
            yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


class Run:
    """One MLflow run, open for logging.

    As a context it finishes by itself: FINISHED, KILLED on an interrupt or exit, else FAILED.
    """

    def __init__(
        self,
        client: MlflowClient,
        run_id: str,
        *,
        tracking_uri: str,
        store_url: str,
        lock: IO[str] | None,
    ):
        self.client = client
        self.run_id = run_id
        self.address = without_credentials(tracking_uri)
        self._tracking_uri = tracking_uri
        self._store_url = store_url
        self._lock = lock
        self._last_steps: dict[str, int] | None = None  # of each metric, where that is certain

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.finish()
        else:
            with suppress(UserError):  # what ended the block matters more
                self.finish("FAILED" if issubclass(kind, Exception) else "KILLED")

    def log_points(self, points: Sequence[Mapping[str, Any]]) -> None:
        """Delivers points of curves exactly once, whatever was delivered before.

        The store is asked for the last step of each metric, and only later steps go out, in
        order of steps. A batch is one transaction, so a kill leaves neither a gap nor a double.
        It is asked the first time, and again where a call did not come to its end.

        Args:
            points: each `{"step": int, "time": seconds since 1970, "<metric>": float, ...}`; a
                metric may be absent from a point.

        Raises:
            UserError: MLflow fails; calling again with the same points delivers the rest.
        """
        from mlflow.entities import Metric

        with mlflow_errors(self._tracking_uri):
            last, self._last_steps = self._last_steps, None
            if last is None:
                last = {metric.key: metric.step for metric in self._latest()}
            batch: list[mlflow.entities.Metric] = []
            for point in sorted(points, key=lambda point: point["step"]):
                step, milliseconds = int(point["step"]), round(point["time"] * 1000)
                new = [
                    Metric(key, float(value), milliseconds, step)
                    for key, value in point.items()
                    if key not in ("step", "time") and step > last.get(key, -1)
                ]
                last.update({metric.key: step for metric in new})
                if len(batch) + len(new) > _METRICS_A_BATCH:
                    self.client.log_batch(self.run_id, metrics=batch)
                    batch = []
                batch += new
            if batch:
                self.client.log_batch(self.run_id, metrics=batch)
            self._last_steps = last

    def last_values(self) -> dict[str, float]:
        """Of each metric the value at its greatest step."""
        with mlflow_errors(self._tracking_uri):
            return {metric.key: metric.value for metric in self._latest()}

    def log_metrics(self, metrics: Mapping[str, float]) -> None:
        """Logs figures that belong to no step; those that already stand so are left alone."""
        from mlflow.entities import Metric

        with mlflow_errors(self._tracking_uri):
            logged = {metric.key: metric.value for metric in self._latest()}
            now = round(time.time() * 1000)
            new = [
                Metric(key, float(value), now, 0)
                for key, value in metrics.items()
                if logged.get(key) != float(value)
            ]
            if new:
                self.client.log_batch(self.run_id, metrics=new)

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Logs parameters; MLflow never changes one, so a changed value goes to a tag `new.<key>`.

        Only what may change between stop and go on (the number of steps, say) gets there.
        """
        from mlflow.entities import Param

        with mlflow_errors(self._tracking_uri):
            data = self.client.get_run(self.run_id).data
            new = [Param(key, str(params[key])) for key in params if key not in data.params]
            for start in range(0, len(new), _PARAMS_A_BATCH):
                self.client.log_batch(self.run_id, params=new[start : start + _PARAMS_A_BATCH])
        tagged = {key: params[key] for key in params if f"new.{key}" in data.tags}
        changed = {**tagged, **_changed(params, data.params)}
        self.set_tags({f"new.{key}": value for key, value in changed.items()})

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Sets tags, over what they said before."""
        from mlflow.entities import RunTag

        new = [RunTag(key, str(value)) for key, value in tags.items()]
        with mlflow_errors(self._tracking_uri):
            for start in range(0, len(new), _PARAMS_A_BATCH):
                self.client.log_batch(self.run_id, tags=new[start : start + _PARAMS_A_BATCH])

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """Uploads one file under its own name, over an earlier one."""
        with mlflow_errors(self._tracking_uri):
            self.client.log_artifact(self.run_id, str(path), folder or None)

    def log_dataset(self, manifest: Manifest) -> None:
        """Records the data as the run's dataset input: the manifest's digest, size and place."""
        from mlflow.entities import Dataset, DatasetInput, InputTag
        from mlflow.exceptions import MlflowException

        store = without_credentials(self._store_url)
        scheme = urlsplit(store).scheme
        dataset = Dataset(
            name=manifest.recipe,
            digest=manifest.digest[:36],  # MLflow keeps no more; the tag has it whole
            source_type={"file": "local"}.get(scheme, scheme),
            source=json.dumps({"uri": f"{store.rstrip('/')}/shards/{manifest.recipe}"}),
            profile=json.dumps(
                {
                    "shape": list(manifest.shape),
                    "num_levels": manifest.num_levels,
                    "images": {name: split.images for name, split in manifest.splits.items()},
                }
            ),
        )
        context = InputTag("mlflow.data.context", "training")
        with mlflow_errors(self._tracking_uri):
            inputs = self.client.get_run(self.run_id).inputs.dataset_inputs
            if dataset.digest not in {known.dataset.digest for known in inputs}:
                new = [DatasetInput(dataset, [context])]
                try:
                    self.client.log_inputs(self.run_id, datasets=new)
                except MlflowException:
                    # Another run may have brought the same data at this moment: MLflow looks for
                    # it and then adds it, and the database refuses the second.
                    self.client.log_inputs(self.run_id, datasets=new)

    def log_lock_entries(self, recipe_name: str) -> None:
        """Uploads the recipe's entries of dvc.lock, as they stand, as lineage/dvc.lock.yaml."""
        entries = lock_entries(recipe_name)
        if entries:
            text = yaml.safe_dump(entries, sort_keys=False)
            with mlflow_errors(self._tracking_uri):
                self.client.log_text(self.run_id, text, "lineage/dvc.lock.yaml")

    def finish(self, status: Status = "FINISHED", milliseconds: int | None = None) -> None:
        """Sets status and end time; a later stage may open the run again.

        Args:
            milliseconds: when it ended, since 1970; now, where it is not given.
        """
        with mlflow_errors(self._tracking_uri):
            self.client.set_terminated(self.run_id, status, milliseconds)
        if self._lock is not None:
            with suppress(BlockingIOError, ValueError):  # another has it open; finished twice
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                Path(self._lock.name).unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Lets go of the run without a word to MLflow; whoever comes next settles it."""
        if self._lock is not None:
            self._lock.close()

    def _latest(self) -> Any:
        # Of each metric the value at its greatest step: a query of one row a metric, whereas
        # the history has one a point. Only the protocol's form of the run carries the steps.
        return self.client.get_run(self.run_id).data.to_proto().metrics


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
        experiment = _experiment(client, uri)
        key = _key_of(run_file)
        claim = _claim(places, key) if key else None
        _settle(client, experiment, places)
        run = _find(client, experiment, key)
        if fresh and run and (run.data.metrics or _changed(params, run.data.params)):
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
    lock = Path("dvc.lock")
    data_tags = {"manifest_digest": manifest.digest} if manifest else {}
    lock_tags = {"dvc_lock_sha256": sha256_of(lock)} if lock.exists() else {}
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
        return _settle(client, _experiment(client, places.tracking_uri), places)


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


def curve_point(point: Mapping[str, float]) -> dict[str, float]:
    """A point of training under MLflow's names: `bits_per_dim` becomes `train/bits_per_dim`."""
    return {key if key in ("step", "time") else f"train/{key}": point[key] for key in point}


def read_curves(path: Path) -> list[dict[str, float]]:
    """The points of results/<recipe>/curves.csv, as `curve_point` makes them; empty cells lack.

    Raises:
        UserError: a row that cannot be read.
    """
    points = []
    for row in read_csv(path, "train again"):
        try:
            point = {key: float(cell) for key, cell in row.items() if cell != ""}
        except ValueError:
            raise UserError(f"{path}: cannot read the row {shown(row)}; train again") from None
        if not {"step", "time"} <= point.keys():
            raise UserError(f"{path}: a row has no step or no time ({shown(row)}); train again")
        points.append(curve_point(point))
    return points


def find_run(places: Places, run_file: Path) -> tuple[str, str] | None:
    """Ids of the experiment and of the run that `run_file` names; None where it is not known.

    Raises:
        UserError: MLflow does not answer or refuses.
    """
    client = connect(places.tracking_uri)
    with mlflow_errors(places.tracking_uri):
        experiment = _experiment(client, places.tracking_uri)
        run = _find(client, experiment, _key_of(run_file))
    return (experiment, run.info.run_id) if run else None


def flat_metrics(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The figures of results/<recipe>/metrics.json as MLflow names them: `test/bits_per_dim`."""
    return {
        f"{split}/{name}": float(value)
        for split, figures in metrics.items()
        if isinstance(figures, Mapping)
        for name, value in figures.items()
    }


def revision_tags() -> dict[str, str]:
    """The git revision here, and whether tracked files differ from it; empty outside of git.

    dvc.lock does not count: every stage changes it, and it has a tag of its own.
    """
    try:
        revision = _git("rev-parse", "HEAD")
        changes = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!dvc.lock")
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"git_revision": revision, "git_dirty": str(bool(changes)).lower()}


def _experiment(client: MlflowClient, tracking_uri: str) -> str:
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


def _changed(params: Mapping[str, Any], logged: Mapping[str, str]) -> dict[str, Any]:
    return {k: v for k, v in params.items() if k in logged and logged[k] != str(v)}


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


if __name__ == "__main__":
    # Delivers what waits. Before a server starts it also makes database and experiment where they
    # lack, so that the server keeps artifacts where runs without one keep them.
    try:
        for sentence in settle(Places.from_env()):
            print(sentence)
    except UserError as failure:
        sys.exit(f"error: {failure}")

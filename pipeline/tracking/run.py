"""One run of MLflow, open for logging; calls are idempotent."""

from __future__ import annotations

import fcntl
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

import yaml

from pipeline.dvc import lock_entries
from pipeline.tracking.store import mlflow_errors, without_credentials
from vdvae.config import UserError, shown
from vdvae.files import read_csv

if TYPE_CHECKING:
    import mlflow.entities
    from mlflow import MlflowClient

    from pipeline.shards import Manifest

# In a run, and in a version's folder: manifest and entries of dvc.lock as they were.
COPY = "lineage"
LOCK_COPY = f"{COPY}/dvc.lock.yaml"
_METRICS_A_BATCH = 1000  # MLflow's limits of one request
_PARAMS_A_BATCH = 100  # and tags

Status = Literal["FINISHED", "KILLED", "FAILED"]


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
        new_values = {**tagged, **changed(params, data.params)}
        self.set_tags({f"new.{key}": value for key, value in new_values.items()})

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
        """Uploads the recipe's entries of dvc.lock, as they stand, as LOCK_COPY."""
        entries = lock_entries(recipe_name)
        if entries:
            text = yaml.safe_dump(entries, sort_keys=False)
            with mlflow_errors(self._tracking_uri):
                self.client.log_text(self.run_id, text, LOCK_COPY)

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


def flat_metrics(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The figures of results/<recipe>/metrics.json as MLflow names them: `test/bits_per_dim`."""
    return {
        f"{split}/{name}": float(value)
        for split, figures in metrics.items()
        if isinstance(figures, Mapping)
        for name, value in figures.items()
    }


def changed(params: Mapping[str, Any], logged: Mapping[str, str]) -> dict[str, Any]:
    """The parameters that were logged with another value."""
    return {k: v for k, v in params.items() if k in logged and logged[k] != str(v)}

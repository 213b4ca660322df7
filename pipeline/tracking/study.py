"""A study in MLflow: one run with its table and figure, the parent of its cells' runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.params import Places
from pipeline.tracking.opening import experiment_of
from pipeline.tracking.store import connect, mlflow_errors

_PARENT = "mlflow.parentRunId"  # MLflow's own tag: its page then shows the runs below the parent


def log_study(places: Places, name: str, cells: Mapping[str, str], files: Sequence[Path]) -> None:
    """Logs a study's files to its run, which is made where it is not there, and tags the cells.

    A cell of two studies is below the first of them, and has a tag `study.NAME` for each.

    Args:
        places: MLflow's address.
        name: of the study.
        cells: what each MLflow run is in the study, by the run's id.
        files: to be logged as artifacts.

    Raises:
        UserError: MLflow does not answer or refuses.
    """
    client = connect(places.tracking_uri)
    with mlflow_errors(places.tracking_uri):
        experiment = experiment_of(client, places.tracking_uri)
        found = client.search_runs([experiment], f"tags.vdvae_study = '{name}'", max_results=1)
        parent = found[0] if found else client.create_run(
            experiment, run_name=f"study-{name}", tags={"vdvae_study": name}
        )  # fmt: skip
        for run_id, text in cells.items():
            client.set_tag(run_id, f"study.{name}", text)
            if _PARENT not in client.get_run(run_id).data.tags:
                client.set_tag(run_id, _PARENT, parent.info.run_id)
        for file in files:
            client.log_artifact(parent.info.run_id, str(file))
        client.set_terminated(parent.info.run_id)

"""The flow of a study, started from its form: what it trains arrives in the origin.

It works in the clone that its deployment's pull step made. Its cells' experiments go to the origin
as each ends, its table and figure to MLflow; `vdvae study NAME` in the origin then writes them
there without training anything.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Literal

from prefect import flow, get_run_logger
from prefect.states import Failed, State
from pydantic import Field

from pipeline.flows import experiment
from pipeline.flows.engine import PARENT, in_engine, leave, stopped
from pipeline.params import Places, read_params
from pipeline.studies.declaration import cells_of, load_study
from pipeline.studies.results import run_study
from pipeline.system import process
from pipeline.system.commands import CommandFailed
from vdvae.config import UserError

NAMES: tuple[str, ...] = ()
with suppress(UserError):  # which the run itself will say
    NAMES = tuple(read_params()["studies"])


@flow(name="run-study", flow_run_name="study-{name}")
def study(
    name: Literal[NAMES] if NAMES else str,  # type: ignore[valid-type]
    mini: bool = False,
    jobs: int = Field(1, ge=1, le=64),
) -> State[None] | None:
    """Trains the cells that a study of the paper's claims lacks, compares, judges.

    The table and the figure are in the MLflow run study-NAME, the cells below it. Starting the same
    form again after a cancel goes on from the newest checkpoints.

    Args:
        name: in `studies` of params.yaml.
        mini: the short version: smaller, with fewer seeds.
        jobs: cells at once, 1 to 64; each has the GPUs it wants to itself.
    """
    logger = get_run_logger()
    try:
        if in_engine():
            process.end_with_parent(PARENT)  # a worker that is killed leaves no cell
        origin = experiment.origin_of_clone()
        experiment.share_places(origin)
        runs = Places.from_env().runs
        process.reap(runs)
        with process.marked(runs):
            experiment.prepare(origin)
            names = {cell.experiment for cell in cells_of(load_study(name), mini)}
            experiment.fetch_from_origin(names)

            def tell(line: str) -> None:
                logger.info(line)
                with suppress(CommandFailed):  # the next one brings it along
                    experiment.push_to_origin(names)

            folder = run_study(name, mini, jobs, tell)
            experiment.push_to_origin(names)
        logger.info("%s", (folder / "table.md").read_text())
        logger.info("to have it in the origin: 'vdvae study %s%s'", name, " --mini" * mini)
    except (UserError, CommandFailed) as error:
        return Failed(message=str(error))
    except SystemExit:
        message = f"{name} was stopped; the same form, started again, goes on"
        ending = stopped(message)
        if in_engine():
            leave(ending)
        return ending
    return None

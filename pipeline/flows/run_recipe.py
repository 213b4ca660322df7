"""The flow of a recipe: one task a DVC stage, in the order of the one graph.

A deployment's run works in the clone that its pull step made. The shell's run works in the
checkout, or in a clone of its own where it has settings of its own. All three are this one flow.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import MappingProxyType
from typing import Any

from prefect import Flow, flow, get_run_logger, runtime, task
from prefect.cache_policies import NO_CACHE
from prefect.exceptions import TerminationSignal
from prefect.states import Cancelled, Failed, Scheduled, State

from pipeline.dvc import check_recipe
from pipeline.flows import experiment
from pipeline.flows.engine import PARENT, in_engine, leave, stopped
from pipeline.flows.overrides import OWN, Overrides, apply, as_form, change, form_text, own_values
from pipeline.flows.page import Page, Throttle
from pipeline.flows.repro import StageFailed, run_stage
from pipeline.params import Places, load_recipe
from pipeline.system import process
from pipeline.system.exits import BAD_INPUT, CANCELLED, UNAVAILABLE, fail
from pipeline.system.launch import ranks_on
from vdvae.config import UserError

_ATTEMPTS = 3  # of a stage whose process was lost, or whose network was
_PAUSE_SECONDS = (2, 10)  # before the second and the third
_UNAVAILABLE_SECONDS = (30, 120)  # where a server did not answer, which may be starting again
_GPU_SECONDS = 15  # a run that waits for a GPU looks again after this time


@dataclass
class _Shell:
    """What the shell runs, where no deployment says it."""

    recipe: str
    in_clone: bool
    experiment: str | None = None  # its name, where the caller wants to find it again
    settings: Mapping[str, Any] = field(default_factory=dict)  # of a study's cell
    exit_code: int = 1  # where the run fails


_shell: ContextVar[_Shell | None] = ContextVar("_shell", default=None)


def _run_name() -> str:
    values, recipe = runtime.flow_run.parameters, _recipe()
    seed = values["seed"]
    if seed == OWN:
        with contextlib.suppress(UserError):  # which the run itself will say
            seed = load_recipe(recipe).train.seed
    return f"{recipe}-{values['preset']}-seed{seed}"


def _recipe() -> str:
    shell = _shell.get()
    return shell.recipe if shell else str(runtime.deployment.name)


@flow(name="run-recipe", flow_run_name=_run_name)
@as_form
def run_recipe(**values: Any) -> State[None] | None:
    """Makes shards, trains, evaluates, draws samples and registers a recipe's model.

    A field that is left alone changes nothing. The results arrive as a DVC experiment, an MLflow
    run and a version in the registry. Starting the same form again after a cancel goes on from the
    newest checkpoint.
    """
    try:
        shell = _shell.get()
        in_clone = shell is None or shell.in_clone
        return _run(_recipe(), Overrides(**values), in_clone=in_clone)
    except UserError as error:
        return _failed(BAD_INPUT, str(error))


class _Forms:
    """The flow of each recipe's deployment: `run_recipe`, whose form says what is its own."""

    def __getattr__(self, recipe: str) -> Flow[..., Any]:
        made = run_recipe.with_options()
        # A recipe that does not do is the run's to refuse, in a sentence on its page.
        with contextlib.suppress(UserError):
            made.__doc__ = form_text(inspect.getdoc(run_recipe) or "", own_values(recipe))
        return made


forms = _Forms()


def _run(recipe: str, overrides: Overrides, in_clone: bool) -> State[None] | None:
    logger = get_run_logger()
    if in_engine():
        process.end_with_parent(PARENT)  # a worker that is killed leaves no flow
    os.environ["VDVAE_FLOW_RUN"] = str(runtime.flow_run.id)  # for the stages' records
    origin = None
    if in_clone:
        origin = experiment.origin_of_clone()
        experiment.share_places(origin)
    places = Places.from_env()
    lost = process.reap(places.runs)
    if lost:
        logger.warning("ended %s processes that a killed run had left", lost)
    with _mark(places.runs), _gpu(places.runs, _gpus_wanted(overrides, recipe)):
        if in_clone:
            logger.info("works on commit %s", experiment.commit())
            changed = experiment.uncommitted(origin) if origin else []
            if changed:
                logger.warning(
                    "the origin has uncommitted changes, which this run does not see: %s",
                    ", ".join(changed),
                )
            experiment.prepare(origin)
            apply(overrides, recipe)
            shell = _shell.get()
            if shell and shell.settings:
                change(recipe, shell.settings)
            if overrides.note:
                logger.info("note: %s", overrides.note)
        check_recipe(recipe)
        page = Page(recipe, overrides.stages, places)
        for stage in overrides.stages:
            state = repro(stage, recipe, page, return_state=True)
            if not state.is_completed():
                page.end(stage, "failed")
                if state.is_cancelled() and in_engine():
                    leave(Cancelled(message=state.message))
                _settle(places)
                # A state of the flow's own: Prefect would sum up a task's as "1/1 states".
                ending = Cancelled if state.is_cancelled() else Failed
                return ending(message=state.message)
            page.end(stage, "done")
        if in_clone:
            name = (shell and shell.experiment) or f"{_run_name()}-{uuid.uuid4().hex[:8]}"
            experiment.publish(name, recipe, overrides.stages, overrides.note)
            logger.info(
                "saved as experiment %s: 'dvc exp show' lists it, 'dvc exp apply %s' takes it over",
                name,
                name,
            )
    return None


@task(task_run_name="{stage}", cache_policy=NO_CACHE)
def repro(stage: str, recipe: str, page: Page) -> State[None] | None:
    """Brings one stage up to date; what it prints goes to the run's log.

    A stage that was lost (killed, or a server it needs is away) is started up to three times and
    goes on where it was; bad input (exit code 2) and a signal are final.
    """
    logger = get_run_logger()
    for attempt in range(1, _ATTEMPTS + 1):
        say = Throttle(logger.info)

        def on_line(line: str, say: Throttle = say) -> None:
            if line:
                say(line)

        def on_event(event: dict[str, Any], say: Throttle = say) -> None:
            if event["event"] == "progress":
                say.progress(event["text"])
                page.progress(event)

        try:
            run_stage(stage, recipe, on_line, on_event)
            return None
        except StageFailed as error:
            if error.stopped:
                return stopped(f"{error.stage} was stopped; the same run, started again, goes on")
            if error.code in (BAD_INPUT, CANCELLED) or attempt == _ATTEMPTS:
                # A state instead of the exception: its message is for people, a traceback is not.
                return _failed(error.code, str(error))
            logger.warning(
                "%s ended with exit code %s; starting it again (%s of %s)",
                error.stage,
                error.code,
                attempt + 1,
                _ATTEMPTS,
            )
            pauses = _UNAVAILABLE_SECONDS if error.code == UNAVAILABLE else _PAUSE_SECONDS
            time.sleep(pauses[attempt - 1])
        finally:
            say.flush()
    raise AssertionError("the last attempt returns")


def _failed(code: int, message: str) -> State[None]:
    shell = _shell.get()
    if shell:
        shell.exit_code = code
    return Failed(message=message)


def _mark(runs: Path) -> contextlib.AbstractContextManager[object]:
    # The shell's run has marked itself before Prefect started a server for it.
    return process.marked(runs) if in_engine() else contextlib.nullcontext()


def _settle(places: Places) -> None:
    from pipeline import tracking

    with contextlib.suppress(UserError):  # the stage's own failure matters more
        tracking.settle(places)


def _gpus_wanted(overrides: Overrides, recipe: str) -> int:
    """How many GPUs a run is to have to itself: the form's number, or what the recipe will use.

    Raises:
        UserError: the recipe's own device is one that this machine has not.
    """
    if overrides.gpus != OWN:
        return overrides.gpus
    shell = _shell.get()
    own = load_recipe(recipe, settings=shell.settings if shell else {})
    if overrides.preset == "smoke" or own.train.device == "cpu":
        return 0
    gpus = len(process.visible_gpus())
    if gpus:
        return ranks_on(own, gpus)
    if own.train.device == "cuda":
        from vdvae.training import device_of

        device_of(own.train)  # before hours of making shards
    return 0


@contextlib.contextmanager
def _gpu(runs: Path, wanted: int) -> Iterator[None]:
    """GPUs of one's own while the block runs; where they are busy, a deployment's run steps back.

    It is Scheduled again and its process ends; the worker takes it up after a while.
    """
    if not wanted:
        yield
        return
    while (taken := process.take_gpus(runs, wanted)) is None:
        message = f"other runs have the GPUs, of which this one wants {wanted}"
        if in_engine():
            soon = datetime.now(UTC) + timedelta(seconds=_GPU_SECONDS)
            leave(Scheduled(name="AwaitingGPU", scheduled_time=soon, message=message))
        get_run_logger().info(
            f"other runs have the GPUs, of which this one wants {wanted}; waiting"
        )
        time.sleep(_GPU_SECONDS)
    names, locks = taken
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = names
    with locks:
        try:
            yield
        finally:
            if before is None:
                os.environ.pop("CUDA_VISIBLE_DEVICES")
            else:
                os.environ["CUDA_VISIBLE_DEVICES"] = before


def main(
    recipe: str,
    overrides: Overrides | None = None,
    name: str | None = None,
    settings: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Runs the flow from the shell, without a server of one's own.

    Without overrides it works in the checkout; with some, in a clone of it, whose results come
    back as a DVC experiment, of that name where one is given; `settings` are further ones of that
    run, `section.key: value`. Exits as the stage that failed did: 2 for bad input, 143 after a
    signal.
    """
    root = Path.cwd()
    try:
        if overrides is None:
            check_recipe(recipe)
        else:
            load_recipe(recipe)
            # The person at the shell may read what they may read; a form's data lie below roots.
            os.environ.setdefault("VDVAE_DATA_ROOTS", "/,s3://")
            experiment.share_places(root)
        with _workplace(root, overrides):
            shell = _Shell(recipe, overrides is not None, name, settings)
            _shell.set(shell)
            values = overrides.model_dump() if overrides else {}
            state = run_recipe(**values, return_state=True)
    except UserError as error:
        fail(error)
    except TerminationSignal:
        sys.exit(CANCELLED)
    finally:
        os.chdir(root)
    if state.is_cancelled():
        sys.exit(CANCELLED)
    if not state.is_completed():
        sys.exit(shell.exit_code)


@contextlib.contextmanager
def _workplace(root: Path, overrides: Overrides | None) -> Iterator[None]:
    runs = Places.from_env().runs
    process.reap(runs)
    with process.marked(runs) as folder:
        if overrides is None:
            yield
            return
        place = folder / root.name
        experiment.clone(root, place)
        os.chdir(place)
        try:
            yield
        finally:
            os.chdir(root)

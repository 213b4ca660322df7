"""Prefect flows: one task a DVC stage, in the order of the one graph, and what a page shows of it.

A deployment's run works in the clone that its pull step made. The shell's run works in the
checkout, or in a clone of its own where it has settings of its own. All three are this one flow.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import re
import shlex
import signal
import sys
import tempfile
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NoReturn

# Read by prefect when it is imported: nothing reports home.
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("DO_NOT_TRACK", "1")
# A run's own server has 20 seconds otherwise, which a busy machine does not keep.
os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")

from prefect import Flow, flow, get_client, get_run_logger, runtime, task
from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.cache_policies import NO_CACHE
from prefect.exceptions import Abort, TerminationSignal
from prefect.states import Cancelled, Failed, Scheduled, State

from pipeline import experiment, process
from pipeline.exits import AWAY, BAD_INPUT, CANCELLED, fail
from pipeline.launch import ranks_on
from pipeline.overrides import (
    OWN,
    BatchSize,
    Data,
    Evaluate,
    Gpus,
    LearningRate,
    Note,
    Overrides,
    Precision,
    Preset,
    Register,
    Sample,
    Seed,
    Steps,
    apply,
    own_values,
)
from pipeline.params import Places, load_recipe
from pipeline.registered import registration
from pipeline.repro import StageFailed, check_recipe, run_stage
from vdvae.config import UserError
from vdvae.files import read_json

# Prefect makes a pydantic model of the form, whose field `register` hides a method of its base.
warnings.filterwarnings("ignore", message='Field name "register"')

_REMEDY = "run it again"
_PARENT = os.getppid()  # of a deployment's run, its worker
_ATTEMPTS = 3  # of a stage whose process was lost, or whose network was
_PAUSE_SECONDS = (2, 10)  # before the second and the third
_AWAY_SECONDS = (30, 120)  # where a server did not answer, which may be starting again
_LINE_SECONDS = 1.0  # of the trainer's lines, one in this time goes to the log
_LINES_A_SECOND = 100  # of all others
_ARTIFACT_SECONDS = 2.0  # between two updates of the progress
_GPU_SECONDS = 15  # a run that waits for a GPU looks again after this time
_TOLERANCE = 1e-4  # bits/dim, on identical images and draws

_STEP = re.compile(
    r"step (?P<step>\d+)/(?P<steps>\d+)  bits/dim (?P<bits>\S+)  rate (?P<rate>\S+)  "
    r"distortion (?P<distortion>\S+)  .*?(?P<speed>\S+) img/s  eta (?P<left>.+?)(  |$)"
)


@dataclass(frozen=True)
class _Shell:
    """What the shell runs, where no deployment says it."""

    recipe: str
    in_clone: bool
    experiment: str | None = None  # its name, where the caller wants to find it again


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
def run_recipe(
    preset: Preset = "full",
    data: Data = "",
    steps: Steps = 0,
    batch_size: BatchSize = 0,
    learning_rate: LearningRate = 0.0,
    seed: Seed = OWN,
    precision: Precision = "recipe",
    gpus: Gpus = OWN,
    evaluate: Evaluate = True,
    sample: Sample = True,
    register: Register = True,
    note: Note = "",
) -> State[None] | None:
    """Makes shards, trains, evaluates, draws samples and registers a recipe's model.

    A field that is left alone changes nothing. The results arrive as a DVC experiment, an MLflow
    run and a version in the registry. Starting the same form again after a cancel goes on from the
    newest checkpoint.

    Args:
        preset: full: the recipe as it stands in params.yaml. smoke: a narrow, shallow variant at
            the true resolution, on the CPU in minutes; it shows that all works, while its
            pictures are still noise.
        data: empty: the recipe's own. Else a folder of images, file:///absolute/path on
            the worker's machine or s3://bucket/prefix, below a root that the service allows; they
            are split by fraction, 0.1 for validation and 0.1 for test, and cropped to the
            recipe's size.
        steps: training steps, to 10,000,000; 0: the recipe's own.
        batch_size: images a step, to 4,096; 0: the recipe's own.
        learning_rate: to 0.1; 0: the recipe's own.
        seed: of weights, order and noise, 0 to 2,147,483,647; -1: the recipe's own.
        precision: recipe: the recipe's own. fp32, the reference; bf16, faster; tf32, which needs a
            GPU. Figures are always measured in fp32.
        gpus: -1: the recipe's own; cuda, and auto where there is one, take every GPU that the
            batch parts into. 0: on the CPU. 1 to 8: on so many GPUs. The run has them to itself;
            others wait.
        evaluate: measure bits/dim on the validation and test images.
        sample: draw samples and reconstructions.
        register: make the model a version in the registry; needs evaluate and sample.
        note: free text, to 500 characters, kept with the experiment.
    """
    try:
        overrides = Overrides(
            preset=preset,
            data=data,
            steps=steps,
            batch_size=batch_size,
            learning_rate=learning_rate,
            seed=seed,
            precision=precision,
            gpus=gpus,
            evaluate=evaluate,
            sample=sample,
            register=register,
            note=note,
        )
        shell = _shell.get()
        return _run(_recipe(), overrides, in_clone=shell is None or shell.in_clone)
    except UserError as error:
        return Failed(message=_failure(BAD_INPUT, str(error)))


class _Forms:
    """The flow of each recipe's deployment: `run_recipe`, whose form says what is its own."""

    def __getattr__(self, recipe: str) -> Flow[..., Any]:
        made = run_recipe.with_options()
        # A recipe that does not do is the run's to refuse, in a sentence on its page.
        with contextlib.suppress(UserError):
            text = inspect.getdoc(run_recipe) or ""
            for name, value in own_values(recipe).items():
                before, field, rest = text.partition(f"\n    {name}: ")
                words, own, after = rest.partition("the recipe's own")
                text = f"{before}{field}{words}{own}, {value}{after}"
            made.__doc__ = text
        return made


forms = _Forms()


def _run(recipe: str, overrides: Overrides, in_clone: bool) -> State[None] | None:
    logger = get_run_logger()
    if _engine():
        process.end_with_parent(_PARENT)  # a worker that is killed leaves no flow
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
            if overrides.note:
                logger.info("note: %s", overrides.note)
        check_recipe(recipe)
        page = _Page(recipe, overrides.stages, places)
        for stage in overrides.stages:
            state = repro(stage, recipe, page, return_state=True)
            if not state.is_completed():
                page.end(stage, "failed")
                if state.is_cancelled() and _engine():
                    _leave(Cancelled(message=state.message))
                _settle(places)
                # A state of the flow's own: Prefect would sum up a task's as "1/1 states".
                ending = Cancelled if state.is_cancelled() else Failed
                return ending(message=state.message)
            page.end(stage, "done")
        if in_clone:
            shell = _shell.get()
            name = (shell and shell.experiment) or f"{_run_name()}-{uuid.uuid4().hex[:8]}"
            experiment.publish(name, recipe, overrides.stages, overrides.note)
            logger.info(
                "saved as experiment %s: 'dvc exp show' lists it, 'dvc exp apply %s' takes it over",
                name,
                name,
            )
    return None


@task(task_run_name="{stage}", cache_policy=NO_CACHE)
def repro(stage: str, recipe: str, page: _Page) -> State[None] | None:
    """Brings one stage up to date; what it prints goes to the run's log.

    A stage that was lost (killed, or a server it needs is away) is started up to three times and
    goes on where it was; bad input (exit code 2) and a signal are final.
    """
    logger = get_run_logger()
    for attempt in range(1, _ATTEMPTS + 1):
        say = _Throttle(logger.info)

        def on_line(line: str, say: _Throttle = say) -> None:
            if line:
                say(line)
                page.line(line)

        try:
            run_stage(stage, recipe, on_line)
            return None
        except StageFailed as error:
            if error.stopped:
                return _stopped(f"{error.stage} was stopped; the same run, started again, goes on")
            if error.code in (BAD_INPUT, CANCELLED) or attempt == _ATTEMPTS:
                # A state instead of the exception: its message is for people, a traceback is not.
                return Failed(message=str(error))
            logger.warning(
                "%s ended with exit code %s; starting it again (%s of %s)",
                error.stage,
                error.code,
                attempt + 1,
                _ATTEMPTS,
            )
            pauses = _AWAY_SECONDS if error.code == AWAY else _PAUSE_SECONDS
            time.sleep(pauses[attempt - 1])
        finally:
            say.flush()
    raise AssertionError("the last attempt returns")


def _stopped(message: str) -> State[None]:
    # While a stage ran, SIGTERM was ours, so Prefect has not taken note of a cancel: told to end
    # now, it would call the run Crashed first, at which its page stays, and Cancelled later.
    if _engine() and not _cancelling():
        os.kill(os.getpid(), signal.SIGTERM)  # the worker is going down: Prefect's to answer
        time.sleep(10)
    return Cancelled(message=message)


def _leave(state: State[None]) -> NoReturn:
    """Gives this flow run a state and ends its process, which Prefect then calls no error."""
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(uuid.UUID(str(runtime.flow_run.id)), state, force=True)
    leaving = Abort(state.name)
    leaving.state = state  # else the log says that it ended "in state Running"
    raise leaving


def _cancelling() -> bool:
    with contextlib.suppress(Exception), get_client(sync_client=True) as client:
        state = client.read_flow_run(uuid.UUID(str(runtime.flow_run.id))).state
        return state is not None and state.is_cancelling()
    return False


def _mark(runs: Path) -> contextlib.AbstractContextManager[object]:
    # The shell's run has marked itself before Prefect started a server for it.
    return process.marked(runs) if _engine() else contextlib.nullcontext()


def _settle(places: Places) -> None:
    from pipeline import tracking

    with contextlib.suppress(UserError):  # the stage's own failure matters more
        tracking.settle(places)


def _engine() -> bool:
    """Whether a worker started this process for one flow run."""
    return bool(os.environ.get("PREFECT__FLOW_RUN_ID"))


def _gpus_wanted(overrides: Overrides, recipe: str) -> int:
    """How many GPUs a run is to have to itself: the form's number, or what the recipe will use.

    Raises:
        UserError: the recipe's own device is one that this machine has not.
    """
    if overrides.gpus != OWN:
        return overrides.gpus
    own = load_recipe(recipe)
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
        if _engine():
            soon = datetime.now(UTC) + timedelta(seconds=_GPU_SECONDS)
            _leave(Scheduled(name="AwaitingGPU", scheduled_time=soon, message=message))
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


class _Throttle:
    """Passes lines on at a pace that a log can bear; the newest progress is never lost."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._said = self._window = -1e9
        self._count = self._left_out = 0
        self._held: str | None = None

    def __call__(self, line: str) -> None:
        now = time.monotonic()
        if _STEP.search(line):
            if now - self._said < _LINE_SECONDS:
                self._held = line
                return
            self._said, self._held = now, None
            self._say(line)
            return
        if now - self._window >= 1:
            self.flush()
            self._window, self._count = now, 0
        self._count += 1
        if self._count > _LINES_A_SECOND:
            self._left_out += 1
            return
        if self._held:
            self._say(self._held)
            self._held = None
        self._say(line)

    def flush(self) -> None:
        if self._held:
            self._say(self._held)
        if self._left_out:
            self._say(f"({self._left_out} more lines in that second)")
        self._held, self._left_out = None, 0


@dataclass
class _Page:
    """What the run's page shows: how far it is, then figures, pictures and links.

    A page that cannot be written is a warning, never the end of a run.
    """

    recipe: str
    stages: tuple[str, ...]
    places: Places
    _ended: dict[str, str] = field(default_factory=dict)
    _artifacts: dict[str, uuid.UUID] = field(default_factory=dict)
    _updated: float = -1e9
    _training: float = 0.0

    def __post_init__(self) -> None:
        self._progress()

    def line(self, line: str) -> None:
        """Takes a line that a stage printed."""
        found = _STEP.search(line)
        if not found:
            return
        now, last = time.monotonic(), found["step"] == found["steps"]
        self._training = int(found["step"]) / int(found["steps"])
        if now - self._updated < _ARTIFACT_SECONDS and not last:
            return
        self._updated = now
        rows = {
            "step": f"{found['step']} of {found['steps']}",
            "bits/dim": found["bits"],
            "rate, bits/dim": found["rate"],
            "distortion, bits/dim": found["distortion"],
            "images/s": found["speed"],
            "time left": found["left"],
        }
        # The artifacts tab shows the first line alone.
        first = f"step {rows['step']}, {found['bits']} bits/dim, {found['left']} left"
        table = "| | |\n|---|---|\n" + "\n".join(f"| {k} | {v} |" for k, v in rows.items())
        self._show("training", 100 * self._training, f"{first}\n\n{table}")
        self._progress()

    def end(self, stage: str, how: str) -> None:
        """Takes the end of a stage, and shows what it made."""
        self._ended[stage] = how
        self._progress()
        shown = {
            "train": self._link_run,
            "evaluate": self._table,
            "sample": self._pictures,
            "register": self._link_version,
        }
        if how == "done" and stage in shown:
            with _no_matter_what():
                shown[stage]()

    def _progress(self) -> None:
        # Training is nearly all of the time; the rest share a fifth.
        share = {name: 80.0 if name == "train" else 20 / (len(self.stages) - 1)
                 for name in self.stages}  # fmt: skip
        done = sum(share[name] for name, how in self._ended.items() if how == "done")
        if "train" not in self._ended:
            done += share["train"] * self._training
        stages = dict.fromkeys(self.stages, "") | self._ended
        waiting = [name for name, how in stages.items() if not how]
        if waiting and "failed" not in self._ended.values():
            stages[waiting[0]] = "running"
        # The artifacts tab shows the first line alone.
        first = ", ".join(f"{name} {how}" for name, how in stages.items() if how)
        rows = "\n".join(f"| {name} | {how} |" for name, how in stages.items())
        self._show("progress", done, f"{first}\n\n| stage | |\n|---|---|\n{rows}")

    def _show(self, key: str, percent: float, description: str) -> None:
        with _no_matter_what():
            if key in self._artifacts:
                update_progress_artifact(self._artifacts[key], percent, description)
            else:
                made = create_progress_artifact(percent, self._key(key), description)
                assert isinstance(made, uuid.UUID)
                self._artifacts[key] = made

    def _key(self, key: str) -> str:
        return f"{re.sub('[^a-z0-9]+', '-', self.recipe.lower())}-{key}"

    def _table(self) -> None:
        metrics = read_json(self.places.results(self.recipe) / "metrics.json", _REMEDY)
        rows = [
            {"split": split} | {name: round(value, 4) for name, value in figures.items()}
            for split, figures in metrics.items()
        ]
        create_table_artifact(rows, self._key("metrics"), "bits/dim by split")

    def _pictures(self) -> None:
        from pipeline.pictures import data_uri

        for name, title in (
            ("samples", "Samples"),
            ("reconstructions", "Reconstructions: latents up to each resolution, then the image"),
        ):
            uri = data_uri(self.places.results(self.recipe) / f"{name}.png")
            create_markdown_artifact(f"## {title}\n\n![{name}]({uri})\n", self._key(name), title)

    def _link_run(self) -> None:
        from pipeline.tracking import find_run

        found = find_run(self.places, self.places.results(self.recipe) / "run.json")
        if found:
            address = "#/experiments/{}/runs/{}".format(*found)
            self._link("mlflow-run", address, f"MLflow run {found[1]}")

    def _link_version(self) -> None:
        registered = registration(self.places, self.recipe)
        if registered is None:
            return
        name, version = registered["name"], registered["version"]
        text = f"{name} version {version}"
        if registered["alias"]:
            text += f", {registered['alias']}"
        self._link("registered-version", f"#/models/{name}/versions/{version}", text)

    def _link(self, key: str, address: str, text: str) -> None:
        from pipeline.tracking import without_credentials

        server = without_credentials(self.places.tracking_uri)
        if server.startswith(("http://", "https://")):
            link = f"{server.rstrip('/')}/{address}"
            create_link_artifact(link, text, self._key(key), text)
        else:
            how = f"mlflow ui --backend-store-uri {shlex.quote(server)} --host 127.0.0.1"
            create_markdown_artifact(f"{text}\n\n    {how}\n", self._key(key), text)


@contextlib.contextmanager
def _no_matter_what() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        get_run_logger().warning("the page is not up to date: %s: %s", type(error).__name__, error)


@flow(name="evaluate-champion", flow_run_name="{recipe}-champion")
def evaluate_champion(recipe: str) -> State[None] | None:
    """Scores the champion of a recipe once more on its test images, with the same draws.

    Fails where any image's figure is not the one that was recorded when the model was registered.

    Args:
        recipe: its name in params.yaml; the model is vdvae-<recipe>.
    """
    try:
        if _engine():
            process.end_with_parent(_PARENT)
            experiment.share_places(experiment.origin_of_clone())
        return _rescore(recipe)
    except UserError as error:
        return Failed(message=_failure(BAD_INPUT, str(error)))


def _rescore(recipe_name: str) -> State[None] | None:
    logger = get_run_logger()
    recipe, places = load_recipe(recipe_name), Places.from_env()

    import vdvae
    from pipeline.shards import Manifest, ShardReader
    from pipeline.storage import open_store
    from pipeline.versions import fetch_champion, read_per_image
    from vdvae.evaluate import evaluate
    from vdvae.precision import exact_float32

    with tempfile.TemporaryDirectory() as folder:
        champion = fetch_champion(recipe_name, recipe.register.alias, places, Path(folder))
        version = champion.version
        logger.info("%s", version)
        recorded = read_per_image(champion.per_image, "test")
        manifest = Manifest.load(champion.manifest)
        model = vdvae.load(champion.model)
    exact_float32()
    reader = ShardReader(manifest, open_store(places.store_url), "test")
    batches = reader.scan(recipe.evaluate.batch_size)
    images = manifest.splits["test"].images
    scores = evaluate(model, batches, version.seed, images, passes=version.passes)
    found = dict(zip(scores.keys, scores.bits_per_dim_B.tolist(), strict=True))
    if found.keys() != recorded.keys():
        return Failed(
            message=f"{version}: {len(recorded)} figures are "
            f"recorded, of other images than the {len(found)} of its manifest"
        )
    worst = max(found, key=lambda key: abs(found[key] - recorded[key]))
    difference = abs(found[worst] - recorded[worst])
    rows = [
        {
            "model": version.name,
            "version": version.number,
            "images": len(found),
            "bits_per_dim": sum(found.values()) / len(found),
            "recorded": sum(recorded.values()) / len(recorded),
            "greatest_difference": difference,
            "image": worst,
        }
    ]
    create_table_artifact(rows, f"{recipe_name}-champion", "test, bits/dim")
    if not difference <= _TOLERANCE:
        return Failed(
            message=f"{version}: test image {worst} has "
            f"{found[worst]:.6f} bits/dim, recorded were {recorded[worst]:.6f}; more than "
            f"{_TOLERANCE:g} apart: the model, the images or the arithmetic have changed"
        )
    logger.info("%s test images, greatest difference %.1e bits/dim", len(found), difference)
    return None


def _failure(code: int, sentence: str) -> str:
    return f"{sentence} (exit code {code})"


def main(recipe: str, overrides: Overrides | None = None, name: str | None = None) -> None:
    """Runs the flow from the shell, without a server of one's own.

    Without overrides it works in the checkout; with some, in a clone of it, whose results come
    back as a DVC experiment, of that name where one is given. Exits as the stage that failed did:
    2 for bad input, 143 after a signal.
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
            _shell.set(_Shell(recipe, overrides is not None, name))
            values = asdict(overrides) if overrides else {}
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
        found = re.search(r"exit code (\d+)", state.message or "")
        sys.exit(int(found[1]) if found else 1)


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


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m pipeline.flows RECIPE")
    main(sys.argv[1])

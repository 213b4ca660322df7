"""The words of `vdvae`. At the start this imports little: each does its own imports."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from pipeline.cli.models import models
from pipeline.cli.words import Folder, Json, Recipe, given, group, option, with_overrides, word
from vdvae import __version__
from vdvae.config import UserError
from vdvae.files import path_of

app = group("Very deep VAEs (Child 2021): from images to a registered model.")
recipe = group("Recipes of params.yaml.")
published = group("The authors' checkpoints.")
app.add_typer(models, name="models")
app.add_typer(recipe, name="recipe")
app.add_typer(published, name="published")


def _version(asked: bool) -> None:
    if asked:
        print(f"vdvae {__version__}")
        raise typer.Exit


@app.callback()
def _app(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="The version.")
    ] = False,
) -> None:
    pass


@word(app, "run", "vdvae run digits", "vdvae run cifar10 --steps 2000 --gpus 1 --note 'a try'")
@with_overrides()
def _run(recipe: Recipe, **overrides: Any) -> None:
    """Shard, train, evaluate, sample and register a recipe.

    With settings of its own the run works in a clone and comes back as a DVC experiment; what is
    left out is the recipe's own.
    """
    from pipeline.flows.overrides import Overrides
    from pipeline.flows.run_recipe import main as run_flow

    chosen = given(overrides)
    run_flow(recipe, Overrides(**chosen) if chosen else None)


@word(app, "seeds", "vdvae seeds digits --seeds 0,1,2", "vdvae seeds digits --seeds 0,1 --steps 90")
@with_overrides("seed", "evaluate")
def _seeds(
    recipe: Recipe,
    seeds: Annotated[str, option("Two or more, as in 0,1,2.")],
    jobs: Annotated[int, option("Runs at once.", min=1, max=64)] = 1,
    **overrides: Any,
) -> None:
    """One run a seed; mean and spread over the seeds."""
    from pipeline.commands.seeds import parse_seeds, run_seeds

    run_seeds(recipe, parse_seeds(seeds), given(overrides), jobs, print)


@word(app, "study", "vdvae study depth --jobs 2", "vdvae study depth --mini --dry-run")
def _study(
    name: Annotated[str, typer.Argument(metavar="NAME", help="In studies of params.yaml.")],
    mini: Annotated[bool, option("The short version: smaller, fewer seeds.", "--mini")] = False,
    jobs: Annotated[int, option("Cells at once.", min=1, max=64)] = 1,
    dry_run: Annotated[bool, option("Only list the cells.", "--dry-run")] = False,
) -> None:
    """Train what a study of the paper's claims lacks, compare, judge."""
    from pipeline.commands.study import study

    study(name, mini, jobs, dry_run)


@word(app, "show", "vdvae show digits", "vdvae show digits --json | jq .test.bits_per_dim")
def _show(recipe: Recipe, as_json: Json = False) -> None:
    """The figures of a recipe, and where to look further."""
    from pipeline.commands.show import show

    show(recipe, as_json)


@word(app, "report", "vdvae report", "vdvae report --no-model")
def _report(
    no_model: Annotated[bool, option("Leave out what models draw: quicker.", "--no-model")] = False,
) -> None:
    """One HTML page about all recipes with results."""
    from pipeline.params import Places
    from pipeline.report.page import REPORT, write_report

    def tell(sentence: str) -> None:
        print(f"note: {sentence}", file=sys.stderr)

    write_report(Places.from_env(), tell, with_model=not no_model)
    print(f"{REPORT}: {REPORT.stat().st_size / 1e6:.2f} MB; open it in any browser")


@word(app, "check", "vdvae check")
def _check() -> None:
    """Check every recipe and study of params.yaml."""
    from pipeline.params import load_recipe, read_params

    recipes = read_params()["recipes"]
    for name in recipes:
        load_recipe(name)
    print(f"params.yaml: {len(recipes)} recipes are well formed: {', '.join(recipes)}")
    if studies := read_params()["studies"]:
        from pipeline.studies.declaration import load_study

        for name in studies:
            load_study(name)
        print(f"params.yaml: {len(studies)} studies are well formed: {', '.join(studies)}")


@word(app, "settings", "vdvae settings", "vdvae settings --json")
def _settings(
    as_json: Json = False,
    markdown: Annotated[bool, option("As the table in docs/.", "--markdown")] = False,
) -> None:
    """What the environment sets: each variable's value in effect, default and meaning."""
    from pipeline.commands.settings import settings

    settings(as_json, markdown)


@word(app, "services", "vdvae services start", "vdvae services start --s3 --mlflow-port 5001")
def _services(
    action: Annotated[Literal["start", "stop", "status"], typer.Argument()],
    prefect_port: Annotated[int | None, option("Not $VDVAE_PREFECT_PORT.")] = None,
    mlflow_port: Annotated[int | None, option("Not $VDVAE_MLFLOW_PORT.")] = None,
    s3_port: Annotated[int | None, option("Not $VDVAE_S3_PORT.")] = None,
    s3: Annotated[bool, option("With a local S3 server for the store.", "--s3")] = False,
) -> None:
    """Prefect, MLflow and a worker: start, stop, status."""
    from pipeline import services

    ports = {"prefect_port": prefect_port, "mlflow_port": mlflow_port, "s3_port": s3_port}
    services.run(action, **ports, s3=s3)


@word(app, "describe", "vdvae describe imagenet64", "vdvae describe cifar10 --batch 8")
def _describe(
    recipe: Recipe,
    batch: Annotated[
        int | None, option("Images a step; by default the recipe's own.", min=1)
    ] = None,
) -> None:
    """A recipe's model before it is made: blocks, arithmetic, memory."""
    from pipeline.commands.describe import describe

    describe(recipe, batch)


@word(app, "plan", "vdvae plan cifar10 --no-probe --json", "vdvae plan --study depth")
def _plan(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="Its name in params.yaml.")] = "",
    study: Annotated[str, option("A study instead of a recipe.", metavar="NAME")] = "",
    mini: Annotated[bool, option("Its short version.", "--mini")] = False,
    no_probe: Annotated[bool, option("Leave out ten steps of training.", "--no-probe")] = False,
    as_json: Json = False,
) -> None:
    """What a recipe or a study will cost here: arithmetic, memory, disk, hours, what reruns."""
    from pipeline.commands.output import print_json
    from pipeline.commands.plan import plan
    from pipeline.commands.study import plan_study

    if bool(recipe) == bool(study):
        raise UserError("plan: name a recipe, or a study with --study NAME")
    if mini and not study:
        raise UserError("plan: --mini is of a study; name one with --study NAME")
    probe = not no_probe
    lines = plan_study(study, mini, probe) if study else plan(recipe, probe)
    if as_json:
        print_json(dict(lines))
        return
    for label, text in lines:
        print(f"{label:18}  {text}", flush=True)


@word(recipe, "new", "vdvae recipe new mine --data ~/pictures --size 64")
def _new(
    name: str,
    data: Annotated[str, option("A folder, or s3://bucket/prefix, of images.")],
    size: Annotated[int, option("Pixels a side, cropped to.")],
    channels: Annotated[
        int | None, option("1 or 3; by default what the images have.", min=1, max=3)
    ] = None,
    levels: Annotated[int, option("Grey levels.")] = 256,
    memory: Annotated[
        float | None, option("By default the GPU's, or the RAM.", metavar="GIB")
    ] = None,
    batch: Annotated[int | None, option("Images a step; by default what fits, to 32.")] = None,
    unreadable: Annotated[
        Literal["refuse", "skip"], option("Files that are no images.")
    ] = "refuse",
    active: Annotated[bool, option("Let a bare 'dvc repro' rebuild it too.", "--active")] = False,
) -> None:
    """Append a recipe for images of your own."""
    from pipeline.commands.new_recipe import new_recipe

    made = new_recipe(
        name,
        data,
        size,
        channels=channels,
        levels=levels,
        memory_gib=memory,
        batch_size=batch,
        unreadable=unreadable,
        activate=active,
    )
    print(made)


@word(app, "evaluate", "vdvae evaluate digits --precision fp32,bf16")
def _evaluate(
    recipe: Recipe,
    precision: Annotated[str, option("Some of fp32,tf32,bf16, separated by commas.")],
    split: Annotated[Literal["validation", "test"], typer.Option()] = "test",
) -> None:
    """What a lower precision does to a model's figures, image by image."""
    from pipeline.commands.precision import audit_precision

    audit_precision(recipe, precision.split(","), split)


@word(
    published,
    "import",
    "vdvae published import cifar10 --seed 1",
    "vdvae published import ffhq256 --file ffhq256-iter-1700000-model-ema.th",
)
def _import(
    recipe: Recipe,
    file: Annotated[
        Path | None, option("Not fetched: it is here.", parser=path_of, metavar="FILE")
    ] = None,
    url: Annotated[str | None, option("Instead of the published address.")] = None,
    seed: Annotated[int, option("Of the four CIFAR-10 models: 0 to 3.")] = 0,
) -> None:
    """Fetch or read one, measure it, register it with the alias 'published'."""
    from pipeline.commands.published import import_published

    done = import_published(recipe, file=file, url=url, seed=seed)
    print(f"registered {done.name} version {done.version} ({done.decision})")


@word(app, "fetch", "vdvae fetch cifar10", "vdvae fetch imagenet32 --mirror https://my.host/files")
def _fetch(
    data: Literal["cifar10", "fashion-mnist", "imagenet32", "imagenet64", "ffhq256"],
    mirror: Annotated[
        str | None, option("Where files of the same names are, not the published one.")
    ] = None,
) -> None:
    """Bring a data set's raw files to where its recipe looks for them."""
    from pipeline.sources.fetch import SUMS, fetch_data

    for path in fetch_data(data, mirror):
        print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB, sha256 as in {SUMS}")


@word(app, "du", "vdvae du", "vdvae du --json")
def _du(as_json: Json = False) -> None:
    """What takes space in store, runs, cache and MLflow."""
    from pipeline.commands.space import du

    du(as_json)


@word(app, "gc", "vdvae gc", "vdvae gc --older-than 168 --yes")
def _gc(
    yes: Annotated[bool, option("Remove it.", "--yes")] = False,
    older_than: Annotated[
        int, option("Spare the younger.", metavar="HOURS", min=0, max=999_999)
    ] = 24,
) -> None:
    """List what nothing needs; --yes removes it."""
    from pipeline.commands.space import gc

    gc(older_than, yes)


@word(app, "info", "vdvae info results/digits/model")
def _info(folder: Folder) -> None:
    """What a model's folder holds."""
    from pipeline.commands.describe import info

    info(folder)

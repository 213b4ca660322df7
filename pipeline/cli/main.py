"""The console command `vdvae`. At the start it imports nothing but the standard library."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pipeline import services
from pipeline.cli import models as models_cli
from pipeline.system.exits import as_a_command
from vdvae import UserError, __version__
from vdvae.files import MOST_JSON_BYTES, open_regular, parse_json, path_of, read_csv, read_json

_EXTRA = "this needs more than the model library; run: pip install 'vdvae[pipeline]'"


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the words and runs the command; exits with 2 for the user's errors."""
    with as_a_command():
        _main(arguments)


def _main(arguments: Sequence[str] | None) -> None:
    parser = argparse.ArgumentParser(prog="vdvae", description="Very deep VAEs (Child 2021).")
    parser.add_argument("--version", action="version", version=f"vdvae {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="shard, train, evaluate, sample and register a recipe")
    run.add_argument("recipe")
    _add_settings(run)
    several = commands.add_parser("seeds", help="one run a seed; mean and spread over the seeds")
    several.add_argument("recipe")
    several.add_argument("--seeds", required=True, help="two or more, as in 0,1,2")
    _add_settings(several, leave_out=("seed", "evaluate"))
    show = commands.add_parser("show", help="the figures of a recipe, and where to look further")
    show.add_argument("recipe")
    report = commands.add_parser("report", help="one HTML page about all recipes with results")
    report.add_argument(
        "--no-model", action="store_true", help="leave out what is drawn with the models: quicker"
    )
    commands.add_parser("check", help="check every recipe of params.yaml")
    serve = commands.add_parser(
        "services", help="Prefect, MLflow and a worker: start, stop, status"
    )
    services.add_arguments(serve)
    models = commands.add_parser("models", help="registered models: list, show, use, move aliases")
    models_cli.add_arguments(models)
    describe = commands.add_parser(
        "describe", help="a recipe's model before it is made: blocks, arithmetic, memory"
    )
    describe.add_argument("recipe")
    describe.add_argument("--batch", type=int, help="images a step; by default the recipe's own")
    plan = commands.add_parser(
        "plan", help="what a recipe will cost here: arithmetic, memory, disk, hours, what reruns"
    )
    plan.add_argument("recipe")
    plan.add_argument("--no-probe", action="store_true", help="leave out ten steps of training")
    recipe = commands.add_parser("recipe", help="recipes of params.yaml")
    words_of_recipe = recipe.add_subparsers(dest="action", required=True, metavar="new")
    new = words_of_recipe.add_parser("new", help="append a recipe for images of your own")
    new.add_argument("name")
    new.add_argument("--data", required=True, help="a folder, or s3://bucket/prefix, of images")
    new.add_argument("--size", type=int, required=True, help="pixels a side, cropped to")
    new.add_argument("--channels", type=int, choices=(1, 3), help="by default what the images have")
    new.add_argument("--levels", type=int, default=256, help="grey levels (256)")
    new.add_argument("--memory", type=float, metavar="GIB", help="by default the GPU's, or the RAM")
    new.add_argument("--batch", type=int, help="images a step; by default what fits, to 32")
    new.add_argument(
        "--unreadable",
        choices=("refuse", "skip"),
        default="refuse",
        help="files that are no images",
    )
    new.add_argument("--active", action="store_true", help="let a bare 'dvc repro' rebuild it too")
    audit = commands.add_parser(
        "evaluate", help="what a lower precision does to a model's figures, image by image"
    )
    audit.add_argument("recipe")
    audit.add_argument(
        "--precision", required=True, help="some of fp32,tf32,bf16, separated by commas"
    )
    audit.add_argument("--split", default="test", choices=("validation", "test"))
    published = commands.add_parser("published", help="the authors' checkpoints")
    words_of_published = published.add_subparsers(dest="action", required=True, metavar="import")
    bring = words_of_published.add_parser(
        "import", help="fetch or read one, measure it, register it with the alias 'published'"
    )
    bring.add_argument("recipe")
    bring.add_argument("--file", type=path_of, help="on this machine, instead of fetching it")
    bring.add_argument("--url", help="instead of the published address")
    bring.add_argument("--seed", type=int, default=0, help="of the four CIFAR-10 models: 0 to 3")
    fetch = commands.add_parser(
        "fetch", help="bring a data set's raw files to where its recipe looks for them"
    )
    fetch.add_argument("data", choices=("cifar10", "imagenet32", "imagenet64", "ffhq256"))
    fetch.add_argument("--mirror", help="where files of the same names are, not the published one")
    commands.add_parser("du", help="what takes space in store, runs, cache and MLflow")
    free = commands.add_parser("gc", help="list what nothing needs; --yes removes it")
    free.add_argument("--yes", action="store_true", help="remove it")
    free.add_argument(
        "--older-than", type=_hours, default=24, metavar="HOURS", help="spare the younger (24)"
    )
    about = commands.add_parser("info", help="what a model's folder holds")
    about.add_argument("folder", type=path_of)

    words = parser.parse_args(arguments)
    run_command: dict[str, Callable[[argparse.Namespace], None]] = {
        "run": _run, "seeds": _seeds, "show": _show, "report": _report, "check": _check,
        "services": services.run,
        "info": _info, "models": models_cli.run, "describe": _describe,
        "published": _published, "evaluate": _evaluate, "fetch": _fetch, "du": _du, "gc": _gc,
        "plan": _plan, "recipe": _recipe,
    }  # fmt: skip
    try:
        run_command[words.command](words)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("vdvae", "pipeline"):
            raise  # a fault of ours, not a missing extra
        raise UserError(f"{error.name} is not installed: {_EXTRA}") from None


def _add_settings(run: argparse.ArgumentParser, leave_out: Sequence[str] = ()) -> None:
    # The values are checked by pipeline/flows/overrides.py, which is the one owner of their bounds.
    settings = run.add_argument_group(
        "settings of this run alone",
        "with any of them the run works in a clone and comes back as a DVC experiment; what is "
        "left out is the recipe's own",
    )
    for name, kind, text in (
        ("preset", str, "full | smoke: narrow and shallow at the true resolution, for a CPU"),
        ("data", str, "file:///folder or s3://bucket/prefix of images, not the recipe's own"),
        ("steps", int, "training steps"),
        ("batch-size", int, "images a step"),
        ("learning-rate", float, ""),
        ("seed", int, "of weights, order and noise"),
        ("precision", str, "of training: fp32 | bf16 | tf32, which needs a GPU"),
        ("gpus", int, "0: on the CPU; 1 to 8: on so many GPUs"),
        ("note", str, "free text, kept with the experiment"),
    ):
        if name not in leave_out:
            settings.add_argument(f"--{name}", type=kind, help=text, default=argparse.SUPPRESS)
    for name in ("evaluate", "sample", "register"):
        if name not in leave_out:
            settings.add_argument(
                f"--{name}", action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS
            )


def _hours(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 7):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to 999999")
    return int(text)


def _fetch(words: argparse.Namespace) -> None:
    from pipeline.sources.fetch import SUMS, fetch_data

    for path in fetch_data(words.data, words.mirror):
        print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB, sha256 as in {SUMS}")


def _du(words: argparse.Namespace) -> None:
    from pipeline.commands.space import du

    du()


def _gc(words: argparse.Namespace) -> None:
    from pipeline.commands.space import gc

    gc(words.older_than, words.yes)


def _run(words: argparse.Namespace) -> None:
    from pipeline.flows.overrides import Overrides
    from pipeline.flows.run_recipe import main as run_flow

    chosen = {key: v for key, v in vars(words).items() if key not in ("command", "recipe")}
    run_flow(words.recipe, Overrides(**chosen) if chosen else None)


def _seeds(words: argparse.Namespace) -> None:
    from pipeline.commands.seeds import parse_seeds, run_seeds

    seeds = parse_seeds(words.seeds)
    settings = {k: v for k, v in vars(words).items() if k not in ("command", "recipe", "seeds")}
    run_seeds(words.recipe, seeds, settings)


def _report(words: argparse.Namespace) -> None:
    from pipeline.params import Places
    from pipeline.report.page import REPORT, write_report

    def tell(sentence: str) -> None:
        print(f"note: {sentence}", file=sys.stderr)

    write_report(Places.from_env(), tell, with_model=not words.no_model)
    print(f"{REPORT}: {REPORT.stat().st_size / 1e6:.2f} MB; open it in any browser")


def _check(words: argparse.Namespace) -> None:
    from pipeline.params import load_recipe, read_params

    recipes = read_params()["recipes"]
    for name in recipes:
        load_recipe(name)
    print(f"params.yaml: {len(recipes)} recipes are well formed: {', '.join(recipes)}")


def _describe(words: argparse.Namespace) -> None:
    from pipeline.params import load_recipe
    from vdvae.summary import summarise

    recipe = load_recipe(words.recipe)
    batch = recipe.train.batch_size if words.batch is None else words.batch
    if batch < 1:
        raise UserError(f"--batch: {batch} images cannot be trained on; ask for at least 1")
    found = summarise(recipe.model)
    table = "{:>10}  {:>7}  {:>7}  {:>5}  {:>10}  {:>8}  {:>11}  {:>7}"
    heads = ("resolution", "encoder", "decoder", "width", "latents", "share", "parameters", "GFLOP")
    print(table.format(*heads))
    for row in found.rows:
        print(
            table.format(
                row.resolution,
                row.encoder_blocks,
                row.decoder_blocks,
                row.width,
                f"{row.latents:,}",
                f"{100 * row.latent_share:.4f}%",
                f"{row.parameters:,}",
                f"{row.forward_flop / 1e9:.2f}",
            )
        )
    print(
        f"{recipe.name}: {found.parameters:,} parameters, {found.encoder_blocks} encoder blocks, "
        f"{found.decoder_blocks} stochastic layers, {found.latents:,} latents an image; share: of "
        f"the latents up to that resolution\n"
        f"GFLOP an image: bound {found.forward_flop / 1e9:.1f}, training step "
        f"{found.training_flop / 1e9:.1f}, sample {found.sampling_flop / 1e9:.1f}\n"
        f"a training step of {batch} images in float32 holds about "
        f"{found.training_bytes(batch) / 2**30:.1f} GiB (weights, gradients, moments, average, "
        f"activations), a model {4 * found.parameters / 2**20:.0f} MiB"
    )


def _plan(words: argparse.Namespace) -> None:
    from pipeline.commands.plan import plan

    for label, text in plan(words.recipe, probe=not words.no_probe):
        print(f"{label:18}  {text}", flush=True)


def _recipe(words: argparse.Namespace) -> None:
    from pipeline.commands.new_recipe import new_recipe

    made = new_recipe(
        words.name,
        words.data,
        words.size,
        channels=words.channels,
        levels=words.levels,
        memory_gib=words.memory,
        batch_size=words.batch,
        unreadable=words.unreadable,
        activate=words.active,
    )
    name, model, train = made.recipe.name, made.recipe.model, made.recipe.train
    print(
        f"params.yaml: recipes.{name}: {made.images:,} images, {model.image_channels} channels, "
        f"mean and standard deviation of {made.normalised_by}\n"
        f"  encoder {model.encoder}\n"
        f"  decoder {model.decoder}\n"
        f"  width {model.width}, {train.steps:,} steps of {train.batch_size} images\n"
        f"next:\n"
        f"  vdvae plan {name}"
    )
    if name in made.active:
        print(f"  dvc repro register@{name}")
    else:
        print(f"  dvc exp run -S 'active=[{','.join([*made.active, name])}]'")


def _evaluate(words: argparse.Namespace) -> None:
    from pipeline.commands.precision import audit_precision

    audit_precision(words.recipe, words.precision.split(","), words.split)


def _published(words: argparse.Namespace) -> None:
    from pipeline.commands.published import import_published

    done = import_published(words.recipe, file=words.file, url=words.url, seed=words.seed)
    print(f"registered {done.name} version {done.version} ({done.decision})")


def _info(words: argparse.Namespace) -> None:
    import vdvae

    model = vdvae.load(words.folder)
    config = model.config
    print(f"{len(config.latent_shapes)} stochastic layers, {config.num_latents} latents an image")
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    print(json.dumps(config.to_dict(), indent=2))


def _show(words: argparse.Namespace) -> None:
    try:
        _show_results(words)
    except UserError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError) as error:  # a figure that is none
        raise UserError(
            f"results/{words.recipe}: what is there is damaged ({error}); run 'dvc checkout', or "
            f"'dvc repro -f -s evaluate@{words.recipe}' and the same of register"
        ) from None


def _show_results(words: argparse.Namespace) -> None:
    from pipeline.params import Places, load_recipe
    from pipeline.registry.receipt import registration, remedy
    from vdvae.files import sha256_of

    name = words.recipe
    load_recipe(name)
    places = Places.from_env()
    results = places.results(name)
    metrics = _read(results / "metrics.json", name)
    conditions = _read(results / "conditions.json", name)
    registered = registration(places, name)
    rows: list[tuple[str, str]] = []
    if conditions.get("weights_sha256") != sha256_of(places.weights(name)):
        again = f"run 'dvc repro evaluate@{name}'"
        rows.append(("note", f"these figures are not of the model that lies here now; {again}"))
    for split in ("validation", "test"):
        figures = metrics[split]
        rows += [
            (
                f"{split}, bits/dim",
                f"{figures['bits_per_dim']:.4f} ± {figures['bits_per_dim_se']:.4f}"
                f"  over {figures['images']} images",
            ),
            ("  rate", f"{figures['rate_bits_per_dim']:.4f}"),
            ("  distortion", f"{figures['distortion_bits_per_dim']:.4f}"),
        ]
    curves = read_csv(results / "curves.csv", f"run 'dvc checkout' or 'dvc repro train@{name}'")
    speeds = sorted(float(row["images_per_second"]) for row in curves)
    rows += [
        ("parameters", f"{_parameters(places.weights(name)):,}"),
        ("images/s in training", f"{speeds[len(speeds) // 2]:.0f} (median of intervals)"),
    ]
    if registered:
        alias = registered["alias"] or "no alias: another version is better on validation"
        rows += [
            ("MLflow run", registered["mlflow_run_id"]),
            ("registered", f"{registered['name']} version {registered['version']} ({alias})"),
        ]
    else:
        rows.append(("registered", f"not registered; {remedy(name)}"))
    rows += [
        ("samples", str((results / "samples.png").absolute())),
        ("reconstructions", str((results / "reconstructions.png").absolute())),
    ]
    width = max(len(label) for label, _ in rows)
    print(f"\n{name}\n" + "\n".join(f"  {label:{width}}  {value}" for label, value in rows))
    print(
        f"\nlook further, after '. .venv/bin/activate':\n"
        f"  dvc metrics show\n"
        f"  mlflow ui --backend-store-uri {shlex.quote(places.tracking_uri)} --host 127.0.0.1\n"
        f"  prefect server start --host 127.0.0.1    and, in another shell,\n"
        f"  PREFECT_API_URL=http://127.0.0.1:4200/api vdvae run {name}"
    )


def _read(path: Path, recipe: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = read_json(path, f"run 'dvc repro -f -s evaluate@{recipe}'")
    except FileNotFoundError:
        raise UserError(f"{path}: not found; run 'dvc repro evaluate@{recipe}'") from None
    return found


def _parameters(weights: Path) -> int:
    import math

    # The header of a safetensors file: its length, then JSON with every array's shape.
    remedy = "copy the model again"
    with open_regular(weights, remedy) as file:
        length = min(int.from_bytes(file.read(8), "little"), MOST_JSON_BYTES)
        header = parse_json(file.read(length), str(weights), remedy)
    return sum(math.prod(array["shape"]) for key, array in header.items() if key != "__metadata__")

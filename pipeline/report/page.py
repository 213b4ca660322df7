"""One HTML file about all recipes with results, which asks nobody for anything.

It shows what is in results/<recipe>/ and draws the rest with the model there. What is missing or
does not belong together is said on the page, not passed over. The page holds no path of this
machine: errors, which name paths, go to the terminal alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2

from pipeline import tracking
from pipeline.dvc import LOCK, damaged, lock_entries
from pipeline.params import Places, Recipe, load_recipe, read_params
from pipeline.registry.receipt import registration, remedy
from pipeline.report.charts import DARK, LIGHT, line_style
from pipeline.report.figures import (
    draw_samples,
    open_model,
    picture,
    sample_title,
    score_layers,
    svg_uri,
    training_figures,
)
from pipeline.report.table2 import TABLE_2, DataSet, data_set_of, why_not_comparable
from pipeline.shards import Manifest
from vdvae import __version__
from vdvae.config import AnyModelConfig, PixelCNNConfig, UserError, model_config_of
from vdvae.files import atomic_write, read_json, sha256_of

REPORT = Path("results/report.html")
_SPLITS = ("test", "validation")
_OF_A_STUDY = (  # what the page shows of its table
    "study", "mini", "claim", "paper", "recipe", "verdict", "level", "variants", "comparisons",
    "cells",
)  # fmt: skip
_FIGURES = (
    "bits_per_dim",
    "bits_per_dim_se",
    "rate_bits_per_dim",
    "distortion_bits_per_dim",
    "images",
)

Facts = dict[str, Any]


def write_report(
    places: Places, tell: Callable[[str], None], path: Path = REPORT, *, with_model: bool = True
) -> None:
    """Writes the page and logs it to the MLflow run of each recipe on it.

    Args:
        tell: gets a sentence for each thing that is not on the page, or not logged, and why.
        path: of the page; it appears whole.
        with_model: also what must be drawn: samples by temperature, rate by layer. It takes seconds
            for small models, up to a minute or two for a large one on a CPU.

    Raises:
        UserError: no recipe has results, or what is there is damaged.
    """
    recipes = [load_recipe(name) for name in read_params()["recipes"]]
    done = [recipe for recipe in recipes if _has_results(places.results(recipe.name))]
    studies = _studies(places.results_root / "studies")
    if not done and not studies:
        raise UserError("results: no recipe has any yet; run 'dvc repro'")
    runs = _runs(places, [recipe.name for recipe in done], tell)
    parts = [_part(recipe, places, runs.get(recipe.name, {}), tell, with_model) for recipe in done]
    page = _rendered(
        parts=parts,
        rows=_rows(parts, [recipe for recipe in recipes if recipe not in done]),
        table_2=TABLE_2,
        light=LIGHT,
        dark=DARK,
        studies=studies,
        line_style=line_style,
        version=__version__,
        written=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
    )
    atomic_write(path, page)
    for name, run in runs.items():
        try:
            with tracking.mlflow_errors(places.tracking_uri):
                tracking.connect(places.tracking_uri).log_artifact(run["id"], str(path))
        except UserError as error:
            tell(f"{name}: the page is not logged: {error}")


def _studies(folder: Path) -> list[Facts]:
    """Each study's table and figure, as they lie there."""
    studies = []
    for path in sorted(folder.glob("*/table.json")):
        table, conditions = _read(path), _read(path.with_name("conditions.json"))
        if not {*_OF_A_STUDY} <= table.keys() or not {"data", "precision"} <= conditions.keys():
            raise UserError(f"{path}: is no study's table; run 'vdvae study {path.parent.name}'")
        figure = svg_uri(path.with_name("figure.svg"))
        ladder = picture(path.with_name("reconstructions.png"))
        facts = {"conditions": conditions, "figure": figure, "reconstructions": ladder}
        studies.append(table | facts)
    return studies


def _has_results(results: Path) -> bool:
    return any((results / name).exists() for name in ("metrics.json", "curves.csv"))


def _rendered(**facts: Any) -> str:
    try:
        return _template().render(**facts)
    except (jinja2.UndefinedError, TypeError, ValueError) as error:
        raise UserError(
            f"results: a file there is not as it was written ({error}); make the recipe's or the "
            f"study's results again"
        ) from None


def _template() -> jinja2.Template:
    # Whatever comes from a file is text and is escaped; a name that the page lacks is an error.
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html")


def _runs(places: Places, names: list[str], tell: Callable[[str], None]) -> dict[str, Facts]:
    """What MLflow knows of each recipe's run: id, tags, metrics. One that is away is told once."""
    runs: dict[str, Facts] = {}
    try:
        for name in names:
            file = places.results(name) / "run.json"
            found = tracking.find_run(places, file) if file.exists() else None
            if found is None:
                tell(f"{name}: MLflow has no run of it, so the page is not logged there")
                continue
            with tracking.mlflow_errors(places.tracking_uri):
                data = tracking.connect(places.tracking_uri).get_run(found[1]).data
            runs[name] = {"id": found[1], "tags": data.tags, "metrics": data.metrics}
    except UserError as error:
        tell(f"the page is not logged: {error}")
        return {}
    return runs


def _part(
    recipe: Recipe, places: Places, run: Facts, tell: Callable[[str], None], with_model: bool
) -> Facts:
    """Everything the page says about one recipe."""
    name, results = recipe.name, places.results(recipe.name)
    metrics = _figures(results / "metrics.json", name)
    conditions = _read(results / "conditions.json")
    settings = _settings(recipe)
    config, weights = recipe.model, places.weights(name)
    has_model = weights.exists() and (places.model(name) / "config.json").exists()
    if has_model:
        config_file = places.model(name) / "config.json"
        config = model_config_of(_read(config_file), where=str(config_file))
    manifest = _manifest(places.manifest(name), tell)
    warnings = []
    if metrics and has_model and conditions.get("weights_sha256") != sha256_of(weights):
        warnings.append("the figures are not of the model that lies here now")
    if metrics and manifest and conditions.get("manifest_digest") != manifest.digest:
        warnings.append("the figures are not of the data that the manifest here lists")
    registered = registration(places, name)
    if has_model and registered is None:
        tell(f"{name}: the model in {weights.parent} is not registered; {remedy(name)}")
    data_set = data_set_of(manifest.source.name, manifest.shape[0]) if manifest else None
    remark = ""
    if manifest and data_set and "test" in metrics:
        likelihood = str(conditions.get("likelihood"))
        why = "; ".join(warnings) or why_not_comparable(data_set, manifest, likelihood)
        remark = f"Not comparable: {why}" if why else "Comparable: the same test images"
    part = {
        "name": name,
        "title": _title(config, manifest),
        "data_set": data_set,
        "state": "not evaluated yet",
        "remark": remark,
        "warnings": warnings,
        "metrics": metrics,
        "seeds": _seeds(results / "seeds.json", name, manifest, tell),
        "config": config,
        "columns": sorted({height for _, height, _ in config.latent_shapes})
        or [config.image_size * quarters // 4 for quarters in range(4)],
        **_size(config),
        "charts": training_figures(results / "curves.csv", settings),
        "reconstructions": picture(results / "reconstructions.png"),
        "samples": [],
        "information": None,
        "lineage": _lineage(settings, conditions, registered or {}, manifest, run),
    }
    if with_model and has_model:
        seed = conditions.get("seed", recipe.evaluate.seed)
        part |= _drawn(recipe, places, manifest, seed, tell)
    if not part["samples"]:
        stored = picture(results / "samples.png")
        where = sample_title(settings["sample.temperature"], settings["sample.seed"])
        part["samples"] = [(where, stored)] if stored else []
    return part


def _drawn(
    recipe: Recipe,
    places: Places,
    manifest: Manifest | None,
    seed: int,
    tell: Callable[[str], None],
) -> Facts:
    """What the model itself tells, as far as it and its images are here."""
    drawn: Facts = {}
    try:
        model = open_model(recipe, places)
        drawn["samples"] = draw_samples(model, recipe.sample.seed)
        if manifest and recipe.model.num_latents:
            drawn["information"] = score_layers(model, manifest, places.store_url, seed)
    except UserError as error:
        tell(f"{recipe.name}: not all could be drawn with the model: {error}")
    return drawn


def _read(path: Path) -> Facts:
    """A JSON object; empty where the file is missing.

    Raises:
        UserError: where it is something else.
    """
    try:
        value = read_json(path, "remove it, then run 'dvc repro'")
    except FileNotFoundError:
        return {}
    if not isinstance(value, dict):
        raise UserError(f"{path}: is not a JSON object; remove it, then run 'dvc repro'")
    return value


def _figures(path: Path, name: str) -> dict[str, Facts]:
    """The figures of test and validation that are there."""
    found = _read(path)
    metrics: dict[str, Facts] = {split: found[split] for split in _SPLITS if split in found}
    for split, figures in metrics.items():
        for key in _FIGURES:
            figure = figures.get(key) if isinstance(figures, dict) else None
            if not isinstance(figure, int | float):
                raise UserError(
                    f"{path}: {split}.{key}: {figure!r} is not a figure; "
                    f"run 'dvc repro -f -s evaluate@{name}'"
                )
    return metrics


def _seeds(
    path: Path, name: str, manifest: Manifest | None, tell: Callable[[str], None]
) -> dict[str, str]:
    """Mean ± spread over seeds of each split, in words; nothing where data are other ones now."""
    found = _read(path)
    if not found:
        return {}
    if manifest and found.get("manifest_digest") != manifest.digest:
        tell(f"{name}: {path} is of other data than the manifest lists, so it is not shown")
        return {}
    try:
        settings = ", ".join(f"{key} {value}" for key, value in found["settings"].items())
        commits = ", ".join(sorted({str(row["commit"])[:7] for row in found["seeds"]}))
        return {
            split: f"{found[split]['bits_per_dim']['mean']:.4f} ± "
            f"{found[split]['bits_per_dim']['stdev']:.4f} over {found[split]['n']} seeds "
            f"(mean ± sample standard deviation), commit {commits}"
            + (f", with {settings}" if settings else "")
            for split in _SPLITS
        }
    except (LookupError, TypeError, ValueError, AttributeError):
        raise UserError(
            f"{path}: is damaged; remove it, then run 'vdvae seeds {name} --seeds …' again"
        ) from None


def _manifest(path: Path, tell: Callable[[str], None]) -> Manifest | None:
    try:
        return Manifest.load(path)
    except UserError as error:
        tell(str(error))
        return None


def _settings(recipe: Recipe) -> Facts:
    """Settings as `section.key`: those in dvc.lock, which the results were made with, first."""
    settings: Facts = recipe.flat()
    try:
        for entry in lock_entries(recipe.name).values():
            for key, value in entry.get("params", {}).get("params.yaml", {}).items():
                where = key.removeprefix(f"recipes.{recipe.name}.")
                if isinstance(value, dict):  # a section; else one setting
                    settings |= {f"{where}.{name}": value[name] for name in value}
                else:
                    settings[where] = value
    except (TypeError, LookupError, AttributeError):
        raise damaged(LOCK) from None
    return settings


def _size(config: AnyModelConfig) -> Facts:
    """Parameters, stochastic depth, and network evaluations of one sample.

    The model is built without memory for its weights.
    """
    import torch

    from vdvae.models import build

    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in build(config).parameters())
    if isinstance(config, PixelCNNConfig):
        return {"parameters": parameters, "depth": "", "evaluations": config.image_size**2}
    # Blocks of a group read the same input, so a group is one layer deep (Table 1, left).
    depth = math.ceil(len(config.latent_shapes) / config.group_size)
    return {"parameters": parameters, "depth": depth, "evaluations": 1}


def _title(config: AnyModelConfig, manifest: Manifest | None) -> str:
    size, colour = config.image_size, "grey" if config.image_channels == 1 else "colour"
    source = f"{manifest.source.name}, " if manifest else ""
    return f"{source}{size}x{size} {colour}, {config.num_levels} levels"


def _rows(parts: list[Facts], others: list[Recipe]) -> list[Facts]:
    """The paper's data sets in its order, each with every recipe for it; then data of our own."""
    untried = [
        {
            "name": recipe.name,
            "data_set": data_set_of(recipe.data.source, recipe.data.image_size),
            "state": "not run",
            "remark": "",
            "metrics": {},
            **_size(recipe.model),
        }
        for recipe in others
    ]

    def ours(data: DataSet) -> list[Facts | None]:
        return [part for part in [*parts, *untried] if part["data_set"] == data] or [None]

    in_paper = [
        {"title": data.title, "published": data.rows[-1], "part": part}
        for data in TABLE_2
        for part in ours(data)
    ]
    own = [
        {"title": part["title"], "published": None, "part": part}
        for part in parts
        if part["data_set"] is None
    ]
    return in_paper + own


def _lineage(
    settings: Facts, conditions: Facts, registered: Facts, manifest: Manifest | None, run: Facts
) -> list[tuple[str, str]]:
    """Where the figures come from, as (fact, value); what is not known is left out."""
    tags, metrics = run.get("tags", {}), run.get("metrics", {})
    facts: Mapping[str, object] = {
        "Registered model": f"{registered['name']} version {registered['version']}, alias "
        f"{registered['alias'] or 'none'}"
        if registered
        else "not registered",
        "Weights, sha256": conditions.get("weights_sha256"),
        "MLflow run": run.get("id") or registered.get("mlflow_run_id"),
        "Git revision": conditions.get("git_revision")
        and conditions["git_revision"]
        + (", with changes" if conditions.get("git_dirty") == "true" else ""),
        "Manifest digest": conditions.get("manifest_digest"),
        "Data": manifest
        and f"{manifest.source.name}: "
        + ", ".join(f"{split.images:,} {name}" for name, split in manifest.splits.items()),
        "Terms of the data": manifest and manifest.source.terms,
        "Notes of the source": manifest
        and "; ".join(f"{key}: {note}" for key, note in manifest.source.notes.items()),
        "Training": f"{settings['train.steps']:,} steps of {settings['train.batch_size']} images, "
        f"learning rate {settings['train.learning_rate']:g}, seed {settings['train.seed']}, "
        f"precision {settings['train.precision']}",
        "Training time": ", ".join(
            f"{metrics[key]:.2f} {unit} hours"
            for key, unit in (("train/gpu_hours", "GPU"), ("train/cpu_hours", "CPU"))
            if key in metrics
        ),
        "Evaluation": conditions
        and f"precision {conditions.get('precision')} on {conditions.get('device')}, "
        f"seed {conditions.get('seed')}, {conditions.get('posterior_samples')} draw of the "
        f"posterior an image",
        "Likelihood": conditions
        and f"{conditions.get('likelihood')}, {conditions.get('num_levels')} levels",
        "Hardware": "; ".join(
            f"{key.partition('.')[2]} {value}"
            for key, value in sorted(tags.items())
            if key.startswith("hardware.")
        ),
    }
    return [(fact, str(value)) for fact, value in facts.items() if value]

"""The registry: finished models as numbered versions, the best of a recipe under an alias.

A version is made in an order that a kill cannot spoil: upload under a folder named by content,
version with all its tags in one transaction, alias, record of the decision, registered.json. A
rerun finds how far it came by the hash of the weights and goes on from there.
"""

from __future__ import annotations

import math
import platform
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

import vdvae
from pipeline import tracking
from pipeline.dvc import LOCK, lock_entries
from pipeline.params import Places, Recipe
from pipeline.registry.aliases import Alias, Move
from pipeline.registry.lineage import check_files, write_sums
from pipeline.registry.model_card import model_card
from pipeline.registry.promotion import RULE, NotComparable, compare
from pipeline.registry.receipt import KEYS
from pipeline.registry.versions import (
    PREFIX,
    Version,
    client_of,
    download,
    figures,
    find,
    parse,
    place,
    read_per_image,
)
from pipeline.shards import Manifest
from pipeline.tracking import Run
from pipeline.tracking.run import COPY, LOCK_COPY
from vdvae.checkpoint import CONFIG, WEIGHTS
from vdvae.config import AnyModelConfig, UserError
from vdvae.files import atomic_write_json, read_json, sha256_of

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.models import ModelSignature

PUBLISHED = "published"  # the alias of the authors' own weights
_DECISION = "alias_decision"  # of a version: what came of its turn; it has one only
_DESCRIPTION = 5000  # characters that MLflow keeps of one


@dataclass(frozen=True, kw_only=True)
class Registered:
    """Where a model is found."""

    name: str
    version: int
    alias: str | None  # None where another version holds it
    mlflow_run_id: str
    weights_sha256: str
    decision: str  # why the alias is where it is

    def record(self) -> dict[str, Any]:
        """What results/<recipe>/registered.json holds."""
        return {key: getattr(self, key) for key in KEYS}


def register(
    recipe: Recipe, places: Places, *, origin: Mapping[str, str] | None = None
) -> Registered:
    """Makes the finished model of a recipe a version of `vdvae-<recipe>`, once.

    Args:
        recipe: its settings; places: where its results are.
        origin: where weights come from that were not trained here: tags of the version, `file` and
            `sha256` among them. Such a version gets the alias `published`, without a comparison.

    The alias moves to it where `promotion.RULE` says so; the first version gets it. Each version is
    considered once, so an alias that a person moved by hand stays. The MLflow run of the training
    is continued, or made again from results/<recipe>/ where the store was wiped. A version whose
    files were damaged is uploaded again.

    Raises:
        UserError: a missing or damaged result, or MLflow fails; registering again goes on.
    """
    name = f"{PREFIX}{recipe.name}"
    results, folder = places.results(recipe.name), places.model(recipe.name)
    manifest = Manifest.load(places.manifest(recipe.name))
    metrics = _read(results / "metrics.json", recipe.name)
    conditions = _read(results / "conditions.json", recipe.name)
    model = vdvae.load(folder)  # which also finds a damaged one
    config = model.config
    ours = (config.image_size, config.image_size, config.image_channels, config.num_levels)
    if ours != (*manifest.shape, manifest.num_levels):
        raise UserError(
            f"{folder}: a model of images of (height, width, channels, levels) {ours}, while "
            f"{places.manifest(recipe.name)} has {(*manifest.shape, manifest.num_levels)}; "
            f"run 'dvc repro train@{recipe.name}'"
        )
    tags = _version_tags(folder, config, manifest, metrics)
    _check_figures(results, recipe.name, metrics, conditions, tags)
    tags |= {"seed": str(conditions["seed"]), "passes": str(conditions["posterior_samples"])}

    with (
        locked_model(name, places),
        tracking.open_run(
            recipe.name, places, results / "run.json", recipe.flat(), {}, manifest
        ) as run,
        tracking.mlflow_errors(places.tracking_uri),
    ):
        _log_results(run, recipe.name, places)
        run.log_metrics(tracking.flat_metrics(metrics))
        tags |= _origin(run)
        tags |= {f"published_{key}": value for key, value in (origin or {}).items()}
        card = model_card(
            name=name,
            config=config,
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            manifest=manifest,
            metrics=metrics,
            conditions=conditions,
            tags=tags,
            settings=recipe.flat(),
            origin=origin,
        )
        version = _find_version(run.client, name, tags)
        if version is None:
            version = _create_version(run, name, recipe.name, places, config, card, tags)
        elif _damaged(version, places):
            files = _upload(run.client, version.run_id, recipe.name, places, config, card, tags)
            run.client.set_model_version_tag(name, str(version.number), "files_sha256", files)
        alias = Alias(run.client, name, PUBLISHED if origin else recipe.register.alias)
        if origin:
            decision = _give(alias, str(version.number))
        else:
            decision = _decide(run.client, alias, version, recipe.register.confidence)
        holder = alias.holder
    registered = Registered(
        name=name,
        version=version.number,
        alias=alias.alias if holder == str(version.number) else None,
        mlflow_run_id=version.run_id,
        weights_sha256=tags["weights_sha256"],
        decision=decision,
    )
    atomic_write_json(results / "registered.json", registered.record())
    return registered


def rollback(reference: str, places: Places) -> Move:
    """Gives the alias of `NAME@ALIAS` back to the version that had it before.

    Raises:
        UserError: there is none, or MLflow fails.
    """
    name, alias, number = parse(reference)
    if number is not None:
        raise UserError(
            f"{reference!r} is one version; to go back, name an alias, such as {name}@{alias}"
        )
    with locked_model(name, places), client_of(places) as client:
        find(client, reference, places)
        return Alias(client, name, alias).rollback()


def promote(reference: str, alias: str, places: Places) -> Move:
    """Gives an alias to the version that a person chose, without a comparison.

    Raises:
        UserError: there is no such version, it has the alias already, or MLflow fails.
    """
    name, _, _ = parse(reference)
    with locked_model(name, places), client_of(places) as client:
        version = find(client, reference, places)
        held = Alias(client, name, alias)
        holder = held.holder
        if holder == str(version.number):
            raise UserError(f"{version}: has the alias {alias!r} already; name another version")
        if not held.move(holder, str(version.number), "chosen by hand"):
            raise UserError(
                f"{name}@{alias}: was moved by somebody else at the same moment; "
                f"look with 'vdvae models show {name}@{alias}' before you choose again"
            )
        return held.history()[-1]


def locked_model(name: str, places: Places) -> AbstractContextManager[None]:
    """Keeps other processes of this machine from the registered model while the block runs."""
    database = tracking.sqlite_path(places.tracking_uri)
    folder = database.parent if database else places.runs
    return tracking.locked(folder / f"register-{name}.lock")


def _log_results(run: Run, recipe_name: str, places: Places) -> None:
    """What the version rests on, for whoever looks from MLflow; nothing new in most runs."""
    results = places.results(recipe_name)
    if (results / "curves.csv").exists():
        run.log_points(tracking.read_curves(results / "curves.csv"))
    for name in ("per_image.csv", "conditions.json", "metrics.json"):
        run.log_artifact(results / name)
    for path in filter(Path.exists, (LOCK, places.manifest(recipe_name))):
        run.log_artifact(path, COPY)


def _origin(run: Run) -> dict[str, str]:
    """Tags of a version: what its MLflow run knows of where it comes from, and this environment."""
    known = run.client.get_run(run.run_id).data.tags
    wanted = ("git_revision", "git_dirty", "dvc_lock_sha256", "prefect_flow_run")
    environment = (
        f"Python {platform.python_version()}, PyTorch {installed_version('torch')}, "
        f"{platform.system()} {platform.machine()}"
    )
    return {**{key: known[key] for key in wanted if key in known}, "environment": environment}


def _read(path: Path, recipe_name: str) -> dict[str, Any]:
    again = f"run 'dvc repro -f -s evaluate@{recipe_name}'"
    try:
        value = read_json(path, again, finite=False)  # what is none is named below
    except FileNotFoundError:
        raise UserError(f"{path}: not found; {again}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: not an object; {again}")
    return value


def _check_figures(
    results: Path,
    recipe_name: str,
    metrics: dict[str, Any],
    conditions: dict[str, Any],
    tags: dict[str, str],
) -> None:
    """Refuses figures that are none, or another model's or other data's: they decide the alias."""
    again = f"run 'dvc repro -f -s evaluate@{recipe_name}'"
    found = metrics.get("validation")
    figure = found.get("bits_per_dim") if isinstance(found, dict) else None
    if not isinstance(figure, int | float) or not math.isfinite(figure):
        raise UserError(
            f"{results}/metrics.json: validation.bits_per_dim: {figure!r} is not a figure; {again}"
        )
    for key in ("weights_sha256", "manifest_digest"):
        if conditions.get(key) != tags[key]:
            raise UserError(
                f"{results}/conditions.json: {key}: the figures are of {conditions.get(key)!r}, "
                f"while {tags[key]!r} is here; {again}"
            )
    for key in ("seed", "posterior_samples"):
        if type(conditions.get(key)) is not int:
            raise UserError(
                f"{results}/conditions.json: {key}: {conditions.get(key)!r} is no whole number; "
                f"{again}"
            )
    try:
        bits = read_per_image(results / "per_image.csv", "validation")
    except FileNotFoundError:
        raise UserError(f"{results}/per_image.csv: not found; {again}") from None
    mean = math.fsum(bits.values()) / max(1, len(bits))
    if not math.isclose(mean, figure, rel_tol=1e-9):
        raise UserError(
            f"{results}/per_image.csv: the mean over {len(bits)} validation images is {mean}, "
            f"while metrics.json has {figure}; {again}"
        )


def _version_tags(
    folder: Path, config: AnyModelConfig, manifest: Manifest, metrics: dict[str, Any]
) -> dict[str, str]:
    tags = {
        "weights_sha256": sha256_of(folder / WEIGHTS),
        "config_sha256": sha256_of(folder / CONFIG),
        "manifest_digest": manifest.digest,
        "num_levels": str(config.num_levels),
        "likelihood": config.likelihood,
    }
    for split in ("validation", "test"):
        for figure in ("bits_per_dim", "bits_per_dim_se"):
            if figure in metrics.get(split, {}):
                tags[f"{split}_{figure}"] = repr(metrics[split][figure])
    return tags


def _find_version(client: MlflowClient, name: str, tags: dict[str, str]) -> Version | None:
    same = [f"tags.{key} = '{tags[key]}'" for key in ("weights_sha256", "config_sha256")]
    versions = client.search_model_versions(" and ".join([f"name = '{name}'", *same]))
    first = min(versions, key=lambda version: int(version.version), default=None)
    return first and Version.of(first, {})


def _create_version(
    run: Run,
    name: str,
    recipe_name: str,
    places: Places,
    config: AnyModelConfig,
    card: str,
    tags: dict[str, str],
) -> Version:
    from mlflow.exceptions import MlflowException

    files = _upload(run.client, run.run_id, recipe_name, places, config, card, tags)
    try:
        run.client.create_registered_model(name, description=RULE)
    except MlflowException:
        run.client.get_registered_model(name)  # it is there already, or this says what is wrong
    created = run.client.create_model_version(
        name,
        source=f"{run.client.get_run(run.run_id).info.artifact_uri}/{place(tags)}",
        run_id=run.run_id,
        tags={**tags, "files_sha256": files},
        description=card[:_DESCRIPTION],
    )
    return Version.of(created, {})


def _upload(
    client: MlflowClient,
    run_id: str,
    recipe_name: str,
    places: Places,
    config: AnyModelConfig,
    card: str,
    tags: dict[str, str],
) -> str:
    """Puts all that a version holds among its run's artifacts; the sha256 of the list of files.

    Figures and lineage go along: the run's own may be written anew when training goes on.
    """
    results = places.results(recipe_name)
    with tempfile.TemporaryDirectory() as temporary:
        target = Path(temporary) / "model"
        _save_pyfunc(target, places.model(recipe_name), config, run_id, tags)
        (target / "model_card.md").write_text(card, encoding="utf-8")
        for folder, path in (
            ("evaluation", results / "per_image.csv"),
            ("evaluation", results / "conditions.json"),
            ("evaluation", results / "metrics.json"),
            (COPY, places.manifest(recipe_name)),
        ):
            (target / folder).mkdir(exist_ok=True)
            shutil.copyfile(path, target / folder / path.name)
        entries = yaml.safe_dump(lock_entries(recipe_name), sort_keys=False)
        (target / LOCK_COPY).write_text(entries, encoding="utf-8")
        files_sha256 = write_sums(target)
        client.log_artifacts(run_id, str(target), place(tags))
    return files_sha256


def _damaged(version: Version, places: Places) -> bool:
    with tempfile.TemporaryDirectory() as temporary:
        try:
            root = download(version, places, Path(temporary))
        except UserError:
            return True
        return any(check_files(root, version.tags.get("files_sha256", "")))


def _save_pyfunc(
    target: Path, folder: Path, config: AnyModelConfig, run_id: str, tags: dict[str, str]
) -> None:
    import mlflow.pyfunc
    from mlflow.models import Model

    with tempfile.TemporaryDirectory() as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that an input example is missing
        # Only the sources travel: bytecode and whatever else lies in the package stay here.
        package, source = Path(temporary) / "vdvae", Path(vdvae.__file__).parent
        package.mkdir()
        for path in source.glob("*.py"):
            (package / path.name).write_bytes(path.read_bytes())
        mlflow.pyfunc.save_model(
            target,
            python_model=str(Path(__file__).with_name("pyfunc_model.py")),
            artifacts={"model": str(folder)},
            code_paths=[str(package)],
            pip_requirements=[
                f"{package}=={installed_version(package).partition('+')[0]}"
                for package in ("torch", "numpy", "safetensors", "pandas")
            ],
            signature=_signature(config, int(tags["seed"]), int(tags["passes"])),
            mlflow_model=Model(run_id=run_id),
            metadata=tags,
        )


def _signature(config: AnyModelConfig, seed: int, passes: int) -> ModelSignature:
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import ParamSchema, ParamSpec, Schema, TensorSpec

    shape = (-1, config.image_size, config.image_size, config.image_channels)
    return ModelSignature(
        inputs=Schema([TensorSpec(np.dtype("uint8"), shape)]),
        params=ParamSchema(
            [
                ParamSpec("mode", "string", "score"),
                ParamSpec("n", "long", 16),
                ParamSpec("temperature", "double", 1.0),
                ParamSpec("seed", "long", seed),
                ParamSpec("passes", "long", passes),
            ]
        ),
    )


def _decide(client: MlflowClient, alias: Alias, version: Version, confidence: float) -> str:
    """Moves the alias to a version that deserves it, once; says what came of it."""
    number, holder = str(version.number), alias.holder
    if holder is not None and _DECISION in version.tags:
        held = holder == number
        return version.tags[_DECISION] if held else f"{alias.alias} stays version {holder}"
    decision = ""
    while not decision:
        holder = alias.holder
        if holder is None and alias.move(None, number, "first"):
            decision = f"{alias.alias}: first, {_figure(version)}"
        elif holder == number:  # killed after the alias moved
            decision = str(alias.history()[-1])
        elif holder is not None:
            decision = _challenge(client, alias, version, holder, confidence)
    client.set_model_version_tag(version.name, number, _DECISION, decision)
    return decision


def _give(alias: Alias, number: str) -> str:
    holder = alias.holder
    if holder != number and not alias.move(holder, number, "imported"):
        raise UserError(f"{alias.alias}: was moved by somebody else meanwhile; run this again")
    return f"{alias.alias}: imported"


def _challenge(
    client: MlflowClient, alias: Alias, version: Version, holder: str, confidence: float
) -> str:
    """Compares a version with the holder; empty where the alias moved elsewhere meanwhile."""
    stays = f"{alias.alias} stays version {holder}"
    theirs = Version.of(client.get_model_version(version.name, holder), {})
    try:
        comparison = compare(figures(client, theirs), figures(client, version), confidence)
    except NotComparable as reason:
        return (
            f"{stays}: version {version.number} cannot be compared with it: {reason}; to choose it "
            f"all the same, run 'vdvae models promote {version.name}/{version.number}'"
        )
    if not comparison.better:
        return f"{stays}: the difference is not above zero: {comparison}"
    if not alias.move(holder, str(version.number), "better", comparison):
        return ""
    return f"{alias.alias}: {holder} -> {version.number}, better by {comparison}"


def _figure(version: Version) -> str:
    return f"{float(version.tags['validation_bits_per_dim']):.4f}"

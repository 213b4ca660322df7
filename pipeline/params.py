"""params.yaml, read once into frozen typed objects, and the places where things live."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from pipeline.yaml_files import read_yaml
from vdvae.config import (
    AnyModelConfig,
    Config,
    ModelConfig,
    TrainConfig,
    UserError,
    model_config_of,
    number,
    shown,
)
from vdvae.files import atomic_path, path_of

PARAMS = Path("params.yaml")
RECIPE = r"[A-Za-z0-9_-]{1,60}"  # what a recipe's name is made of: it names files and models
# `defaults` is what recipes merge, by YAML's own `<<`; the studies are pipeline/studies/.
_TOP = ("active", "active_studies", "defaults", "recipes", "studies")
_COPIES = Path(".dvc/tmp/exps")  # where DVC makes them


@dataclass(frozen=True, kw_only=True)
class DataConfig(Config):
    """Where images come from and what the model sees of them."""

    source: Literal[
        "digits", "cifar10", "fashion_mnist", "imagenet", "imagenet-npz", "ffhq", "folder"
    ]
    path: str = ""  # raw data, relative to the project's root; "" where none is needed
    image_size: int = number(1, 4096)  # pixels a side
    channels: int = 3  # 1 (grey) or 3 (colour)
    num_levels: int = number(2, 256, default=256)  # grey levels
    split_seed: int = number(0, 2**32 - 1, default=0)  # of the documented permutation
    validation: float = number(0, 1e9, default=0.1)  # images; for `folder` a fraction
    test: float = number(0, 1e9, default=0.1)  # the same; sources with a published test ignore it
    resize: Literal["", "crop", "stretch", "mean"] = ""  # "": all have image_size already
    shard_images: int = number(1, 1_000_000, default=1000)  # most images in a shard
    unreadable: Literal["refuse", "skip"] = "refuse"  # files that are no whole, still image

    def check(self) -> None:
        if "\0" in self.path or len(self.path) > 4096:
            raise UserError(f"data.path: {shown(self.path)} is no path; name a file or a folder")
        if self.channels not in (1, 3):
            raise UserError(f"data.channels: {self.channels} is not 1 or 3")
        if self.source == "folder" and not self.validation + self.test < 1:
            raise UserError(
                f"data.validation: {self.validation} and data.test: {self.test} are fractions of "
                f"a folder and must leave something to train on; make their sum less than 1"
            )


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(Config):
    """How the likelihood is measured."""

    batch_size: int = number(1, 10**6, default=64)
    seed: int = number(0, 2**31 - 1, default=0)  # of the posterior's draws, with each image
    passes: int = number(1, 10_000, default=1)  # draws that the bound is averaged over
    iwae: int = number(0, 10_000, default=0)  # draws of the importance-weighted bound; 0: without


@dataclass(frozen=True, kw_only=True)
class SampleConfig(Config):
    """What is drawn to be looked at."""

    n: int = number(1, 1024, default=64)  # images in the grid
    temperature: float = number(0, 2, default=1.0)
    seed: int = number(0, 2**31 - 1, default=0)
    reconstructions: int = number(1, 64, default=8)  # validation images in the ladder


@dataclass(frozen=True, kw_only=True)
class RegisterConfig(Config):
    """How the model is found in the registry."""

    alias: Literal["champion"] = "champion"
    # Of the two-sided interval of the difference to the champion, which must lie above zero.
    confidence: float = number(0.5, 0.9999, default=0.95)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One dataset with its model, training, evaluation, sampling and registration settings."""

    name: str
    data: DataConfig
    model: AnyModelConfig
    train: TrainConfig
    evaluate: EvaluateConfig
    sample: SampleConfig
    register: RegisterConfig

    def flat(self) -> dict[str, str | int | float | bool]:
        """Every setting as `section.key`."""
        return {
            f"{section}.{key}": value
            for section in _SECTIONS
            for key, value in getattr(self, section).to_dict().items()
        }


_SECTIONS: dict[str, type[Config]] = {
    "data": DataConfig,
    "model": ModelConfig,
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "sample": SampleConfig,
    "register": RegisterConfig,
}
# These three are the data's; the model gets them from there (one owner).
SHARED_WITH_MODEL = {
    "image_size": "image_size",
    "image_channels": "channels",
    "num_levels": "num_levels",
}


def read_params(path: Path = PARAMS) -> dict[str, Any]:
    """The checked top of params.yaml: {"active": [names], "recipes": {name: sections}}.

    What recipes merge from `defaults` is in their sections.

    Raises:
        UserError: where the file is missing, is not YAML within the bounds of `yaml_files`, or its
            top is not as expected.
    """
    try:
        params = read_yaml(path)
    except FileNotFoundError:
        raise UserError(f"{path}: not found; run this at the project's root") from None
    if not isinstance(params, dict) or not isinstance(params.get("recipes"), dict):
        raise UserError(f"{path}: has no section 'recipes'; restore it with 'git checkout {path}'")
    unknown = [key for key in params if key not in _TOP]
    if unknown:
        raise UserError(f"{path}: unknown key {shown(unknown[0])}; known are {', '.join(_TOP)}")
    for name in params["recipes"]:
        check_name(name, path)
    active = params.get("active")
    if not isinstance(active, list) or not active:
        raise UserError(
            f"{path}: active: {shown(active)} is not a list of recipes, such as [digits]"
        )
    for place, name in enumerate(active):
        if not isinstance(name, str) or name not in params["recipes"]:
            raise UserError(f"{path}: active: {no_recipe(name, params)}")
        if name in active[:place]:
            raise UserError(f"{path}: active: {name!r} is given twice; leave one out")
    studies, running = params.setdefault("studies", {}), params.setdefault("active_studies", [])
    if not isinstance(studies, dict) or not isinstance(running, list):
        raise UserError(
            f"{path}: studies is a set of studies by name, active_studies a list of names"
        )
    for name in studies:
        check_name(name, path, "studies")
    for name in running:
        if not isinstance(name, str) or name not in studies:
            raise UserError(f"{path}: active_studies: there is no study {shown(name)}")
    return params


def check_name(name: object, path: Path = PARAMS, section: str = "recipes") -> None:
    """Refuses a recipe's name that could not be one of files and models everywhere; a study's too.

    Raises:
        UserError: naming it.
    """
    if not isinstance(name, str) or not re.fullmatch(RECIPE, name):
        raise UserError(
            f"{path}: {section}: the name {shown(name)} is not made of letters, digits, '_' and "
            f"'-', 60 at most; rename it"
        )


def no_recipe(name: object, params: dict[str, Any]) -> str:
    """What to say of a recipe that params.yaml does not have."""
    names = [*params["recipes"]]
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return f"no recipe {shown(name)}; there are {', '.join(names[:20])}{more}"


def load_recipe(
    name: str, path: Path = PARAMS, settings: Mapping[str, Any] = MappingProxyType({})
) -> Recipe:
    """One recipe of params.yaml, typed and checked.

    Args:
        name: in `recipes`.
        path: the file.
        settings: `section.key` and value of what is other than there.

    Raises:
        UserError: naming the file, the key, the value and what would do.
    """
    params = read_params(path)
    if name not in params["recipes"]:
        raise UserError(f"{path}: {no_recipe(name, params)}")
    sections = params["recipes"][name]
    where = f"{path}: recipes.{name}"
    if not isinstance(sections, dict):
        raise UserError(
            f"{where}: {shown(sections)} is not a set of sections {', '.join(_SECTIONS)}"
        )
    for key in sections:
        if key not in _SECTIONS:
            key = key if isinstance(key, str) and len(key) <= 60 else shown(key)
            raise UserError(f"{where}.{key}: unknown section; known are {', '.join(_SECTIONS)}")
    for setting, value in settings.items():
        section, _, key = setting.partition(".")
        if section not in _SECTIONS or not isinstance(sections.get(section, {}), dict):
            raise UserError(
                f"{where}: {shown(setting)} is not a setting as train.steps is; sections are "
                f"{', '.join(_SECTIONS)}"
            )
        sections = {**sections, section: {**sections.get(section, {}), key: value}}
    configs: dict[str, Any] = {}
    for key, kind in _SECTIONS.items():
        values = sections.get(key, {})
        if key == "model" and isinstance(values, dict):
            for ours, theirs in SHARED_WITH_MODEL.items():
                if ours in values:
                    raise UserError(f"{where}.model.{ours}: is set by recipes.{name}.data.{theirs}")
            shared = {
                ours: getattr(configs["data"], theirs) for ours, theirs in SHARED_WITH_MODEL.items()
            }
            values = {**values, **shared}
        read = model_config_of if key == "model" else kind.from_dict
        configs[key] = read(values, where=where)
    return Recipe(name=name, **configs)


def round_trip() -> Any:
    """A reader and writer of YAML that keeps comments, order and quotes."""
    from ruamel.yaml import YAML

    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = 10_000
    yaml.indent(mapping=2, sequence=4, offset=2)
    return yaml


def read_document(path: Path) -> Any:
    """params.yaml as `round_trip` reads it, with its comments.

    Raises:
        UserError: it is not within `yaml_files`' bounds, or `round_trip` does not read it.
    """
    read_params(path)
    try:
        return round_trip().load(path.read_bytes())
    except Exception as error:  # YAML 1.2 where we read 1.1; its constructors raise all kinds
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{path}: not readable as YAML: {reason}; mend it there") from None


def write_document(document: Any, path: Path) -> None:
    """Writes what `round_trip().load` read, at once or not at all."""
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        round_trip().dump(document, file)


def project_root() -> Path:
    """The project that places belong to: the current folder.

    `dvc exp run --temp` and DVC's queue work in a copy that DVC deletes afterwards; there it is the
    project that was copied. DVC_ROOT alone says nothing: DVC sets it in every stage.
    """
    here, origin = Path.cwd(), os.environ.get("DVC_ROOT")
    if origin and here.resolve().is_relative_to(Path(origin).resolve() / _COPIES):
        return Path(origin)
    return here


def raw_path(path: str) -> Path:
    """Where a recipe's raw data lie, absolute: here, or in the project whose copy this is.

    A copy has what git or DVC track; a folder of nothing but hidden files is taken for none.
    """
    here, origin = Path.cwd() / path_of(path), project_root() / path_of(path)
    if here == origin or here.is_file() or any(here.glob("[!.]*")):
        return here
    return origin


def _tracking_uri(root: Path, given: str) -> str:
    """MLflow's address, with a database file of the project by its absolute path."""
    scheme, separator, path = given.partition("sqlite:///")
    if scheme or not separator or path.startswith("/"):
        return given
    if "?" in str(root):  # where a query begins, and nothing can escape it
        raise UserError(
            f"{root}: no database URL of MLflow can name a file below a folder with '?' in its "
            f"name; rename the folder, or set MLFLOW_TRACKING_URI to sqlite:////another/folder/"
            f"mlflow.db or to a server"
        )
    return f"{separator}{root / path}"


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where things live: the environment's settings, or the defaults inside the project."""

    store_url: str  # shards: file:///absolute/path or s3://bucket/prefix
    runs: Path  # training state
    tracking_uri: str  # MLflow
    cache: Path = Path("cache")  # decoded shards, which are made again where they are missing
    results_root: Path = Path("results")  # figures, pictures and models

    @classmethod
    def from_env(cls) -> Places:
        """Those of `Settings`, absolute: defaults and relative paths are below `project_root()`."""
        from pipeline.settings import Settings  # whose import decoding processes do without

        settings, root = Settings(), project_root()
        return cls(
            store_url=settings.store or f"file://{root / 'store'}",
            runs=root / path_of(settings.runs),
            tracking_uri=_tracking_uri(root, settings.tracking_uri),
            cache=root / path_of(settings.cache),
        )

    def manifest(self, recipe: str) -> Path:
        """The hashed list of a recipe's shards."""
        return Path("data/manifests") / f"{recipe}.json"

    def results(self, recipe: str) -> Path:
        """Figures and pictures of a recipe."""
        return self.results_root / recipe

    def model(self, recipe: str) -> Path:
        """The finished model of a recipe: model.safetensors and config.json."""
        return self.results(recipe) / "model"

    def weights(self, recipe: str) -> Path:
        """Of that model."""
        return self.model(recipe) / "model.safetensors"

"""`studies` of params.yaml, typed and checked, and the cells that follow."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, Strict, ValidationError

from pipeline.dvc import code_of
from pipeline.flows.overrides import Overrides
from pipeline.params import PARAMS, Recipe, load_recipe, read_params
from vdvae.config import UserError, shown
from vdvae.files import sha256_of

STAGES = ("shard", "train", "evaluate")  # of a cell
_MOST_CELLS = 1000
_MINI = "-mini"  # of the folder of a short version

Value = bool | int | float | str
# `section.key` of a recipe: value; a variant's `recipe` takes the place of the study's.
Settings = dict[str, Value]
Values = Annotated[list[Value], Field(min_length=1)]
Text = Annotated[str, Field(max_length=2000)]


def _different(seeds: tuple[int, ...]) -> tuple[int, ...]:
    if len({*seeds}) < len(seeds):
        raise ValueError("has a seed twice, which would count one training as two")
    return seeds


Seeds = Annotated[
    tuple[Annotated[int, Field(ge=0, le=2**31 - 1)], ...],
    Strict(False),
    Field(min_length=1, max_length=100),
    AfterValidator(_different),
]


class _Declared(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


class Mini(_Declared):
    """What the short version of a study changes of it."""

    recipe: str = ""  # "": the same
    seeds: Seeds = (0,)
    set: Settings = {}


class Study(_Declared):
    """One study: which variants of a recipe are trained, and what is claimed of them."""

    claim: Text
    paper: Text  # where the paper says it, and its figures
    recipe: str
    seeds: Seeds
    set: Settings = {}  # what every cell has other than the recipe
    vary: dict[str, Values] = {}  # a grid of settings, or
    variants: dict[str, Settings] = {}  # a list of named settings
    # Primary comparisons: by the claim the first variant is better than the second.
    compare: list[Annotated[tuple[str, str], Strict(False)]] = []
    # The figure and further columns: by variant, layer, resolution or step.
    shows: Literal["bits", "rates", "resolutions", "gradients"] = "bits"
    level: Annotated[float, Field(ge=0.5, le=0.9999)] = 0.95  # of the intervals
    mini: Mini = Mini()


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One training of a study."""

    variant: str
    seed: int
    recipe: Recipe  # with its settings
    settings: Settings
    overrides: Overrides  # what else is chosen for its run
    experiment: str  # the name of its DVC experiment, the same in whatever study it is


def results_name(name: str, mini: bool) -> str:
    """Under which a study's results stand."""
    return f"{name}{_MINI * mini}"


def load_study(name: str, path: Path = PARAMS) -> Study:
    """One study of params.yaml.

    Raises:
        UserError: naming the file, the key, the value and what would do.
    """
    studies = read_params(path).get("studies") or {}
    if name not in studies:
        raise UserError(f"{path}: no study {shown(name)}; there are {', '.join(studies) or 'none'}")
    where = f"{path}: studies.{name}"
    if name.endswith(_MINI) and name.removesuffix(_MINI) in studies:
        raise UserError(f"{where}: is where the short version's results go; rename it")
    try:
        study = Study.model_validate(studies[name])
    except ValidationError as errors:
        first = errors.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(f"{where}.{key}: {shown(first['input'])}: {first['msg']}") from None
    if bool(study.vary) == bool(study.variants):
        raise UserError(f"{where}: needs either `vary` or `variants`, and has both or neither")
    names = variants_of(study)
    unknown = [name for pair in study.compare for name in pair if name not in names]
    if unknown:
        raise UserError(
            f"{where}.compare: there is no variant {unknown[0]!r}; there are {', '.join(names)}"
        )
    cells_of(study, path=path)
    cells_of(study, mini=True, path=path)
    return study


def variants_of(study: Study) -> dict[str, Settings]:
    """What each variant sets, by its name: for a grid `group_size=1` or `width=16,mixtures=5`."""
    if study.variants:
        return study.variants
    rows = itertools.product(*study.vary.values())
    settings = [dict(zip(study.vary, row, strict=True)) for row in rows]
    named = {
        ",".join(f"{key.rpartition('.')[2]}={value}" for key, value in each.items()): each
        for each in settings
    }
    if len(named) < len(settings):
        raise UserError("studies: a grid (`vary`) has the same variant twice; leave one out")
    return named


def cells_of(study: Study, mini: bool = False, path: Path = PARAMS) -> list[Cell]:
    """Every cell of a study, seed by seed, so that the first results compare all variants.

    Raises:
        UserError: a setting that does not do, or cells that could not be compared.
    """
    seeds: Sequence[int] = study.mini.seeds if mini else study.seeds
    variants = variants_of(study)
    if len(seeds) * len(variants) > _MOST_CELLS:
        raise UserError(
            f"{path}: a study has {len(seeds) * len(variants)} cells; at most {_MOST_CELLS} are run"
        )
    instead = study.mini.set if mini else {}  # of a variant's own settings, too
    if any("train.seed" in given for given in (study.set, instead, *variants.values())):
        raise UserError(f"{path}: train.seed is set by the study's seeds; leave it out elsewhere")
    name = (study.mini.recipe if mini else "") or study.recipe
    code = code_of_cells()
    cells = [
        _cell(
            name, variant, seed, study.set | settings | instead | {"train.seed": seed}, path, code
        )
        for seed in seeds
        for variant, settings in variants.items()
    ]
    first = cells[0].recipe
    for cell in cells:
        for what, one, other in (
            ("data", cell.recipe.data, first.data),
            ("evaluate", cell.recipe.evaluate, first.evaluate),
            ("model.likelihood", cell.recipe.model.likelihood, first.model.likelihood),
        ):
            if one != other:
                raise UserError(
                    f"{path}: {cell.variant} has other settings of {what} than "
                    f"{cells[0].variant}, so nothing could be compared"
                )
    return cells


def _cell(
    recipe: str,
    variant: str,
    seed: int,
    settings: Settings,
    path: Path,
    code: Mapping[str, str],
) -> Cell:
    own = {key: value for key, value in settings.items() if key != "recipe"}
    changed = load_recipe(str(settings.get("recipe", recipe)), path, own)
    overrides = Overrides(sample=False, register=False)
    return Cell(
        variant=variant,
        seed=seed,
        recipe=changed,
        settings=own,
        overrides=overrides,
        experiment=experiment_name(changed, overrides, code),
    )


def experiment_name(recipe: Recipe, overrides: Overrides, code: Mapping[str, str]) -> str:
    """The name of a cell's experiment: a digest of what determines its figures.

    Args:
        recipe: with the cell's settings, from which the data follow.
        overrides: of its run, which has its stages.
        code: `code_of_cells()`.
    """
    facts: dict[str, object] = {"recipe": recipe.name, "code": code}
    for section in ("data", "model", "train", "evaluate"):
        facts[section] = getattr(recipe, section).to_dict()
    further = {*overrides.stages} - {*STAGES}
    if further:
        facts["stages"] = sorted(further)
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
    return f"{recipe.name}-seed{recipe.train.seed}-{digest}"


def code_of_cells() -> dict[str, str]:
    """A digest of each file that dvc.yaml lists for a cell's stages, as `train.run_digest` has."""
    return {path: _digest(Path(path)) for stage in STAGES for path in code_of(stage)}


def _digest(path: Path) -> str:
    if path.is_dir():
        return ",".join(sha256_of(file) for file in sorted(path.rglob("*.py")))
    return sha256_of(path)

"""What a person may choose for a run, and how the choice becomes a clone's params.yaml.

`Overrides` is the one declaration of each field: the form of the Prefect deployments, with its
bounds and words, and the options of the shell are made from it.
"""

from __future__ import annotations

import inspect
import os
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import unquote

from pydantic import BaseModel, Field, ValidationError

from pipeline.params import (
    PARAMS,
    Recipe,
    load_recipe,
    no_recipe,
    read_document,
    read_params,
    write_document,
)
from pipeline.settings import Settings
from pipeline.storage import s3_address, shown_url
from vdvae.config import UserError, parse_widths
from vdvae.files import atomic_write

T = TypeVar("T")

# Of our form and of the model that Prefect makes of it, whose field hides a method of their base.
warnings.filterwarnings("ignore", message='Field name "register"')

OWN = -1  # of fields where 0 is a choice: the recipe's own


class Overrides(BaseModel, frozen=True, extra="forbid"):
    """The values of the form; each default means the recipe's own, and changes nothing.

    Raises:
        UserError: naming the field, its value and what would do.
    """

    preset: Literal["full", "smoke"] = Field(
        "full",
        description="full: the recipe as it stands in params.yaml. smoke: a narrow, shallow "
        "variant at the true resolution, on the CPU in minutes; it shows that all works, while its "
        "pictures are still noise.",
    )
    data: str = Field(
        "",
        max_length=1000,
        pattern=r"^(file:///[^?#\x00-\x1f]*|"
        r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[^?#\x00-\x1f]*)?)?$",
        description="empty: the recipe's own. Else a folder of images, file:///absolute/path on "
        "the worker's machine or s3://bucket/prefix, below a root that the service allows; they "
        "are split by fraction, 0.1 for validation and 0.1 for test, and cropped to the recipe's "
        "size.",
    )
    steps: int = Field(
        0, ge=0, le=10_000_000, description="training steps, to 10,000,000; 0: the recipe's own."
    )
    batch_size: int = Field(
        0, ge=0, le=4096, description="images a step, to 4,096; 0: the recipe's own."
    )
    learning_rate: float = Field(
        0.0, ge=0, le=0.1, allow_inf_nan=False, description="to 0.1; 0: the recipe's own."
    )
    seed: int = Field(
        OWN,
        ge=OWN,
        le=2**31 - 1,
        description="of weights, order and noise, 0 to 2,147,483,647; -1: the recipe's own.",
    )
    precision: Literal["recipe", "fp32", "tf32", "bf16"] = Field(
        "recipe",  # an empty choice would be an empty line
        description="recipe: the recipe's own. fp32, the reference; bf16, faster; tf32, which "
        "needs a GPU. Figures are always measured in fp32.",
    )
    # A number with bounds: of a choice of numbers, Prefect's form shows 0 as an empty line.
    gpus: int = Field(
        OWN,
        ge=OWN,
        le=8,
        description="-1: the recipe's own; cuda, and auto where there is one, take every GPU that "
        "the batch parts into. 0: on the CPU. 1 to 8: on so many GPUs. The run has them to itself; "
        "others wait.",
    )
    evaluate: bool = Field(True, description="measure bits/dim on the validation and test images.")
    sample: bool = Field(True, description="draw samples and reconstructions.")
    register: bool = Field(
        True,
        description="make the model a version in the registry; needs evaluate and sample.",
    )
    note: str = Field(
        "", max_length=500, description="free text, to 500 characters, kept with the experiment."
    )

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise _refusal(error) from None
        missing = [name for name in ("evaluate", "sample") if not getattr(self, name)]
        if self.register and missing:
            raise UserError(
                f"register: needs {' and '.join(missing)}, which "
                f"{'is' if len(missing) == 1 else 'are'} off; switch register off too, or "
                f"{' and '.join(missing)} on"
            )

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages that run, in the order of the graph."""
        chosen = [name for name in ("evaluate", "sample", "register") if getattr(self, name)]
        return ("shard", "train", *chosen)


def _refusal(error: ValidationError) -> UserError:
    first = error.errors()[0]
    name, reason, given = str(first["loc"][0]), first["msg"], first["input"]
    if "pattern" in reason:  # which says less to a person than the field's own words
        reason = f"does not fit the field ({Overrides.model_fields[name].description})"
    return UserError(f"{name}: {shown_url(given) if isinstance(given, str) else given!r}: {reason}")


def as_form(function: Callable[..., T]) -> Callable[..., T]:
    """Gives a function of keywords the fields of the form as its signature, for Prefect to show."""
    keyword = inspect.Parameter.KEYWORD_ONLY
    fields = [
        inspect.Parameter(
            name,
            keyword,
            default=field.default,
            annotation=Annotated[field.annotation, *field.metadata]
            if field.metadata
            else field.annotation,
        )
        for name, field in Overrides.model_fields.items()
    ]
    function.__signature__ = inspect.Signature(fields)  # type: ignore[attr-defined]
    function.__doc__ = form_text(inspect.getdoc(function) or "")
    return function


def form_text(summary: str, own: Mapping[str, str] = MappingProxyType({})) -> str:
    """A docstring that tells of each field of the form, from which Prefect takes its words.

    Args:
        summary: what stands before the fields.
        own: what the recipe's own value is, by field.
    """
    lines = [summary.partition("\n\nArgs:")[0], "", "Args:"]
    for name, field in Overrides.model_fields.items():
        text, value = field.description or "", own.get(name)
        if value is not None:
            text = text.replace("the recipe's own", f"the recipe's own, {value}", 1)
        lines.append(f"    {name}: {text}")
    return "\n".join(lines)


def apply(overrides: Overrides, recipe: str, path: Path = PARAMS) -> Recipe:
    """Writes the choice into params.yaml, keeping its comments; the recipe joins `active`.

    Other recipes stay active: an experiment without them would remove their results from the
    checkout that takes it over.

    Raises:
        UserError: naming the field that does not do; the file is then as it was.
    """
    params = read_params(path)
    if recipe not in params["recipes"]:
        raise UserError(f"{path}: {no_recipe(recipe, params)}")
    before = path.read_bytes()
    document = read_document(path)
    sections = document["recipes"][recipe]
    at_once = sections["train"]["batch_size"] // sections["train"].get("accumulation", 1)
    if overrides.preset == "smoke":
        shrink(sections)
    train = sections["train"]
    if overrides.preset == "full" and train.get("device") == "cuda" and overrides.gpus == 0:
        raise UserError(
            f"gpus: 0 would train {recipe} on the CPU, for years; choose 1, or the preset smoke"
        )
    for name in ("steps", "batch_size", "learning_rate"):
        if getattr(overrides, name):
            train[name] = getattr(overrides, name)
    share, rest = divmod(train["batch_size"], max(1, overrides.gpus))
    if rest:
        raise UserError(
            f"gpus: a batch of {train['batch_size']} images cannot be divided by {overrides.gpus} "
            f"GPUs; choose a batch_size that {overrides.gpus} divides"
        )
    # As few parts as keep a device from computing more at once than the recipe lets it.
    parts = next(n for n in range(1, share + 1) if not share % n and share // n <= at_once)
    if parts > 1 or "accumulation" in train:
        train["accumulation"] = parts
    if overrides.seed != OWN:
        train["seed"] = overrides.seed
    if overrides.precision != "recipe":
        train["precision"] = overrides.precision
    if overrides.gpus != OWN:
        train["device"] = "cuda" if overrides.gpus else "cpu"
    if train.get("precision") == "tf32" and train.get("device") == "cpu":
        raise UserError(
            f"precision: tf32 needs a GPU, and this run of {recipe} is on the CPU; choose fp32 or "
            f"bf16, or gpus 1"
        )
    if overrides.data:
        sections["data"] |= {
            "source": "folder",
            "path": allowed_place(overrides.data),
            "validation": 0.1,
            "test": 0.1,
            "resize": "crop",
        }
    if recipe not in document["active"]:
        document["active"].append(recipe)
    write_document(document, path)
    try:
        return load_recipe(recipe, path)
    except UserError:
        atomic_write(path, before)
        raise


def change(recipe: str, settings: Mapping[str, Any], path: Path = PARAMS) -> None:
    """Writes `section.key: value` of a recipe into params.yaml, keeping its comments.

    Raises:
        UserError: naming the setting that does not do; the file is then as it was.
    """
    load_recipe(recipe, path, settings)
    document = read_document(path)
    for setting, value in settings.items():
        section, _, key = setting.partition(".")
        document["recipes"][recipe].setdefault(section, {})[key] = value
    write_document(document, path)


def own_values(recipe: str, path: Path = PARAMS) -> dict[str, str]:
    """What each field of the form that is left alone means, in words.

    Raises:
        UserError: for a recipe that is not there or not well formed.
    """
    found = load_recipe(recipe, path)
    train = found.train.to_dict()
    values = {
        "data": f"the source {found.data.source} {found.data.path}".rstrip(),
        "gpus": f"device {train['device']}",
    }
    for name in ("steps", "batch_size", "learning_rate", "seed", "precision"):
        values[name] = _shown(train[name])
    for name, field in (("steps", "steps"), ("batch_size", "batch_size"), ("device", "gpus")):
        if _SMOKE[name] != train[name]:
            values[field] += f" (smoke: {_shown(_SMOKE[name])})"
    return values


def _shown(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


_SMOKE: dict[str, Any] = {  # of the section `train`
    "steps": 30,
    "batch_size": 4,
    "warmup_steps": 5,
    "log_every": 2,
    "validate_every": 10,
    "checkpoint_every": 5,
    "device": "cpu",
}


def shrink(sections: Any) -> None:
    """Makes a recipe's sections its smoke variant, in place.

    Every resolution, every way between two and the likelihood stay; widths and counts shrink.
    """
    model, train = sections["model"], sections["train"]
    train |= _SMOKE
    sections["evaluate"]["batch_size"] = min(sections["evaluate"]["batch_size"], 16)
    sections["sample"] |= {"n": 4, "reconstructions": 4}
    model["mixtures"] = min(model["mixtures"], 3)
    if model.get("kind") == "pixelcnn":
        model |= {"width": min(model["width"], 16), "layers": min(model["layers"], 2)}
        return
    for side in ("encoder", "decoder"):
        model[side] = re.sub(r"(\d+)x\d+", r"\1x1", model[side])
    narrow = min(model["width"], 16)
    if model["widths"]:
        # The same resolutions; still growing, from the image's own width to twice that.
        model["widths"] = ",".join(
            f"{resolution}:{narrow if width <= model['width'] else min(width, 2 * narrow)}"
            for resolution, width in parse_widths(model["widths"]).items()
        )
    model["width"] = narrow
    model["latent_channels"] = min(model["latent_channels"], 4)


def data_roots() -> list[str]:
    """Where `data` may lie: the entries of VDVAE_DATA_ROOTS with commas between, or data/raw.

    An entry is a folder, /absolute/path, or s3://bucket/prefix, and allows what is below it: `/`
    every folder, `s3://` every bucket that the machine's credentials reach.

    Raises:
        UserError: where an entry is neither.
    """
    roots = []
    for entry in filter(None, map(str.strip, Settings().data_roots.split(","))):
        if entry.startswith("/"):
            roots.append(os.path.realpath(entry))
        elif entry == "s3://" or s3_address(entry):
            roots.append(entry)
        else:
            raise UserError(
                f"VDVAE_DATA_ROOTS: {shown_url(entry)} is neither /absolute/path nor "
                f"s3://bucket/prefix; write those, with commas between"
            )
    return roots or [os.path.realpath("data/raw")]


def allowed_place(data: str) -> str:
    """The folder, links resolved, or the S3 prefix that the field `data` names.

    Raises:
        UserError: where it is none, or not below one of the roots.
    """
    address = s3_address(data)
    place = f"s3://{'/'.join(address)}".rstrip("/") if address else str(_folder(data))
    roots = data_roots()
    # With a slash behind both, s3://bucket/ab is not below s3://bucket/a.
    if not any(f"{place}/".startswith(f"{root.rstrip('/')}/") for root in roots):
        raise UserError(
            f"data: {shown_url(data)} is not below {' or '.join(roots)}; put the images there, "
            f"or let the service's owner add their folder or bucket to VDVAE_DATA_ROOTS"
        )
    if not address and not os.path.isdir(place):
        raise UserError(
            f"data: {shown_url(data)} is not a folder on this machine; check its spelling"
        )
    return place


def _folder(data: str) -> Path:
    if not data.startswith("file:///") or {"?", "#"} & set(data):
        raise UserError(
            f"data: {shown_url(data)} is not file:///absolute/path or s3://bucket/prefix of "
            f"images, without empty parts, '.' or '..'"
        )
    written = Path(unquote(data.removeprefix("file://")))
    if ".." in written.parts or "\0" in str(written):
        raise UserError(f"data: {shown_url(data)} holds '..'; write the folder's own path")
    return Path(os.path.realpath(written))  # where links lead in a circle, no folder

"""The manifest: the hashed list of a recipe's shards. Where it is, everything is.

It is written last. Nothing of it is trusted when it is read back.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.params import RECIPE
from vdvae.config import UserError, shown
from vdvae.files import read_json

SPLITS = ("train", "validation", "test")
KEY = r"[a-z0-9_-]{1,90}"  # WebDataset splits a name at its first dot; a tar holds 100 bytes
SHARD_BYTES = 64 * 2**20  # most pixels in a shard, which the writer and the reader hold in memory
_IMAGE_BYTES = 4096  # most that an image takes in a tar beside twice its pixels
_END_BYTES = 20 * 512  # of a tar


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One tar in the store."""

    name: str  # <recipe>-<split>-<number>.tar
    key: str  # in the store: shards/<recipe>/<sha256>.tar
    bytes: int
    sha256: str
    images: int


@dataclass(frozen=True, kw_only=True)
class Split:
    """A part of the data with its shards in order."""

    images: int
    shards: tuple[Shard, ...]


@dataclass(frozen=True, kw_only=True)
class SourceFacts:
    """Where the images came from."""

    name: str
    terms: str
    fingerprint: str  # sha256 over keys and pixels as the source gave them
    notes: dict[str, Any]  # what was converted, skipped or unusual


@dataclass(frozen=True, kw_only=True)
class Duplicates:
    """Images whose stored pixels are exactly those of another one."""

    within: dict[str, int]  # by split: images that could go, with one of each kept
    across: dict[str, int]  # by 'train and test' and the like: pictures that both have
    examples: tuple[tuple[str, str], ...]  # keys of some: the first with such pixels, a later one


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything about a recipe's data. `mean` and `std`: over all pixels of train, in 0..255."""

    recipe: str
    shape: tuple[int, int, int]  # H, W, C
    num_levels: int
    mean: float
    std: float
    source: SourceFacts
    splits: dict[str, Split]
    duplicates: Duplicates | None = None  # None in manifests of before they were counted

    @property
    def digest(self) -> str:
        """sha256 of the manifest's canonical JSON: two with the same are the same data."""
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """The manifest as it is written."""
        facts = dataclasses.asdict(self)
        if self.duplicates is None:
            del facts["duplicates"]
        return facts

    @classmethod
    def load(cls, path: Path) -> Manifest:
        """Reads a manifest and checks every part of it.

        Raises:
            UserError: where the file is missing, or anything in it is not as this module writes it.
        """
        remedy = f"run 'dvc repro -f -s shard@{path.stem}'"
        try:
            value = read_json(path, remedy)
        except FileNotFoundError:
            raise UserError(f"{path}: not found; {remedy}") from None
        try:
            return _manifest(value)
        except ValueError as error:
            raise UserError(f"{path}: is damaged ({error}); {remedy}") from None


def _manifest(value: Any) -> Manifest:
    top = _object(
        {"duplicates": None, **value} if isinstance(value, dict) else value,
        Manifest,
        "the manifest",
    )
    recipe = _text(top["recipe"], "recipe", RECIPE)
    shape = top["shape"]
    if not isinstance(shape, list) or len(shape) != 3:
        raise ValueError(f"shape: {shown(shape)} is not [height, width, channels]")
    splits = top["splits"]
    if not isinstance(splits, dict) or sorted(splits) != sorted(SPLITS):
        raise ValueError(f"splits: are not {', '.join(SPLITS)}")
    source = _object(top["source"], SourceFacts, "source")
    if not isinstance(source["notes"], dict):
        raise ValueError("source.notes: is not an object")
    sizes = (
        _count(shape[0], "shape", 4096),
        _count(shape[1], "shape", 4096),
        _count(shape[2], "shape", 3),
    )
    return Manifest(
        recipe=recipe,
        shape=sizes,
        num_levels=_count(top["num_levels"], "num_levels", 256),
        mean=_gray(top["mean"], "mean"),
        std=_gray(top["std"], "std"),
        source=SourceFacts(
            name=_text(source["name"], "source.name"),
            terms=_text(source["terms"], "source.terms"),
            fingerprint=_text(source["fingerprint"], "source.fingerprint", "[0-9a-f]{64}"),
            notes=source["notes"],
        ),
        splits={name: _split(splits[name], recipe, name, math.prod(sizes)) for name in SPLITS},
        duplicates=_duplicates(top["duplicates"]),
    )


def _duplicates(value: Any) -> Duplicates | None:
    if value is None:
        return None
    top = _object(value, Duplicates, "duplicates")
    pairs = [f"{one} and {other}" for one, other in itertools.combinations(SPLITS, 2)]
    for name, keys in (("within", list(SPLITS)), ("across", pairs)):
        counts = top[name]
        if not isinstance(counts, dict) or sorted(counts) != sorted(keys):
            raise ValueError(f"duplicates.{name}: does not have the keys {', '.join(keys)}")
        for key, count in counts.items():
            if count != 0:
                _count(count, f"duplicates.{name}.{key}")
    examples = top["examples"]
    if not isinstance(examples, list) or any(
        not isinstance(pair, list) or len(pair) != 2 for pair in examples
    ):
        raise ValueError("duplicates.examples: is not a list of pairs")
    return Duplicates(
        within=top["within"],
        across=top["across"],
        examples=tuple(
            (
                _text(one, "duplicates.examples", KEY),
                _text(other, "duplicates.examples", KEY),
            )
            for one, other in examples
        ),
    )


def _split(value: Any, recipe: str, split: str, pixels: int) -> Split:
    """A part of the data whose images have so many bytes of pixels each."""
    where = f"splits.{split}"
    top = _object(value, Split, where)
    if not isinstance(top["shards"], list):
        raise ValueError(f"{where}.shards: is not a list")
    shards = []
    for number, item in enumerate(top["shards"]):
        place = f"{where}.shards[{number}]"
        fields = _object(item, Shard, place)
        sha256 = _text(fields["sha256"], f"{place}.sha256", "[0-9a-f]{64}")
        size = fields["bytes"]
        expected = {"name": shard_name(recipe, split, number), "key": shard_key(recipe, sha256)}
        for key, text in expected.items():
            if fields[key] != text:
                raise ValueError(f"{place}.{key}: {shown(fields[key])} is not {text!r}")
        # A reader holds the bytes and then the pixels: both are bounded here, as the writer does.
        images = _count(fields["images"], f"{place}.images", max(1, SHARD_BYTES // pixels))
        _count(size, f"{place}.bytes", images * (2 * pixels + _IMAGE_BYTES) + _END_BYTES)
        shards.append(Shard(bytes=size, sha256=sha256, images=images, **expected))
    images = _count(top["images"], f"{where}.images")
    if images != sum(shard.images for shard in shards):
        raise ValueError(f"{where}.images: {images} is not the sum over its shards")
    return Split(images=images, shards=tuple(shards))


def _object(value: Any, kind: type, where: str) -> dict[str, Any]:
    names = [item.name for item in dataclasses.fields(kind)]
    if not isinstance(value, dict) or sorted(value) != sorted(names):
        raise ValueError(f"{where}: does not have the keys {', '.join(names)}")
    return value


def _text(value: Any, where: str, pattern: str = r".{0,1000}") -> str:
    if not isinstance(value, str) or not re.fullmatch(pattern, value):
        raise ValueError(f"{where}: {shown(value)} is not a text as expected")
    return value


def _count(value: Any, where: str, most: int = 2**50) -> int:
    if type(value) is not int or not 1 <= value <= most:
        raise ValueError(f"{where}: {shown(value)} is not a whole number from 1 to {most}")
    return value


def _gray(value: Any, where: str) -> float:
    if type(value) is not float or not 0 <= value <= 255:
        raise ValueError(f"{where}: {shown(value)} is not a number from 0 to 255")
    return value


def shard_name(recipe: str, split: str, number: int) -> str:
    """What a shard is called in the manifest and in messages."""
    return f"{recipe}-{split}-{number:06d}.tar"


def shard_key(recipe: str, sha256: str) -> str:
    """Where a shard of these bytes is in the store."""
    return f"shards/{recipe}/{sha256}.tar"

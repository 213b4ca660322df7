"""The manifest: the hashed list of a recipe's shards. Where it is, everything is.

It is written last. Nothing of it is trusted when it is read back.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, Strict, ValidationError, model_validator

from pipeline.params import RECIPE
from vdvae.config import UserError, shown
from vdvae.files import read_json

SPLITS = ("train", "validation", "test")
KEY = r"[a-z0-9_-]{1,90}"  # WebDataset splits a name at its first dot; a tar holds 100 bytes
SHARD_BYTES = 64 * 2**20  # most pixels in a shard, which the writer and the reader hold in memory
_IMAGE_BYTES = 4096  # most that an image takes in a tar beside twice its pixels
_END_BYTES = 20 * 512  # of a tar
LEFT_OUT = "left out"  # the note that counts files which are no images, by reason

Count = Annotated[int, Field(ge=0, le=2**50)]
Positive = Annotated[int, Field(ge=1, le=2**50)]
Side = Annotated[int, Field(ge=1, le=4096)]
Grey = Annotated[float, Field(ge=0, le=255)]
Text = Annotated[str, Field(max_length=1000)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Key = Annotated[str, Field(pattern=f"^{KEY}$")]
A_LIST = Strict(False)  # JSON has no tuples


class _Checked(BaseModel):
    """Each field of its type and within its bounds, none missing and none unknown."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


class Shard(_Checked):
    """One tar in the store."""

    name: str  # <recipe>-<split>-<number>.tar
    key: str  # in the store: shards/<recipe>/<sha256>.tar
    bytes: Positive
    sha256: Sha256
    images: Positive


class Split(_Checked):
    """A part of the data with its shards in order."""

    images: Positive
    shards: Annotated[tuple[Shard, ...], A_LIST]


class SourceFacts(_Checked):
    """Where the images came from."""

    name: Text
    terms: Text
    fingerprint: Sha256  # over keys and pixels as the source gave them
    notes: dict[str, Any]  # what was converted, skipped or unusual


class Duplicates(_Checked):
    """Images whose stored pixels are exactly those of another one."""

    within: dict[str, Count]  # by split: images that could go, with one of each kept
    across: dict[str, Count]  # by 'train and test' and the like: pictures that both have
    # Keys of some: the first with such pixels, a later one.
    examples: Annotated[tuple[Annotated[tuple[Key, Key], A_LIST], ...], A_LIST]

    @model_validator(mode="after")
    def _of_all_splits(self) -> Self:
        pairs = {f"{one} and {other}" for one, other in itertools.combinations(SPLITS, 2)}
        if self.within.keys() != set(SPLITS) or self.across.keys() != pairs:
            raise ValueError(f"are not counted for each of {', '.join(SPLITS)} and each pair")
        return self


class Manifest(_Checked):
    """Everything about a recipe's data. `mean` and `std`: over all pixels of train, in 0..255."""

    recipe: Annotated[str, Field(pattern=f"^{RECIPE}$")]
    shape: Annotated[tuple[Side, Side, Annotated[int, Field(ge=1, le=3)]], A_LIST]  # H, W, C
    num_levels: Annotated[int, Field(ge=1, le=256)]
    mean: Grey
    std: Grey
    source: SourceFacts
    splits: dict[str, Split]
    duplicates: Duplicates | None = None  # None in manifests of before they were counted

    @model_validator(mode="after")
    def _of_one_piece(self) -> Self:
        if self.splits.keys() != set(SPLITS):
            raise ValueError(f"splits: are not {', '.join(SPLITS)}")
        # A reader holds the bytes and then the pixels: both are bounded here, as the writer does.
        pixels = math.prod(self.shape)
        most = max(1, SHARD_BYTES // pixels)
        for split, part in self.splits.items():
            for number, shard in enumerate(part.shards):
                bytes_ = shard.images * (2 * pixels + _IMAGE_BYTES) + _END_BYTES
                for field, holds in (
                    ("name", shard.name == shard_name(self.recipe, split, number)),
                    ("key", shard.key == shard_key(self.recipe, shard.sha256)),
                    ("images", shard.images <= most),
                    ("bytes", shard.bytes <= bytes_),
                ):
                    if not holds:
                        where = f"splits.{split}.shards.{number}.{field}"
                        raise ValueError(f"{where}: {shown(getattr(shard, field))} does not fit")
            if part.images != sum(shard.images for shard in part.shards):
                raise ValueError(f"splits.{split}.images: is not the sum over its shards")
        return self

    @property
    def digest(self) -> str:
        """sha256 of the manifest's canonical JSON: two with the same are the same data."""
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def left_out(self) -> str:
        """How many files were no images, and why: `3 (damaged 1, is animated 2)`; or empty."""
        counts = self.source.notes.get(LEFT_OUT)
        if not isinstance(counts, dict) or not all(type(count) is int for count in counts.values()):
            return ""
        why = ", ".join(f"{reason} {count:,}" for reason, count in counts.items())
        return f"{sum(counts.values()):,} ({why})"

    def to_dict(self) -> dict[str, Any]:
        """The manifest as it is written."""
        return self.model_dump(mode="json", exclude=None if self.duplicates else {"duplicates"})

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
            return cls.model_validate(value)
        except ValidationError as errors:
            first = errors.errors()[0]
            where = ".".join(map(str, first["loc"]))
            reason = (
                f"{where}: {first['msg']}, not {shown(first['input'])}" if where else first["msg"]
            )
            raise UserError(f"{path}: is damaged ({reason}); {remedy}") from None


def shard_name(recipe: str, split: str, number: int) -> str:
    """What a shard is called in the manifest and in messages."""
    return f"{recipe}-{split}-{number:06d}.tar"


def shard_key(recipe: str, sha256: str) -> str:
    """Where a shard of these bytes is in the store."""
    return f"shards/{recipe}/{sha256}.tar"

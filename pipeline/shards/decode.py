"""Decodes a shard: from the store's bytes to pixels. Nothing of it is trusted on the way.

Shapes: N images of a shard, C channels, H W pixels.
"""

from __future__ import annotations

import functools
import hashlib
import io
import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from imagecodecs import png_decode
from numpy.typing import NDArray
from PIL import Image

from pipeline.shards.manifest import KEY, Manifest, Shard
from pipeline.sources.decode import png_head
from pipeline.sources.source import on_levels
from pipeline.sources.tars import members
from pipeline.storage import ObjectMissing, Store
from vdvae.config import UserError


class Decoded(NamedTuple):
    """All images of a shard, in its order."""

    keys_N: list[str]
    x_NCHW: NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """What a recipe's shards must be, and where they lie."""

    recipe: str
    shape: tuple[int, int, int]  # H, W, C
    num_levels: int
    store: Store

    @classmethod
    def of(cls, manifest: Manifest, store: Store) -> Decoder:
        """That of a manifest's shards."""
        return cls(
            recipe=manifest.recipe,
            shape=manifest.shape,
            num_levels=manifest.num_levels,
            store=store,
        )

    def images(
        self, shard: Shard, fetch: Callable[[], bytes] | None = None
    ) -> Iterator[tuple[str, NDArray[np.uint8]]]:
        """Key and x_CHW of each image of a shard, in its order, as they are decoded.

        Args:
            shard: which.
            fetch: gives what `self.fetch` would give, which is called by default.

        Raises:
            UserError: the shard is missing, or is not, byte for byte and image for image, what the
                manifest says; some of it, after all images were given.
        """
        data = fetch() if fetch else self.fetch(shard)
        keys: set[str] = set()
        try:
            for key, png in _files(data):
                x_CHW = np.ascontiguousarray(self._pixels(png).transpose(2, 0, 1))
                on_CHW = on_levels(x_CHW, self.num_levels)
                if on_CHW is not x_CHW and not np.array_equal(on_CHW, x_CHW):
                    raise ValueError(f"an image is not on {self.num_levels} levels")
                if key in keys:
                    raise ValueError("two images have one name")
                keys.add(key)
                if len(keys) <= shard.images:
                    yield key, x_CHW
        except Exception as error:  # tarfile and Pillow raise all sorts of things at odd bytes
            raise self.refusal(shard, f"cannot be read ({error})") from error
        if len(keys) != shard.images:
            raise self.refusal(shard, f"{len(keys)} images instead of {shard.images}")

    def decode(self, shard: Shard, fetch: Callable[[], bytes] | None = None) -> Decoded:
        """All images of a shard; takes and raises what `images` does."""
        height, width, channels = self.shape
        x_NCHW = np.empty((shard.images, channels, height, width), np.uint8)
        keys: list[str] = []
        for key, x_CHW in self.images(shard, fetch):
            x_NCHW[len(keys)] = x_CHW
            keys.append(key)
        return Decoded(keys, x_NCHW)

    def fetch(self, shard: Shard) -> bytes:
        """A shard's bytes, which are those that the manifest names, or UserError."""
        try:
            data = self.store.get(shard.key, limit=shard.bytes + 1)
        except ObjectMissing:
            place = self.store.url(shard.key)
            raise self.refusal(shard, f"not found at {place}", ", or set VDVAE_STORE") from None
        if len(data) != shard.bytes:
            size = f"{len(data)} bytes" if len(data) < shard.bytes else "more bytes"
            raise self.refusal(shard, f"{size} instead of {shard.bytes}")
        sha256 = hashlib.sha256(data).hexdigest()
        if sha256 != shard.sha256:
            raise self.refusal(shard, f"sha256 mismatch ({sha256}, not {shard.sha256})")
        return data

    def _pixels(self, png: bytes) -> NDArray[np.uint8]:
        if not png.startswith(self._head):
            with Image.open(io.BytesIO(png), formats=["PNG"]) as picture:
                what = f"an image is {picture.mode} {picture.width}x{picture.height}"
            raise ValueError(f"{what} or not stored as 8-bit pixels row by row")
        # libpng: twice as fast as Pillow, and unlike it lets other threads work meanwhile.
        x_HWC: NDArray[np.uint8] = png_decode(png).reshape(self.shape)
        return x_HWC

    @functools.cached_property
    def _head(self) -> bytes:
        return png_head(*self.shape)

    def refusal(self, shard: Shard, what: str, also: str = "") -> UserError:
        """Why a shard is not taken, and what mends it."""
        return UserError(
            f"data/manifests/{self.recipe}.json: shard {shard.name}: {what}; "
            f"run 'dvc repro -f -s shard@{self.recipe}'{also}"
        )


def _files(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Key and PNG of each image of a shard: plain files, one after the other, no others.

    webdataset's own way into a tar would unpack a compressed one and pass over links in silence;
    and it imports PyTorch, which takes two seconds of each process that decodes.
    """
    end = 0
    for member in members(io.BytesIO(data), len(data)):
        start = end + tarfile.BLOCKSIZE
        named = re.fullmatch(rf"({KEY})\.png", member.name)
        if not named or member.type != tarfile.REGTYPE or member.offset_data != start:
            raise ValueError(f"{member.name!a} at byte {member.offset} is no image of this project")
        yield named[1], data[start : start + member.size]
        end = start + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE

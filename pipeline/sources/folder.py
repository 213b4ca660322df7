"""A folder of anybody's images, on this machine or in an S3 bucket."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from pipeline.params import DataConfig
from pipeline.sources.decode import FORMATS, OddImage, decode_to_store
from pipeline.sources.raw import File, raw_files, setting, suffix_of
from pipeline.sources.source import Item, Loaded, images_or_why_not, on_levels, require
from pipeline.storage import one_line
from vdvae.config import UserError

READ = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
# Images all the same, so that leaving them out in silence would be wrong.
NOT_READ = (".heic", ".heif", ".avif", ".jp2", ".jxl", ".psd", ".dng")


class Folder:
    """Every image below a folder, in the order of their names; links and dot files are left out.

    The same images below an S3 prefix are the same images: names decide, not where they lie. Keys
    are made of the name, so they stay when other images come or go: `cat-<16 hex digits of the
    sha256 of the relative path>`. The split is that of the pixels as they are stored: sha256
    of split_seed and pixels, read as a number in [0, 1), below `test` is test, below `test` +
    `validation` is validation, the rest train. So equal images are in the same split, and an
    image's split does not depend on the others.
    """

    name = "folder"
    terms = "those of the images' owner; this project does not know them"

    def __init__(self, recipe: str, data: DataConfig) -> None:
        require(recipe, data, resize=("", "crop", "stretch"))
        self.files = raw_files(recipe, data, "set this key to your folder of images")
        self.recipe = recipe
        self.data = data
        self.notes: dict[str, Any] = {}

    def items(self) -> Iterator[Item | OddImage]:
        skipped: Counter[str] = Counter()
        listed, odd = self.listed(skipped)
        yield from odd
        if not listed and not odd:
            raise UserError(
                f"{one_line(self.files.root)}: has no images ({', '.join(READ)}), only "
                f"{sum(skipped.values())} other files or links; put images there, or set "
                f"{setting(self.recipe, 'path')}"
            )
        if skipped:
            self.notes["skipped"] = dict(sorted(skipped.items()))

        for file in map(file_of, listed):
            yield Item(_key(file.name), "", file)

    def load(self, places: Iterable[File], converted: Counter[str]) -> Iterator[Loaded | OddImage]:
        return images_or_why_not(self._image, places, converted)

    def listed(self, skipped: Counter[str]) -> tuple[list[bytes], list[OddImage]]:
        """Files that may be images by name, as `file_of` reads them, and those that are not read.

        In order of the names, as one object each: there may be millions.
        """
        found: list[bytes] = []
        odd = []
        for file in self.files.list(skipped):
            suffix = suffix_of(file.name)
            if suffix in NOT_READ:
                odd.append(
                    OddImage(
                        f"{self._shown(file.name)}: {suffix} images are not read; convert it to "
                        f"one of {', '.join(FORMATS)}, or take it out",
                        f"{suffix} is not read",
                    )
                )
            elif suffix in READ:
                found.append(_bytes(file.name) + b"\0" + file.stamp.encode())
            else:
                skipped[suffix] += 1
        found.sort()
        return found, odd

    def _image(self, file: File, converted: Counter[str]) -> Loaded:
        size, channels = self.data.image_size, self.data.channels
        content = self.files.image(file.name)
        decoded, png = decode_to_store(content, self._shown(file.name), channels, converted)
        picture = self._sized(decoded, file.name, converted)
        image_HWC = np.asarray(picture).reshape(size, size, channels)
        stored_HWC = on_levels(image_HWC, self.data.num_levels)
        same = picture is decoded and stored_HWC is image_HWC
        return Loaded(stored_HWC, png if same else None, self._split(stored_HWC))

    def _shown(self, name: str) -> str:
        return one_line(f"{self.files.root}/{name}")

    def _sized(self, picture: Image.Image, name: str, converted: Counter[str]) -> Image.Image:
        size = self.data.image_size
        if picture.size == (size, size):
            return picture
        if not self.data.resize:
            raise OddImage(
                f"{self._shown(name)}: is {picture.width}x{picture.height}, not "
                f"{size}x{size}; set {setting(self.recipe, 'resize')} to crop or stretch",
                "another size",
            )
        if min(picture.size) < size:
            converted["enlarged"] += 1
        if self.data.resize == "stretch":
            return picture.resize((size, size), Image.Resampling.LANCZOS)
        return ImageOps.fit(picture, (size, size), Image.Resampling.LANCZOS)

    def _split(self, image_HWC: NDArray[np.uint8]) -> str:
        digest = hashlib.sha256(self.data.split_seed.to_bytes(4, "little") + image_HWC.tobytes())
        number = int.from_bytes(digest.digest()[:8], "big") / 2**64
        if number < self.data.test:
            return "test"
        return "validation" if number < self.data.test + self.data.validation else "train"


def file_of(entry: bytes) -> File:
    """One of the files that were listed."""
    name, _, stamp = entry.partition(b"\0")
    return File(name.decode("utf-8", "surrogateescape"), stamp.decode())


def _key(name: str) -> str:
    words = re.sub("[^a-z0-9]+", "-", PurePosixPath(name).stem.lower())[:40].strip("-") or "image"
    return f"{words}-{hashlib.sha256(_bytes(name)).hexdigest()[:16]}"


def _bytes(name: str) -> bytes:
    # A file's name may be bytes that are no text; these come back as they were.
    return name.encode("utf-8", "surrogateescape")

"""FFHQ: 70,000 faces, as one array of 256x256 images or as a folder of 1024x1024 PNGs."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from PIL import Image

from pipeline.params import DataConfig
from pipeline.sources.decode import OddImage, decode_to_store
from pipeline.sources.raw import File, Files, npy_header, raw_file, raw_files
from pipeline.sources.source import Item, Loaded, images_or_why_not, require, whole_number
from pipeline.storage import one_line
from vdvae.config import UserError

URL = "https://openaipublic.blob.core.windows.net/very-deep-vaes-assets/vdvae-assets/ffhq-256.npy"
IMAGES = 70_000
TEST_256 = 7_000
TEST_1024 = 5_000


class Ffhq:
    """Keys `ffhq-00012` by the image's number, in that order.

    Test as published: at 1024 the numbers from 65,000 on; below, the last 7,000 of
    RandomState(5).permutation(70000). The published validation set is the test set; here the first
    `validation` images of RandomState(split_seed).permutation of the others are validation.
    PNGs are brought to `image_size` bilinearly (Pillow's, which averages as it shrinks).
    """

    name = "ffhq"
    terms = "CC BY-NC-SA 4.0 by NVIDIA: non-commercial use only; single images have own licences"

    def __init__(self, recipe: str, data: DataConfig) -> None:
        require(recipe, data, channels=(3,))
        self.size = data.image_size
        remedy = (
            f"run 'vdvae fetch ffhq256', or get {URL}, or the folder images1024x1024 of FFHQ, and "
            f"set this key to where it is"
        )
        self.files: Files
        self.array: File | None = None
        if data.path.endswith(".npy"):
            self.files, self.array = raw_file(recipe, data, remedy)
        else:
            self.files = raw_files(recipe, data, remedy)
            if self.size != 1024:
                require(recipe, data, resize=("stretch", "crop"))  # the same for squares
        test = TEST_1024 if self.size == 1024 else TEST_256
        self.validation = whole_number(recipe, "validation", data.validation, IMAGES - test)
        self.seed = data.split_seed
        self.notes: dict[str, Any] = {}

    def items(self) -> Iterator[Item]:
        places = self._png_files() if self.array is None else self._indices()
        for index, (split, place) in enumerate(zip(self._splits(), places, strict=True)):
            yield Item(f"ffhq-{index:05d}", split, place)

    def load(self, places: Iterable[Any], converted: Counter[str]) -> Iterator[Loaded | OddImage]:
        if self.array is None:
            yield from images_or_why_not(self._read_png, places, converted)
            return
        bytes_each = self.size**2 * 3
        with self.files.open(self.array.name) as array:
            start = self._header(array)
            for index, _ in places:
                array.seek(start + index * bytes_each)
                pixels = array.read(bytes_each)
                if len(pixels) != bytes_each:
                    raise self._refusal("ends too soon")
                yield Loaded(np.frombuffer(pixels, np.uint8).reshape(self.size, self.size, 3))

    def _splits(self) -> list[str]:
        if self.size == 1024:
            others, test = np.split(np.arange(IMAGES), [IMAGES - TEST_1024])
        else:
            others, test = np.split(
                np.random.RandomState(5).permutation(IMAGES), [IMAGES - TEST_256]
            )
        order = np.random.RandomState(self.seed).permutation(others)
        splits = ["train"] * IMAGES
        for split, indices in (("validation", order[: self.validation]), ("test", test)):
            for index in indices:
                splits[index] = split
        return splits

    def _indices(self) -> Iterator[tuple[int, str]]:
        assert self.array is not None
        with self.files.open(self.array.name) as array:
            self._header(array)
        for index in range(IMAGES):
            yield index, self.array.stamp

    def _header(self, array: io.BufferedReader) -> int:
        """Where the pixels begin, after a header that is as it should be; never a pickle."""
        try:
            shape, dtype = npy_header(array)
        except UserError:
            raise
        except Exception as error:  # NumPy raises all sorts of things at odd headers
            raise self._refusal(f"cannot be read as .npy ({error})") from error
        wanted = (IMAGES, self.size, self.size, 3)
        if shape != wanted or dtype != np.uint8:
            raise self._refusal(
                f"is {dtype} {shape}, not uint8 {wanted}",
                ", or use the source 'folder' for other images",
            )
        return array.tell()

    def _refusal(self, what: str, also: str = "") -> UserError:
        assert self.array is not None
        place = one_line(f"{self.files.root}/{self.array.name}")
        return UserError(f"{place}: {what}; get {URL} anew{also}")

    def _png_files(self) -> Iterator[File]:
        found = {file.name: file for file in self.files.list(Counter())}
        for index in range(IMAGES):
            name = f"{index:05d}.png"
            # The official folder has subfolders of a thousand; some copies have none.
            file = found.get(f"{index // 1000 * 1000:05d}/{name}") or found.get(name)
            if file is None:
                raise UserError(
                    f"{one_line(f'{self.files.root}/{name}')}: not found; all of 00000.png to "
                    f"{IMAGES - 1:05d}.png must be there (use the source 'folder' for a part of "
                    f"them)"
                )
            yield file

    def _read_png(self, file: File, converted: Counter[str]) -> Loaded:
        name = one_line(f"{self.files.root}/{file.name}")
        content = self.files.image(file.name)
        picture, png = decode_to_store(content, name, 3, converted, ("PNG",))
        if picture.size != (1024, 1024):
            raise OddImage(
                f"{name}: is {picture.width}x{picture.height}, not 1024x1024; get it anew",
                "another size",
            )
        if self.size != 1024:
            picture = picture.resize((self.size, self.size), Image.Resampling.BILINEAR)
            converted[f"1024x1024 to {self.size}x{self.size}, bilinear"] += 1
            png = None
        return Loaded(np.asarray(picture), png)

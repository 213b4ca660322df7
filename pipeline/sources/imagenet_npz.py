"""The later release of downsampled ImageNet (Chrabaszcz et al., 2017), not the paper's images.

It has better figures than the paper's set of van den Oord et al., so the two are never compared.
"""

from __future__ import annotations

import contextlib
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import IO, Any

import numpy as np

from pipeline.params import DataConfig
from pipeline.sources.raw import npy_header, raw_files
from pipeline.sources.source import Item, Loaded, require, whole_number
from pipeline.storage import one_line
from vdvae.config import UserError

TRAIN_FILES = tuple(f"train_data_batch_{number}.npz" for number in range(1, 11))
TEST_FILE = "val_data.npz"
_MOST_IMAGES = 2**21  # in a file; all of ImageNet are fewer


class ImageNetNpz:
    """Keys `imagenet32npz-train-0000012` and `imagenet32npz-test-0000012` by place in the files.

    Of RandomState(split_seed).permutation(n) of the ten training files the last `validation` images
    are validation; test is the official validation set. Labels are not read, nor is any pickle.
    """

    name = "imagenet-npz"
    terms = "non-commercial research and education only (image-net.org)"

    def __init__(self, recipe: str, data: DataConfig) -> None:
        require(recipe, data, image_size=(32, 64), channels=(3,), resize=("",))
        remedy = (
            f"get Imagenet{data.image_size}_train and _val as npz from image-net.org, unpack them, "
            f"and set this key to the folder that holds {TRAIN_FILES[0]} and {TEST_FILE}"
        )
        self.files = raw_files(recipe, data, remedy)
        for name in (*TRAIN_FILES, TEST_FILE):
            if self.files.find(name) is None:
                raise UserError(f"{self._shown(name)}: not found; {remedy}")
        self.recipe = recipe
        self.data = data
        self.notes: dict[str, Any] = {"release": "the later one: figures compare to no other set"}

    def items(self) -> Iterator[Item]:
        total = 0
        for name in TRAIN_FILES:
            with self._rows(name) as (_, count):
                total += count
        validation = whole_number(self.recipe, "validation", self.data.validation, total)
        is_validation = np.zeros(total, bool)
        order = np.random.RandomState(self.data.split_seed).permutation(total)
        is_validation[order[-validation:]] = True
        size = self.data.image_size
        for index, planes in enumerate(row for name in TRAIN_FILES for row in self._planes(name)):
            split = "validation" if is_validation[index] else "train"
            yield Item(f"imagenet{size}npz-train-{index:07d}", split, planes)
        for index, planes in enumerate(self._planes(TEST_FILE)):
            yield Item(f"imagenet{size}npz-test-{index:07d}", "test", planes)

    def load(self, places: Iterable[bytes], converted: Counter[str]) -> Iterator[Loaded]:
        size = self.data.image_size
        for planes in places:
            image_CHW = np.frombuffer(planes, np.uint8).reshape(3, size, size)
            yield Loaded(image_CHW.transpose(1, 2, 0))

    def _planes(self, name: str) -> Iterator[bytes]:
        # Row by row: a file has more than 100,000.
        bytes_each = 3 * self.data.image_size**2
        with self._rows(name) as (rows, count):
            for _ in range(count):
                planes = rows.read(bytes_each)
                if len(planes) != bytes_each:
                    raise EOFError("it ends too soon")
                yield planes
            if rows.read(1):  # reads the checksum, too
                raise ValueError("it goes on after its last image")

    @contextlib.contextmanager
    def _rows(self, name: str) -> Iterator[tuple[IO[bytes], int]]:
        try:
            with (
                self.files.open(name) as file,
                zipfile.ZipFile(file) as archive,
                archive.open("data.npy") as rows,
            ):
                shape, dtype = npy_header(rows)
                if len(shape) != 2 or shape[1] != 3 * self.data.image_size**2 or dtype != np.uint8:
                    raise ValueError(f"its data are {dtype} {shape}")
                if not 0 <= shape[0] <= _MOST_IMAGES:
                    raise ValueError(f"it says that it has {shape[0]} images")
                yield rows, shape[0]
        except UserError:
            raise
        except Exception as error:  # zipfile and NumPy raise all sorts of things at odd bytes
            raise UserError(
                f"{self._shown(name)}: cannot be read as such an npz file ({error}); get it anew"
            ) from error

    def _shown(self, name: str) -> str:
        return one_line(f"{self.files.root}/{name}")

"""CIFAR-10 from its binary archive, which is read as it is: no extraction, no pickle, no links."""

from __future__ import annotations

import gzip
import hashlib
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.params import DataConfig
from pipeline.sources.raw import raw_file
from pipeline.sources.source import Item, Loaded, require, whole_number
from pipeline.sources.tars import members
from pipeline.storage import one_line
from vdvae.config import UserError

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
TRAIN_FILES = tuple(f"data_batch_{number}.bin" for number in range(1, 6))
TEST_FILE = "test_batch.bin"
FILE_IMAGES = 10_000  # records in each file of the official archive
RECORD = 1 + 3 * 32 * 32  # a label, then the red, green and blue planes
_MEMBER_BYTES = 2**26  # of any file in the archive; the official ones have less than half


class Cifar10:
    """Keys `cifar10-train-00012` and `cifar10-test-00012` by the position in the archive.

    Splits as published: of RandomState(split_seed).permutation(50000), 11172018 being the published
    seed, the first `validation` images are validation and the rest train, in that order; test is
    the archive's own. An archive with fewer images than the official one is taken for what it
    holds, with `validation` in proportion; one of the official size must have the official md5.
    """

    name = "cifar10"
    terms = "no licence stated; its authors ask to cite Krizhevsky, Learning Multiple Layers, 2009"

    def __init__(self, recipe: str, data: DataConfig) -> None:
        require(recipe, data, image_size=(32,), channels=(3,), resize=("",))
        self.files, self.file = raw_file(
            recipe,
            data,
            f"run 'vdvae fetch cifar10', or get {URL} (md5 {MD5}) and set this key to it",
        )
        official = FILE_IMAGES * len(TRAIN_FILES)
        self.validation = whole_number(recipe, "validation", data.validation, official)
        self.seed = data.split_seed
        self.notes: dict[str, Any] = {}

    def items(self) -> Iterator[Item]:
        files = self._read()
        train = np.concatenate([files[name] for name in TRAIN_FILES])
        test = files[TEST_FILE]
        validation = self._check_counts(len(train), len(test))
        order = np.random.RandomState(self.seed).permutation(len(train))
        for place, index in enumerate(order):
            split = "validation" if place < validation else "train"
            yield Item(f"cifar10-train-{index:05d}", split, train[index, 1:].tobytes())
        for index, record in enumerate(test):
            yield Item(f"cifar10-test-{index:05d}", "test", record[1:].tobytes())

    def load(self, places: Iterable[bytes], converted: Counter[str]) -> Iterator[Loaded]:
        for planes in places:
            image_CHW = np.frombuffer(planes, np.uint8).reshape(3, 32, 32)
            yield Loaded(image_CHW.transpose(1, 2, 0))

    def _check_counts(self, train: int, test: int) -> int:
        official = FILE_IMAGES * len(TRAIN_FILES)
        if (train, test) != (official, FILE_IMAGES):
            self.notes["archive"] = (
                f"not the official one: {train} + {test} images instead of "
                f"{official} + {FILE_IMAGES}; validation taken in proportion"
            )
            return round(train * self.validation / official)
        with self.files.open(self.file.name) as file:
            md5 = hashlib.file_digest(file, "md5").hexdigest()
        if md5 != MD5:
            raise self._refusal(f"has md5 {md5} where the official archive has {MD5}")
        self.notes["md5"] = md5
        return self.validation

    def _read(self) -> dict[str, NDArray[np.uint8]]:
        files: dict[str, NDArray[np.uint8]] = {}
        try:
            with (
                self.files.open(self.file.name) as file,
                gzip.open(file) as stream,
            ):
                for member in members(stream, _MEMBER_BYTES):
                    name = PurePosixPath(member.name).name
                    if name not in (*TRAIN_FILES, TEST_FILE) or not member.isreg():
                        continue
                    if name in files:
                        raise self._refusal(f"holds {name} twice")
                    files[name] = self._records(stream, member, name)
                while stream.read(2**20):  # the checksum stands at the end
                    pass
        except UserError:
            raise
        except Exception as error:  # tarfile raises all sorts of things at odd headers
            raise self._refusal(f"cannot be read as a gzipped tar ({error})") from error
        missing = [name for name in (*TRAIN_FILES, TEST_FILE) if name not in files]
        if missing:
            raise self._refusal(f"has no {missing[0]}")
        return files

    def _records(
        self, stream: gzip.GzipFile, member: tarfile.TarInfo, name: str
    ) -> NDArray[np.uint8]:
        if member.size % RECORD or not 0 < member.size <= FILE_IMAGES * RECORD:
            raise self._refusal(
                f"holds {name} with {member.size} bytes, which are not 1 to {FILE_IMAGES} records "
                f"of {RECORD}"
            )
        stream.seek(member.offset_data)
        records = np.frombuffer(stream.read(member.size), np.uint8).reshape(-1, RECORD)
        if records[:, 0].max() > 9:
            raise self._refusal(f"holds {name} with labels above 9, so it is not CIFAR-10")
        return records

    def _refusal(self, what: str) -> UserError:
        place = one_line(f"{self.files.root}/{self.file.name}")
        return UserError(f"{place}: {what}; get {URL} (md5 {MD5}) anew")

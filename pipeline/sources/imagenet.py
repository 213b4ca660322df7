"""Downsampled ImageNet as the paper has it (van den Oord et al., 2016): tars of small PNGs."""

from __future__ import annotations

import functools
import io
import itertools
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from pipeline.params import DataConfig
from pipeline.sources.decode import OddImage, decode_to_store
from pipeline.sources.raw import File, raw_files, setting, suffix_of
from pipeline.sources.source import Item, Loaded, images_or_why_not, require, whole_number
from pipeline.sources.tars import members
from pipeline.storage import one_line
from vdvae.config import UserError

URL = "http://www.image-net.org/small/{split}_{size}x{size}.tar"
OFFICIAL = (1_281_149, 49_999)  # images in the paper's tars
LATER_RELEASE = 50_000  # images in its validation set
_IMAGE_BYTES = 2**24  # of a PNG; one of 64x64 pixels has less than 2**14


class _Place(NamedTuple):
    """One PNG in a tar."""

    tar: File
    name: str
    offset: int  # of its bytes
    size: int


class ImageNet:
    """Keys `imagenet32-train-0000012` and `imagenet32-test-0000012` by the rank of the file's name.

    Order: by file name. Splits: of RandomState(split_seed).permutation(n) of the train tar the
    last `validation` images are validation; test is the official validation set. The published
    split (seed 42) followed the order in which a file system listed the files, so it cannot be had
    again; this one can.
    """

    name = "imagenet"
    terms = "non-commercial research and education only (image-net.org)"

    def __init__(self, recipe: str, data: DataConfig) -> None:
        require(recipe, data, image_size=(32, 64), channels=(3,), resize=("",))
        train, test = (
            URL.format(split=split, size=data.image_size) for split in ("train", "valid")
        )
        remedy = (
            f"run 'vdvae fetch imagenet{data.image_size}', or get {train} and {test} or a mirror "
            f"of them, and set this key to the folder that holds both"
        )
        self.files = raw_files(recipe, data, remedy)
        tars = []
        for url in (train, test):
            name = url.rpartition("/")[2]
            found = self.files.find(name)
            if found is None:
                listed = [file.name for file in self.files.list(Counter())]
                if any(name.endswith((".npz", "_npz.zip")) for name in listed):
                    raise UserError(
                        f"{one_line(self.files.root)}: holds the later npz release, other images "
                        f"whose figures cannot be compared; {remedy}; if it is that release you "
                        f"want, set {setting(recipe, 'source')} to imagenet-npz"
                    )
                raise UserError(f"{one_line(f'{self.files.root}/{name}')}: not found; {remedy}")
            tars.append(found)
        self.train, self.test = tars
        self.recipe = recipe
        self.data = data
        self.notes: dict[str, Any] = {}

    def items(self) -> Iterator[Item]:
        skipped: Counter[str] = Counter()
        train, test = self._places(self.train, skipped), self._places(self.test, skipped)
        if len(test) == LATER_RELEASE:
            raise UserError(
                f"{self._shown(self.test)}: has {len(test)} images, so it is the later release, "
                f"whose figures cannot be compared; get the paper's, which has 49,999"
            )
        if (len(train), len(test)) != OFFICIAL:
            self.notes["tars"] = (
                f"not the official ones: {len(train)} + {len(test)} images instead of "
                f"{OFFICIAL[0]} + {OFFICIAL[1]}"
            )
        if skipped:
            self.notes["skipped"] = dict(sorted(skipped.items()))
        validation = whole_number(self.recipe, "validation", self.data.validation, len(train))
        is_validation = np.zeros(len(train), bool)
        order = np.random.RandomState(self.data.split_seed).permutation(len(train))
        is_validation[order[-validation:]] = True
        size = self.data.image_size
        for rank, place in enumerate(train):
            split = "validation" if is_validation[rank] else "train"
            yield Item(f"imagenet{size}-train-{rank:07d}", split, place)
        for rank, place in enumerate(test):
            yield Item(f"imagenet{size}-test-{rank:07d}", "test", place)

    def load(
        self, places: Iterable[_Place], converted: Counter[str]
    ) -> Iterator[Loaded | OddImage]:
        for tar, of_tar in itertools.groupby(places, lambda place: place.tar):
            with self.files.open(tar.name) as file:
                image_at = functools.partial(self._image, file)
                yield from images_or_why_not(image_at, of_tar, converted)

    def _image(self, file: io.BufferedReader, place: _Place, converted: Counter[str]) -> Loaded:
        size = self.data.image_size
        name = f"{self._shown(place.tar)}: {place.name!a}"
        file.seek(place.offset)
        content = file.read(place.size)
        picture, png = decode_to_store(content, name, 3, converted, ("PNG",))
        if picture.size != (size, size):
            raise OddImage(
                f"{name}: is {picture.width}x{picture.height}, not {size}x{size}; get the tar anew",
                "another size",
            )
        return Loaded(np.asarray(picture), png)

    def _places(self, tar: File, skipped: Counter[str]) -> _Places:
        names, offsets, sizes = [], array("Q"), array("Q")
        try:
            with self.files.open(tar.name) as file:
                for member in members(file, _IMAGE_BYTES):
                    if member.isreg() and member.name.endswith(".png"):
                        names.append(member.name.encode("utf-8", "surrogateescape"))
                        offsets.append(member.offset_data)
                        sizes.append(member.size)
                    elif not member.isdir():
                        skipped[suffix_of(member.name) if member.isreg() else "link"] += 1
        except UserError:
            raise
        except Exception as error:  # tarfile raises all sorts of things at odd headers
            raise UserError(
                f"{self._shown(tar)}: cannot be read as a tar ({error}); get it anew"
            ) from error
        if not names:
            raise UserError(f"{self._shown(tar)}: has no PNG files; get it anew")
        return _Places(tar, np.array(names), np.array(offsets), np.array(sizes))

    def _shown(self, tar: File) -> str:
        return one_line(f"{self.files.root}/{tar.name}")


class _Places:
    """The PNGs of a tar in the order of their names; arrays, for there are more than a million."""

    def __init__(self, tar: File, names: Any, offsets: Any, sizes: Any) -> None:
        self.tar = tar
        order = np.argsort(names, kind="stable")
        self.names, self.offsets, self.sizes = names[order], offsets[order], sizes[order]

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[_Place]:
        for name, offset, size in zip(self.names, self.offsets, self.sizes, strict=True):
            yield _Place(self.tar, name.decode("utf-8", "surrogateescape"), int(offset), int(size))

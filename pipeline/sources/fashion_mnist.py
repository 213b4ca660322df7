"""Fashion-MNIST from its idx files, plain or gzipped: 70,000 grey pictures of clothes, 28x28."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.params import DataConfig
from pipeline.sources.raw import raw_files
from pipeline.sources.source import Item, Loaded, require, whole_number
from pipeline.storage import one_line
from vdvae.config import UserError

URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/{file}"
FILES = {"train": "train-images-idx3-ubyte", "test": "t10k-images-idx3-ubyte"}
MD5 = {  # of the gzipped files as they are published; Debian's are packed otherwise
    "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
}
PACKAGE = "/usr/share/datasets/fashion-mnist"  # of Debian
IMAGES = {"train": 60_000, "test": 10_000}
_SIDE = 28
_PADDED = 32
_HEADER = b"\0\0\x08\x03"  # unsigned bytes in three dimensions


class FashionMnist:
    """Keys `fashion-mnist-train-00012` and `fashion-mnist-test-00012` by the position in the file.

    Splits as published; of RandomState(split_seed).permutation(60000) the first `validation` images
    of train are validation and the rest train, in that order. A file with fewer images than the
    published one is taken for what it holds, with `validation` in proportion.

    `resize: mean`: two black pixels are added at each side, which makes 32x32; then each block of
    4x4, 2x2 or 1x1 pixels becomes its mean, halves rounded up.
    """

    name = "fashion_mnist"
    terms = "Fashion-MNIST, copyright 2017 Zalando SE; Expat (MIT) licence"

    def __init__(self, recipe: str, data: DataConfig) -> None:
        require(recipe, data, image_size=(8, 16, 32), channels=(1,), resize=("mean",))
        self.files = raw_files(
            recipe,
            dataclasses.replace(data, path=data.path or PACKAGE),
            "install Debian's package dataset-fashion-mnist ('apt-get install "
            "dataset-fashion-mnist'), or run 'vdvae fetch fashion-mnist' and set this key to "
            "data/raw/fashion-mnist",
        )
        self.validation = whole_number(recipe, "validation", data.validation, IMAGES["train"])
        self.seed, self.block = data.split_seed, _PADDED // data.image_size
        self.notes: dict[str, Any] = {}

    def items(self) -> Iterator[Item]:
        train, test = (self._read(split) for split in ("train", "test"))
        validation = self.validation
        if len(train) != IMAGES["train"]:
            validation = max(1, round(len(train) * validation / IMAGES["train"]))
            self.notes["files"] = (
                f"not the published ones: {len(train)} + {len(test)} images; validation taken in "
                f"proportion"
            )
        order = np.random.RandomState(self.seed).permutation(len(train))
        for place, index in enumerate(order):
            split = "validation" if place < validation else "train"
            yield Item(f"fashion-mnist-train-{index:05d}", split, train[index].tobytes())
        for index, pixels in enumerate(test):
            yield Item(f"fashion-mnist-test-{index:05d}", "test", pixels.tobytes())

    def load(self, places: Iterable[bytes], converted: Counter[str]) -> Iterator[Loaded]:
        for pixels in places:
            image = np.frombuffer(pixels, np.uint8).reshape(_SIDE, _SIDE)
            image = block_means(np.pad(image, (_PADDED - _SIDE) // 2), self.block)
            yield Loaded(image[:, :, None])

    def _read(self, split: str) -> NDArray[np.uint8]:
        """All images of a file, N H W, uint8.

        Raises:
            UserError: it is missing, or is not an idx file of such images.
        """
        name = next((n for n in (FILES[split], f"{FILES[split]}.gz") if self.files.find(n)), None)
        if name is None:
            raise self._refusal(f"{FILES[split]}.gz", "not found")
        most = IMAGES[split] * _SIDE**2
        try:
            with (
                self.files.open(name) as file,
                gzip.open(file) if name.endswith(".gz") else nullcontext(file) as stream,
            ):
                header = stream.read(16)
                content = stream.read(most + 1)
        except (OSError, EOFError, zlib.error) as error:
            raise self._refusal(name, f"cannot be read ({error})") from None
        count, *sides = (int.from_bytes(header[at : at + 4], "big") for at in (4, 8, 12))
        if header[:4] != _HEADER or sides != [_SIDE, _SIDE]:
            raise self._refusal(name, f"is no idx file of pictures of {_SIDE}x{_SIDE} bytes")
        if not 1 <= count <= IMAGES[split] or len(content) != count * _SIDE**2:
            raise self._refusal(
                name,
                f"holds {len(content):,} bytes where its header says {count:,} pictures, of which "
                f"1 to {IMAGES[split]:,} are expected",
            )
        self.notes[f"{split} sha256"] = hashlib.sha256(content).hexdigest()  # of the pixels
        return np.frombuffer(content, np.uint8).reshape(-1, _SIDE, _SIDE)

    def _refusal(self, name: str, what: str) -> UserError:
        return UserError(
            f"{one_line(f'{self.files.root}/{name}')}: {what}; get it anew, from Debian's package "
            f"dataset-fashion-mnist or with 'vdvae fetch fashion-mnist'"
        )


def block_means(image_HW: NDArray[np.uint8], block: int) -> NDArray[np.uint8]:
    """The mean of each block of `block` x `block` pixels, uint8, halves rounded up."""
    height, width = image_HW.shape
    blocks = image_HW.reshape(height // block, block, width // block, block).astype(np.uint32)
    sums = blocks.sum(axis=(1, 3))
    return ((2 * sums + block**2) // (2 * block**2)).astype(np.uint8)

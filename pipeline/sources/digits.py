"""The 1,797 grey 8x8 digits that scikit-learn ships: real data, nothing to download."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from pipeline.params import DataConfig
from pipeline.sources.source import Item, Loaded, require, whole_number
from vdvae.levels import levels_to_uint8

IMAGES = 1797
LEVELS = 17  # 0..16: the count of set pixels in a 4x4 block of the scanned bitmap


class Digits:
    """scikit-learn's `load_digits`: keys `digits-00012` by its index.

    Order and splits: RandomState(split_seed).permutation(1797); the first `test` images are test,
    the next `validation` are validation, the rest train.
    """

    name = "digits"
    terms = (
        "Optical Recognition of Handwritten Digits (Alpaydin and Kaynak, UCI), test part, as "
        "shipped by scikit-learn; CC BY 4.0"
    )

    def __init__(self, recipe: str, data: DataConfig) -> None:
        require(recipe, data, image_size=(8,), channels=(1,), resize=("",))
        self.test = whole_number(recipe, "test", data.test, IMAGES)
        self.validation = whole_number(recipe, "validation", data.validation, IMAGES - self.test)
        self.seed = data.split_seed
        self.notes: dict[str, Any] = {}

    def items(self) -> Iterator[Item]:
        from sklearn.datasets import load_digits  # a second of start-up time

        levels_NHW = load_digits().images.astype(np.int32)
        assert levels_NHW.shape == (IMAGES, 8, 8)
        stored_NHW = levels_to_uint8(levels_NHW, LEVELS)
        order = np.random.RandomState(self.seed).permutation(IMAGES)
        splits = ["test"] * self.test + ["validation"] * self.validation
        for index, split in itertools.zip_longest(order, splits, fillvalue="train"):
            yield Item(f"digits-{index:05d}", split, stored_NHW[index].tobytes())

    def load(self, places: Iterable[bytes], converted: Counter[str]) -> Iterator[Loaded]:
        for pixels in places:
            yield Loaded(np.frombuffer(pixels, np.uint8).reshape(8, 8, 1))

"""What a source of images is, and what several of them share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.params import DataConfig
from pipeline.sources.decode import OddImage
from pipeline.sources.raw import setting
from vdvae.config import UserError
from vdvae.levels import levels_to_uint8, uint8_to_levels


class Item(NamedTuple):
    """One image that can be loaded, with its name and its place."""

    key: str  # unique in the source; [a-z0-9_-]+
    split: str  # train, validation or test; "" where the pixels decide
    at: Any  # where its pixels are, or they themselves: small, other for other bytes


class Loaded(NamedTuple):
    """One image, decoded."""

    image_HWC: NDArray[np.uint8]
    png: bytes | None = None  # of these very pixels, where there is one that can be stored
    split: str = ""  # where the pixels decide


class Source(Protocol):
    """Images in a documented order: two passes over the same raw data give the same.

    To list them is cheap and is done once; to load them is not, and is done wherever there is a
    processor: a source and its items can be pickled.
    """

    name: str
    terms: str  # on which terms the images may be used
    notes: dict[str, Any]  # what was skipped or unusual; whole after the last item

    def items(self) -> Iterator[Item | OddImage]:
        """Every image once, or why it is none: odd files end nothing here.

        Raises:
            UserError: the raw data as a whole are not what they should be.
        """
        ...

    def load(self, places: Iterable[Any], converted: Counter[str]) -> Iterator[Loaded | OddImage]:
        """For each place that an item named its image, or why there is none.

        What was done to the images is counted.

        Raises:
            UserError: the raw data cannot be had.
        """
        ...


def images_or_why_not(
    image_at: Callable[[Any, Counter[str]], Loaded],
    places: Iterable[Any],
    converted: Counter[str],
) -> Iterator[Loaded | OddImage]:
    """`Source.load` from a function that loads one image: only of images conversions count."""
    for place in places:
        counts: Counter[str] = Counter()
        try:
            image = image_at(place, counts)
        except OddImage as odd:
            yield odd
        else:
            converted.update(counts)
            yield image


def require(recipe: str, data: DataConfig, **suitable: tuple[object, ...]) -> None:
    """Checks settings against the values that suit a source, `require(r, data, channels=(3,))`.

    Raises:
        UserError: naming the setting, its value and the values that suit.
    """
    for key, values in suitable.items():
        value = getattr(data, key)
        if value not in values:
            raise UserError(
                f"{setting(recipe, key)}: {value!r} does not suit the source {data.source}; "
                f"set it to {' or '.join(map(repr, values))}"
            )


def whole_number(recipe: str, key: str, value: float, below: int) -> int:
    """A number of images out of `below`.

    Raises:
        UserError: where it is not a whole number from 1 to below - 1.
    """
    if value != int(value) or not 1 <= value < below:
        raise UserError(
            f"{setting(recipe, key)}: {value:g} is not a number of images from 1 to {below - 1}; "
            f"set it to one"
        )
    return int(value)


def on_levels(image: NDArray[np.uint8], num_levels: int) -> NDArray[np.uint8]:
    """The image with every pixel on one of the levels, as it is stored; done twice is done once."""
    if num_levels == 256:
        return image
    return levels_to_uint8(uint8_to_levels(image, num_levels), num_levels)

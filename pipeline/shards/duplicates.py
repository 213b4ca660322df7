"""Exact duplicates: images whose stored pixels are the same, within a split and across two."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping

import numpy as np

from pipeline.shards.manifest import SPLITS, Duplicates

HASH_BYTES = 16  # of an image: all that is held of each in memory
EXAMPLES = 100


def find_duplicates(
    hashes: Mapping[str, bytes | bytearray], key: Callable[[str, int], str]
) -> Duplicates:
    """Counts images with equal hashes.

    Args:
        hashes: of each split, HASH_BYTES an image in the manifest's order.
        key: of an image by its split and row, asked for the examples alone.
    """
    ends = np.cumsum([len(hashes[split]) // HASH_BYTES for split in SPLITS])
    pairs = np.frombuffer(b"".join(hashes[split] for split in SPLITS), "<u8").reshape(-1, 2)
    order = np.lexsort((pairs[:, 1], pairs[:, 0]))  # stable: of equal ones the first comes first
    begins = np.ones(len(order), bool)
    begins[1:] = (pairs[order[1:]] != pairs[order[:-1]]).any(axis=1)
    group = np.cumsum(begins) - 1
    first = order[begins][group]
    split_of = np.searchsorted(ends, order, side="right")
    groups_of = {split: np.unique(group[split_of == number]) for number, split in enumerate(SPLITS)}
    within = {
        split: int((split_of == number).sum() - len(groups_of[split]))
        for number, split in enumerate(SPLITS)
    }
    across = {
        f"{one} and {other}": len(np.intersect1d(groups_of[one], groups_of[other]))
        for one, other in itertools.combinations(SPLITS, 2)
    }
    later = np.flatnonzero(~begins)
    straddles = split_of[later] != np.searchsorted(ends, first[later], side="right")
    shown = later[np.lexsort((order[later], ~straddles))][:EXAMPLES]  # the worse ones first

    def name(image: int) -> str:
        number = int(np.searchsorted(ends, image, side="right"))
        return key(SPLITS[number], image - (int(ends[number - 1]) if number else 0))

    return Duplicates(
        within=within,
        across=across,
        examples=tuple((name(int(first[place])), name(int(order[place]))) for place in shown),
    )

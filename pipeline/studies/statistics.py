"""What several trainings tell of two variants: paired over images and over seeds at once."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from vdvae.config import UserError

Verdict = Literal["supported", "not supported", "undecided"]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Worse minus better, in bits/dim: positive where the claim's order holds."""

    mean: float  # over seeds and images
    se_seeds: float | None  # of the mean, from the spread over seeds; None for one seed
    se_images: float  # of the mean, from the spread over images
    low: float  # of the two-sided interval at `level`
    high: float
    level: float
    seeds: int
    images: int

    @property
    def verdict(self) -> Verdict:
        """What the interval says of the claimed order; one seed decides nothing."""
        if self.seeds > 1 and self.low > 0:
            return "supported"
        if self.seeds > 1 and self.high < 0:
            return "not supported"
        return "undecided"


def difference(
    better: Sequence[Mapping[str, float]], worse: Sequence[Mapping[str, float]], level: float
) -> Difference:
    """Compares two variants over the same seeds and images.

    A seed and an image are both drawn from many: the variance of the mean difference is that of
    the seeds' means over their number plus that of the images' means over theirs, and the interval
    is Student's with the degrees of freedom of Welch and Satterthwaite. For one seed the seeds'
    part is unknown, and the interval is that of images alone.

    Args:
        better: for each seed the bits/dim of each image by its key.
        worse: the same of the other variant, seed by seed.
        level: of the two-sided interval.

    Raises:
        UserError: they have not the same images, or fewer than two.
    """
    from scipy.special import stdtrit

    keys = sorted(better[0])
    if any(sorted(scores) != keys for scores in (*better, *worse)) or len(keys) < 2:
        raise UserError("the cells' images differ, or are fewer than two: they cannot be compared")
    bits_SN = _table(worse, keys) - _table(better, keys)  # S seeds, N images
    seeds, images = bits_SN.shape
    of_images = float(bits_SN.mean(axis=0).var(ddof=1)) / images
    of_seeds = float(bits_SN.mean(axis=1).var(ddof=1)) / seeds if seeds > 1 else 0.0
    variance = of_images + of_seeds
    scale = of_images**2 / (images - 1) + of_seeds**2 / max(1, seeds - 1)
    mean = float(bits_SN.mean())
    reach = 0.0
    if variance:
        reach = math.sqrt(variance) * float(stdtrit(variance**2 / scale, (1 + level) / 2))
    return Difference(
        mean=mean,
        se_seeds=math.sqrt(of_seeds) if seeds > 1 else None,
        se_images=math.sqrt(of_images),
        low=mean - reach,
        high=mean + reach,
        level=level,
        seeds=seeds,
        images=images,
    )


def overall(verdicts: Sequence[Verdict]) -> Verdict:
    """That of a claim with several primary comparisons, all of which it needs."""
    if "not supported" in verdicts:
        return "not supported"
    return "supported" if verdicts and set(verdicts) == {"supported"} else "undecided"


def spread(values: Sequence[float]) -> dict[str, float | None]:
    """Mean over seeds and sample standard deviation, which is None for one seed."""
    return {
        "mean": statistics.mean(values),
        "stdev": statistics.stdev(values) if len(values) > 1 else None,
    }


def _table(scores: Sequence[Mapping[str, float]], keys: Sequence[str]) -> NDArray[np.float64]:
    return np.array([[of_seed[key] for key in keys] for of_seed in scores])

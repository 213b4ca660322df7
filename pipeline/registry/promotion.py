"""Whether a model may take another's place: a paired test on the same validation images.

Two models differ most from image to image, and alike: a hard image is hard for both. So what is
looked at is the difference of each image, whose error is far below that of either mean.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

# Bits/dim of two models are comparable where these agree.
CONDITIONS = {
    "manifest_digest": "other data",
    "num_levels": "another number of levels",
    "likelihood": "another likelihood",
}

RULE = """\
The alias `champion` marks the version to use. A newly registered version gets it only where its
bits/dim is lower on the same validation images: over the differences image by image, the two-sided
interval of Student's t at `register.confidence` (0.95) must lie wholly above zero. So of candidates
that are equal to the champion at most 2.5% pass by luck, each time: whoever tries 40 equal
candidates must expect one to pass. Count the versions, and judge by the test figures, which decide
nothing. Versions measured on other data, levels or likelihood are not compared.

Every move is a tag `move.<number>` of this page: from, to, difference, interval, who, when, why.
`vdvae models rollback NAME` takes the last one back."""


class NotComparable(ValueError):
    """Two versions whose figures say nothing about each other; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What one version scored, and what that holds for."""

    conditions: Mapping[str, str]  # CONDITIONS, by name
    bits_per_dim: Mapping[str, float]  # of each validation image, by its key

    @property
    def mean(self) -> float:
        """Bits/dim over all images."""
        return math.fsum(self.bits_per_dim.values()) / len(self.bits_per_dim)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Holder minus candidate, in bits/dim: positive where the candidate is better."""

    difference: float  # mean over images
    se: float  # its standard error
    interval: tuple[float, float]  # two-sided, at `confidence`
    confidence: float
    images: int

    @property
    def better(self) -> bool:
        """Whether the candidate is better than luck explains."""
        return self.interval[0] > 0

    def __str__(self) -> str:
        low, high = self.interval
        return (
            f"{self.difference:+.4f} bits/dim over {self.images} images, "
            f"{100 * self.confidence:g}% interval {low:+.4f} to {high:+.4f}"
        )


def compare(holder: Figures, candidate: Figures, confidence: float) -> Comparison:
    """Compares two versions image by image.

    Args:
        holder: of the version that has the alias.
        candidate: of the one that would take it.
        confidence: of the two-sided interval, between 0 and 1.

    Raises:
        NotComparable: other data, levels, likelihood or images, or fewer than two images.
    """
    from scipy.special import stdtrit

    for condition, words in CONDITIONS.items():
        ours, theirs = candidate.conditions.get(condition), holder.conditions.get(condition)
        if ours is None or ours != theirs:
            raise NotComparable(f"{words} ({condition}: {ours}, not {theirs})")
    if candidate.bits_per_dim.keys() != holder.bits_per_dim.keys():
        odd = sorted(candidate.bits_per_dim.keys() ^ holder.bits_per_dim.keys())
        raise NotComparable(f"other images ({len(odd)} are not in both, such as {odd[0]})")
    keys = sorted(holder.bits_per_dim)
    n = len(keys)
    if n < 2:
        raise NotComparable(f"too few images ({n}; two or more have a standard error)")
    difference = np.array([holder.bits_per_dim[k] - candidate.bits_per_dim[k] for k in keys])
    mean, se = float(difference.mean()), float(difference.std(ddof=1)) / math.sqrt(n)
    reach = se * float(stdtrit(n - 1, (1 + confidence) / 2))  # quantile of Student's t
    return Comparison(
        difference=mean,
        se=se,
        interval=(mean - reach, mean + reach),
        confidence=confidence,
        images=n,
    )

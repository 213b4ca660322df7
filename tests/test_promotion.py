"""Who may take the champion's place: at most one equal candidate in forty, every better one."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.registry.promotion import Figures, NotComparable, compare

CONDITIONS = {"manifest_digest": "a", "num_levels": "17", "likelihood": "normalised"}
KEYS = [f"image-{index}" for index in range(180)]


def figures(values: np.ndarray, **conditions: str) -> Figures:
    return Figures(
        conditions={**CONDITIONS, **conditions},
        bits_per_dim=dict(zip(KEYS, values.tolist(), strict=False)),
    )


def test_equal_candidates_pass_by_luck_alone_and_better_ones_all() -> None:
    """400 candidates whose images differ from the champion's by noise without a mean."""
    rng = np.random.default_rng(0)
    champion = rng.normal(1.8, 0.28, 180)
    noise = rng.laplace(0, 0.03, (400, 180))
    holder = figures(champion)
    equal = sum(compare(holder, figures(champion + e), 0.95).better for e in noise)
    better = sum(compare(holder, figures(champion + e - 0.02), 0.95).better for e in noise)
    worse = sum(compare(holder, figures(champion + e + 0.02), 0.95).better for e in noise)
    print(f"equal: {equal}/400, better: {better}/400, worse: {worse}/400")
    assert 1 <= equal < 20  # 2.5% are 10; 5% are 20
    assert (better, worse) == (400, 0)


def test_the_interval_is_students() -> None:
    holder, candidate = np.array([2.0, 3.0, 4.0]), np.array([1.9, 2.7, 3.5])
    found = compare(figures(holder), figures(candidate), 0.95)
    assert found.difference == pytest.approx(0.3)
    assert found.se == pytest.approx(0.2 / 3**0.5)
    # Two-sided 95% quantile of t with 2 degrees of freedom, from tables.
    assert found.interval[1] - found.difference == pytest.approx(4.302653 * found.se)
    assert not found.better
    assert compare(figures(holder), figures(candidate), 0.5).better


@pytest.mark.parametrize(
    ("candidate", "words"),
    [
        (figures(np.ones(180), manifest_digest="b"), r"other data \(manifest_digest: b, not a\)"),
        (figures(np.ones(180), num_levels="32"), r"another number of levels \(num_levels: 32"),
        (figures(np.ones(180), likelihood="published"), r"another likelihood \(likelihood: pub"),
        (figures(np.ones(179)), r"other images \(1 are not in both, such as image-179\)"),
    ],
)
def test_what_does_not_compare_is_refused(candidate: Figures, words: str) -> None:
    with pytest.raises(NotComparable, match=words):
        compare(figures(np.full(180, 2.0)), candidate, 0.95)
    with pytest.raises(NotComparable, match="too few images"):
        compare(figures(np.ones(1)), figures(np.zeros(1)), 0.95)

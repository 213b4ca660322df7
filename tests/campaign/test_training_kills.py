"""kill -9 of a training at random moments, on one rank and on two: the same bits in the end."""

from __future__ import annotations

from pathlib import Path

import kills
import pytest
from repetitions import repetitions

KILLS = repetitions(4)


@pytest.mark.timeout(300 + 60 * KILLS)
@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_at_random_moments_it_ends_with_the_same_bits(ranks: int, tmp_path: Path) -> None:
    assert kills.equal_after(KILLS, ranks, ranks, tmp_path)[0] == KILLS

"""torch.compile on every kind of block, each of which takes seconds to compile."""

from __future__ import annotations

from test_fast_paths import WIDER, compiled_blocks_are_the_same_step


def test_compiled_blocks_of_every_kind_are_the_same_step() -> None:
    compiled_blocks_are_the_same_step(WIDER)

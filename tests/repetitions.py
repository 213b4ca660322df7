"""How often a campaign repeats what it tries."""

from __future__ import annotations

import os


def repetitions(usual: int) -> int:
    """`usual` times what CAMPAIGN says: `CAMPAIGN=10 make campaign` tries ten times as much."""
    return usual * int(os.environ.get("CAMPAIGN", "1"))

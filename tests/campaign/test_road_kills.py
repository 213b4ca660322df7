"""kill -9 of everything at random moments of the whole road, many times."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
from repetitions import repetitions
from test_road import hold_a_killed_road

KILLS = repetitions(8)


@pytest.mark.integration
@pytest.mark.timeout(240 + 60 * KILLS)
def test_killed_at_random_moments_the_same_command_gives_the_same_result(tmp_path: Path) -> None:
    chance = random.Random(0)
    kills = 0

    def killer(child: subprocess.Popen[str]) -> None:
        """Kills after some lines and a moment; it may have ended by then."""
        nonlocal kills
        assert child.stdout is not None
        for _ in range(chance.randint(1, 30)):
            child.stdout.readline()
        time.sleep(chance.random())
        kills += child.poll() is None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.communicate()

    hold_a_killed_road(tmp_path, [killer] * KILLS)
    assert kills > 0

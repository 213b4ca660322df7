"""Signals to the whole road: kill -9 of everything at random moments; SIGTERM to its flow."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import Project
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


@pytest.mark.integration
def test_sigterm_to_the_flow_reaches_training_which_writes_a_checkpoint(project: Project) -> None:
    project.set(lambda params: params["recipes"]["digits"]["train"].update(steps=100_000))
    child = project.start(sys.executable, "-m", "pipeline.flows", "digits")
    assert child.stdout is not None
    lines = []
    for line in child.stdout:
        lines.append(line)
        step = re.search(r"step (\d+)/", line)  # the log is throttled: not every line is there
        if step and int(step[1]) >= 40:
            os.kill(child.pid, signal.SIGTERM)
            break
    rest = child.stdout.read()
    assert child.wait(timeout=60) == 143, "".join(lines) + rest
    assert "stopped after a checkpoint" in rest
    assert "Traceback" not in rest
    assert project.processes() == {}
    with pytest.raises(ProcessLookupError):
        os.killpg(child.pid, 0)
    assert list(project.folder.glob("runs/*/checkpoints/*.json"))

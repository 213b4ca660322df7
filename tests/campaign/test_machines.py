"""Ranks and machines that are lost: what is left starts again, and the bits are the same."""

from __future__ import annotations

import os
import random
import signal
import socket
import sys
import time

import pytest
import torch
from conftest import Project
from repetitions import repetitions
from test_ranks_road import TWO, forget_training, ranks_of, wait_for_step, weights

from pipeline.services.definitions import free_ports

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

KILLS = repetitions(2)


@pytest.mark.parametrize("number", range(KILLS))
def test_either_rank_may_be_killed_anywhere(project: Project, number: int) -> None:
    chance = random.Random(number)
    project.set(lambda params: params["recipes"]["digits"]["train"].update(steps=60))
    project.stage("shard", "digits")
    project.stage("train", "digits", **TWO)
    undisturbed = weights(project)
    forget_training(project)
    for victim in (1, 0):
        child = project.start(sys.executable, "-m", "pipeline.stages.train", "digits", **TWO)
        wait_for_step(child, chance.randint(1, 5) * 5)
        time.sleep(chance.random() / 10)
        os.kill(ranks_of(project)[victim], signal.SIGKILL)
        output, _ = child.communicate()
        assert child.returncode == 128 + signal.SIGKILL, output
        assert f"rank {victim} was killed by signal 9; run the same command again" in output
        assert ranks_of(project) == {}
    assert "resuming at step" in project.stage("train", "digits", **TWO)
    again = weights(project)
    assert all(torch.equal(value, again[name]) for name, value in undisturbed.items())


def test_torchrun_starts_the_same_stage(project: Project) -> None:
    project.set(lambda params: params["recipes"]["digits"]["train"].update(steps=100))
    project.stage("shard", "digits")
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    output = project.run(*torchrun, "-m", "pipeline.stages.train", "digits")
    assert output.count("step 100/100") == 1
    undisturbed = weights(project)

    forget_training(project)
    restarts = (*torchrun, "--max-restarts=1", "-m", "pipeline.stages.train", "digits")
    child = project.start(*restarts)
    wait_for_step(child, 15)
    os.kill(ranks_of(project)[1], signal.SIGKILL)
    output, _ = child.communicate(timeout=120)
    assert child.returncode == 0, output
    assert "resuming at step" in output
    again = weights(project)
    assert all(torch.equal(value, again[name]) for name, value in undisturbed.items())


def test_a_machine_that_is_lost_comes_back(project: Project) -> None:
    """Two of torchrun's agents stand for two machines; the second dies with all that it runs."""
    project.set(lambda params: params["recipes"]["digits"]["train"].update(steps=100))
    project.stage("shard", "digits")
    project.stage("train", "digits", **TWO)
    undisturbed = weights(project)
    forget_training(project)
    (port,) = free_ports(1)
    agent = (
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"),
        *("--max-restarts=1", "--rdzv-backend=c10d", "--rdzv-id=here"),
        *(f"--rdzv-endpoint=localhost:{port}", "-m", "pipeline.stages.train", "digits"),
    )
    own_store = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # docs/gpus.md says why
    first = project.start(*agent, **own_store)
    while socket.socket().connect_ex(("localhost", port)):
        assert first.poll() is None
        time.sleep(0.1)
    lost = project.start(*agent, **own_store)
    wait_for_step(first, 15)
    rank = ranks_of(project)[1]  # of a process group of its own
    os.killpg(lost.pid, signal.SIGKILL)
    os.kill(rank, signal.SIGKILL)
    lost.communicate()
    back = project.start(*agent, **own_store)
    for process in (first, back):
        output, _ = process.communicate(timeout=200)
        assert process.returncode == 0, output
    again = weights(project)
    assert all(torch.equal(value, again[name]) for name, value in undisturbed.items())

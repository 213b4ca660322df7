"""What kill -9 leaves of a run, and runs that wait for each other: nothing lost, none stuck."""

from __future__ import annotations

import time
from collections.abc import Iterator

import faults
import pytest
from services_project import Services

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    """Three runs may start at once, but there is one GPU, whose lock is all that there is of it.

    The recipe's own device is auto: it takes the lock, and PyTorch, which sees no GPU, the CPU.
    """
    made = Services(tmp_path_factory.mktemp("faults") / "project")
    made.environment |= {"CUDA_VISIBLE_DEVICES": "0", "VDVAE_RUNS_AT_ONCE": "3"}
    made.services("start")
    yield made
    made.services("stop")
    assert made.marked() == []


def test_a_run_outlives_each_of_its_processes_in_turn(services: Services) -> None:
    run = faults.begin(services, seed=21, preset="full", steps=1000)
    for number, kind in enumerate(("trainer", "dvc", "flow", "worker"), 1):
        faults.hurt(services, run, kind, after=0)
        faults.resumed(services, run, number)
    faults.heal(services, run)
    faults.check(services, run, seed=21, steps=1000)


@pytest.mark.timeout(600)
def test_runs_that_want_the_one_gpu_come_one_after_another(services: Services) -> None:
    runs = [faults.begin(services, seed, preset="full", steps=300) for seed in (31, 32, 33)]
    waiting = set(runs)
    while waiting:
        working = {
            run for command, run in faults.processes(services).values() if "dvc\0repro" in command
        }
        assert len(working) <= 1
        for run in list(waiting):
            state = services.api(f"/flow_runs/{run}")[1]["state"]["type"]
            assert state not in ("FAILED", "CRASHED"), services.logs(run)
            if state == "COMPLETED":
                waiting.remove(run)
        time.sleep(0.3)
    names = [
        {state["name"] for state in services.api(f"/flow_run_states/?flow_run_id={run}")[1]}
        for run in runs
    ]
    assert sum("AwaitingGPU" in each for each in names) >= 2, names
    for run, seed in zip(runs, (31, 32, 33), strict=True):
        faults.check(services, run, seed, steps=300)

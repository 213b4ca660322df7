"""kill -9 of what a flow run is made of, on a real server with a real worker.

The table of docs/gpus.md: python tests/faults.py 5
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from services_project import ENDED, Services

from pipeline.system.process import environment_of

# What is killed, by words of its command; the last two are not the run's own.
KINDS = {
    "trainer": "pipeline.stages.train",
    "dvc": "dvc\0repro",
    "flow": "prefect.engine",
    "worker": "prefect\0worker",
    "server": "prefect\0server\0start",
}
STEPS = 500


def processes(services: Services) -> dict[int, tuple[str, str]]:
    """Every process of these services with its command and the flow run that it is of."""
    found = {}
    for pid in services.marked():
        with contextlib.suppress(OSError):
            command = Path(f"/proc/{pid}/cmdline").read_text()
            found[pid] = (command, environment_of(pid).get("PREFECT__FLOW_RUN_ID", ""))
    return found


def begin(services: Services, seed: int, **form: Any) -> str:
    """Starts a run of digits from the form; its id."""
    form = {"preset": "smoke", "seed": seed, "steps": STEPS, **form}
    status, run = services.begin("digits", **form)
    assert status in (200, 201), run
    return str(run["id"])


def trained(services: Services, run: str) -> int:
    """The last step that the run's log shows."""
    steps = re.findall(r"^step (\d+)/", services.logs(run), re.MULTILINE)
    return int(steps[-1]) if steps else 0


def hurt(services: Services, run: str, kind: str, after: float) -> None:
    """Kills a process of one kind some seconds after the run was seen to train.

    Where the moment finds none (DVC between two stages), the next one is taken.
    """
    before = trained(services, run)
    while trained(services, run) < max(before + 1, 10):  # beyond its first checkpoint
        assert state_of(services, run) not in ENDED, services.logs(run)
        time.sleep(0.2)
    time.sleep(after)
    while True:
        for pid, (command, of) in processes(services).items():
            if KINDS[kind] in command and of in ("", run):
                os.kill(pid, signal.SIGKILL)
                return
        assert state_of(services, run) not in ENDED, f"no {kind} to kill\n{services.logs(run)}"
        time.sleep(0.05)


def heal(services: Services, run: str) -> int:
    """Waits for the run's end and presses Retry where it crashed; how often it had to."""
    retries = 0
    while (state := state_of(services, run)) != "COMPLETED":
        if state in ENDED:
            retries += 1
            press_retry(services, run)
        time.sleep(0.5)
    return retries


def resumed(services: Services, run: str, times: int) -> None:
    """Waits until training has gone on so often, and presses Retry where the run crashed."""
    while services.logs(run).count("resuming at step") < times:
        if state_of(services, run) in ENDED:
            press_retry(services, run)
        time.sleep(0.5)


def state_of(services: Services, run: str) -> str:
    """Empty where the server itself is starting again."""
    with contextlib.suppress(OSError):
        return str(services.api(f"/flow_runs/{run}")[1]["state"]["type"])
    return ""


def press_retry(services: Services, run: str) -> None:
    """What the button on the run's page does."""
    again = {"type": "SCHEDULED", "name": "AwaitingRetry"}
    status, answer = services.api(f"/flow_runs/{run}/set_state", {"state": again, "force": True})
    assert status in (200, 201), answer


def left_over(services: Services, run: str) -> list[str]:
    """Commands of the run that are still there, after the worker had a moment to end them."""
    for _ in range(300):
        left = [command for command, of in processes(services).values() if of == run]
        left += [str(path) for path in (services.folder / "runs/flows").glob("*")]
        if not left:
            break
        time.sleep(0.2)
    return left


def check(services: Services, run: str, seed: int, steps: int = STEPS) -> None:
    """What a run must have come to, whatever was killed: one experiment, one version, one MLflow
    run that has finished, curves without gap or double, nothing left over."""
    from mlflow import MlflowClient

    shown = services.run(sys.executable, "-m", "dvc", "exp", "list", "--name-only", "--all-commits")
    assert sum(f"seed{seed}-" in line for line in shown.splitlines()) == 1, shown
    client = MlflowClient(f"http://127.0.0.1:{services.mlflow_port}")
    experiment = client.get_experiment_by_name("vdvae")
    assert experiment is not None
    (found,) = client.search_runs(
        [experiment.experiment_id], f"params.`train.seed` = '{seed}'", max_results=10
    )
    assert found.info.status == "FINISHED"
    points = client.get_metric_history(found.info.run_id, "train/bits_per_dim")
    logged = [point.step for point in points]
    assert logged[-1] == steps
    assert {b - a for a, b in itertools.pairwise(logged)} == {logged[1] - logged[0]}
    versions = client.search_model_versions("name = 'vdvae-digits'")
    assert len([version for version in versions if version.run_id == found.info.run_id]) == 1
    assert left_over(services, run) == []


def table(moments: int) -> None:
    """Every kind at so many random moments, each on a run of its own; prints what came of it."""
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    services = Services(folder / "project")
    services.services("start")
    chance = random.Random(0)
    survived: Counter[str] = Counter()
    retried: Counter[str] = Counter()
    seed = 100
    try:
        for kind in KINDS:
            for _ in range(moments):
                seed += 1
                after = chance.uniform(0, 10)
                began = time.monotonic()
                run = begin(services, seed)
                said, retries = "", 0
                try:
                    hurt(services, run, kind, after)
                    retries = heal(services, run)
                    check(services, run, seed)
                    survived[kind] += 1
                    retried[kind] += retries
                except AssertionError as error:
                    said = f"  {str(error)[-1500:]}"
                seconds = time.monotonic() - began
                resumed = "resuming at step" in services.logs(run)
                print(
                    f"{kind:8} after {after:4.1f} s  {'lost' if said else 'survived'}  "
                    f"resumed {resumed}  retries {retries}  {seconds:.0f} s{said}",
                    flush=True,
                )
        for kind in KINDS:
            print(f"{kind:8} {survived[kind]} of {moments}, Retry pressed {retried[kind]} times")
    finally:
        services.services("stop")
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    table(int(sys.argv[1]))

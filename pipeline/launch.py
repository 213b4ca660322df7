"""Several ranks of a stage on this machine, which meet in a file: no port is opened for it.

torchrun does the same over any number of machines (docs/operations.md); then this module rests.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.exits import AWAY, BAD_INPUT, CANCELLED
from pipeline.process import end_with_parent, named_gpus
from vdvae.config import UserError, shown

if TYPE_CHECKING:
    from pipeline.params import Recipe

RANKS = "VDVAE_RANKS"
_MOST = 64
_GRACE_SECONDS = 10  # for the other ranks to end by themselves when one has failed


def ranks_here(recipe: Recipe) -> int:
    """How many ranks this machine trains or evaluates a recipe with: VDVAE_RANKS, or its GPUs.

    Raises:
        UserError: where VDVAE_RANKS is no such number.
    """
    if "WORLD_SIZE" in os.environ:  # torchrun has started this process as one of several
        return 1
    asked = os.environ.get(RANKS)
    if asked:
        if not (asked.isdecimal() and len(asked) < 7 and 1 <= int(asked) <= _MOST):
            raise UserError(f"{RANKS}: {shown(asked)} is not a number of processes, 1 to {_MOST}")
        return int(asked)
    if recipe.train.device == "cpu":
        return 1
    if named_gpus() == []:
        return 1
    import torch

    gpus = max(1, torch.cuda.device_count())
    used = ranks_on(recipe, gpus)
    if used < gpus:
        print(
            f"{used} of {gpus} GPUs are used: train.batch_size {recipe.train.batch_size} does not "
            f"part into more, with train.accumulation {recipe.train.accumulation}; lower that to "
            f"use them all",
            flush=True,
        )
    return used


def ranks_on(recipe: Recipe, gpus: int) -> int:
    """On how many of so many GPUs a recipe's batch is computed: the most that it parts into."""
    train = recipe.train
    parts = (n for n in range(gpus, 0, -1) if not train.batch_size % (n * train.accumulation))
    return next(parts, 1)


def rank_environment(rank: int, size: int, folder: Path) -> dict[str, str]:
    """What tells a process that it is one of several on this machine, which meet in a folder."""
    cores = max(1, len(os.sched_getaffinity(0)) // size)  # more threads than cores would spin
    return {
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(cores)),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "VDVAE_RENDEZVOUS": f"file://{folder}/meeting",
        "GLOO_SOCKET_IFNAME": "lo",
        "NCCL_SOCKET_IFNAME": "lo",
    }


def launch(module: str, name: str, size: int) -> int:
    """Runs `python -m module name` in so many ranks; returns the exit code of the first to fail.

    Where one fails or is killed, the others end within half a minute. SIGTERM is passed on.
    """
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="vdvae-ranks-"))
        # Kept open: after weeks, the system's cleaner of old files may have taken their names.
        logs = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(size)]
        processes: list[subprocess.Popen[bytes]] = []

        def end_all(number: int = signal.SIGTERM) -> None:
            for process in processes:
                process.send_signal(number)

        signal.signal(signal.SIGTERM, lambda number, frame: end_all())
        signal.signal(signal.SIGINT, lambda number, frame: end_all())
        for rank, log in enumerate(logs):
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", module, name],
                    env={**os.environ, **rank_environment(rank, size, Path(folder))},
                    stdout=None if rank == 0 else subprocess.DEVNULL,
                    stderr=log,
                    preexec_fn=end_with_parent,  # not only after seconds of imports
                )
            )
        try:
            first = _first_to_fail(processes)
        finally:
            end_all(signal.SIGKILL)
            for process in processes:
                process.wait()
        logs[first].seek(0)
        sys.stderr.write(logs[first].read().decode(errors="replace"))
        code = processes[first].returncode
        if code < 0:
            print(f"rank {first} was killed by signal {-code}; run the same command again to go on")
        return code if code >= 0 else 128 - code


def _first_to_fail(processes: list[subprocess.Popen[bytes]]) -> int:
    """Waits for all; the rank that the others failed after, or the first rank where none did.

    Who breaks off takes the others along within moments, so that they may be seen to fail at once:
    then it is the one that was killed, or that has a sentence for the user.
    """
    failed: dict[int, int] = {}  # exit codes, in the order of the failures
    deadline = float("inf")
    while any(process.poll() is None for process in processes):
        for rank, process in enumerate(processes):
            if rank not in failed and process.poll() not in (None, 0):
                failed[rank] = process.returncode
                if process.returncode != CANCELLED:  # after that, all write what they have
                    deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
        if time.monotonic() > deadline:
            cause = _cause(failed)
            for process in processes:
                process.terminate()
            while any(process.poll() is None for process in processes):
                if time.monotonic() > deadline + _GRACE_SECONDS:
                    break
                time.sleep(0.1)
            return cause
        time.sleep(0.1)
    for rank, process in enumerate(processes):
        if process.returncode:
            failed.setdefault(rank, process.returncode)
    return _cause(failed)


def _cause(failed: dict[int, int]) -> int:
    # Of several alike the one that was seen first.
    told = (BAD_INPUT, AWAY)
    return min(failed, key=lambda r: (failed[r] >= 0, failed[r] not in told), default=0)

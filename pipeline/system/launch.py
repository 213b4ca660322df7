"""Several ranks of a stage on this machine, which meet in a file: no port is opened for it.

torchrun does the same over any number of machines (docs/gpus.md); then this module rests.
"""

from __future__ import annotations

import contextlib
import glob
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Self

from pipeline.params import Places
from pipeline.system.exits import BAD_INPUT, CANCELLED, UNAVAILABLE
from pipeline.system.process import end_with_parent, named_gpus

if TYPE_CHECKING:
    from pipeline.params import Recipe

_WITH_MESSAGE = (BAD_INPUT, UNAVAILABLE)  # exit codes after a sentence for the user
_LAST_WORDS = ("Traceback (most recent call last)", "error: ")
_TORCHS_PREFIX = re.compile(r"\[rank\d+\]: ?")  # of a traceback's lines
_READ_BYTES = 1 << 16
_KEPT_LOGS = 8
_GRACE_SECONDS = 10  # for the other ranks to end by themselves when one has failed


def ranks_here(recipe: Recipe) -> int:
    """How many ranks this machine trains or evaluates a recipe with: VDVAE_RANKS, or its GPUs.

    Raises:
        UserError: where VDVAE_RANKS is no such number.
    """
    if "WORLD_SIZE" in os.environ:  # torchrun has started this process as one of several
        return 1
    from pipeline.settings import Settings

    if asked := Settings().ranks:
        return asked
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
        log_folder = _log_folder(f"{module.rpartition('.')[2]}-{name}")
        logs = [stack.enter_context(_Log(log_folder, rank)) for rank in range(size)]
        processes: list[subprocess.Popen[bytes]] = []
        stopped = False

        def end_all(number: int = signal.SIGTERM) -> None:
            for process in processes:
                process.send_signal(number)

        def stop(number: int, frame: FrameType | None) -> None:
            nonlocal stopped
            stopped = True
            end_all()

        signal.signal(signal.SIGTERM, stop)
        signal.signal(signal.SIGINT, stop)
        for rank, log in enumerate(logs):
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", module, name],
                    env={**os.environ, **rank_environment(rank, size, Path(folder))},
                    stdout=None if rank == 0 else subprocess.DEVNULL,
                    stderr=log.file,
                    preexec_fn=partial(end_with_parent, os.getpid()),
                )
            )
        if stopped:  # before the last of them was there
            end_all()
        try:
            first = _first_to_fail(processes, logs)
        finally:
            end_all(signal.SIGKILL)
            for process in processes:
                process.wait()
        for log in logs:
            log.pass_on()
        logs[first].end()
        code = processes[first].returncode
        if code < 0:
            print(f"rank {first} was killed by signal {-code}; run the same command again to go on")
        if code == 0:
            shutil.rmtree(log_folder, ignore_errors=True)
        elif code not in (*_WITH_MESSAGE, CANCELLED):
            print(f"what each rank said on stderr: {log_folder}", flush=True)
        return code if code >= 0 else 128 - code


class _Log:
    """What one rank says on stderr: in a file that outlives us all, passed on line by line.

    Of ranks that fail, all but one break off since another did. So a rank's last words, from a
    traceback or an error's sentence on, wait until it is known whose are to be printed.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        path = folder / f"rank-{rank}.log"
        self.file, self._reader, self._rank = path.open("ab"), path.open("rb"), rank
        self._last_words: deque[str] | None = None
        self._begun = b""  # of a line whose end is to come

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
        self._reader.close()

    def pass_on(self) -> None:
        """Passes on the whole lines that came since the last call."""
        while part := self._reader.read(_READ_BYTES):
            *lines, self._begun = (self._begun + part).split(b"\n")
            for line in lines:
                self._take(line)
            if len(self._begun) > _READ_BYTES:
                self._take(self._begun)
                self._begun = b""

    def end(self) -> None:
        """Prints its last words."""
        if self._begun:
            self._take(self._begun)
            self._begun = b""
        for text in self._last_words or ():
            self._print(text)

    def _take(self, line: bytes) -> None:
        text = line.decode(errors="replace").rstrip()
        if found := _TORCHS_PREFIX.match(text):
            text = text[found.end() :]
        if self._last_words is None and text.startswith(_LAST_WORDS):
            self._last_words = deque(maxlen=1000)
        if self._last_words is None:
            self._print(text)
        else:
            self._last_words.append(text)

    def _print(self, text: str) -> None:
        with contextlib.suppress(OSError):  # nobody listens: no reason to end the ranks
            print(f"rank {self._rank}: {text}", file=sys.stderr, flush=True)


def _log_folder(what: str) -> Path:
    """A new folder $VDVAE_RUNS/ranks/WHAT-TIME-PROCESS; of those of `what` the newest are kept."""
    place = Places.from_env().runs / "ranks"
    for old in sorted(place.glob(f"{glob.escape(what)}-2*"))[: -_KEPT_LOGS + 1]:
        shutil.rmtree(old, ignore_errors=True)
    folder = place / f"{what}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _first_to_fail(processes: list[subprocess.Popen[bytes]], logs: list[_Log]) -> int:
    """Waits for all, passing on what they say; the rank that the others failed after, or the first.

    Who breaks off takes the others along within moments, so that they may be seen to fail at once:
    then it is the one that was killed, or that has a sentence for the user.
    """
    failed: dict[int, int] = {}  # exit codes, in the order of the failures
    deadline = float("inf")
    while any(process.poll() is None for process in processes):
        for log in logs:
            log.pass_on()
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
    with_message = (*_WITH_MESSAGE, CANCELLED)
    return min(failed, key=lambda r: (failed[r] >= 0, failed[r] not in with_message), default=0)

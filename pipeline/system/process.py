"""Processes that end when they should: with their parent, on a signal, one at a time."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import takewhile
from pathlib import Path
from types import FrameType
from typing import IO

from pipeline.system.exits import CANCELLED
from vdvae.config import UserError
from vdvae.files import open_lock

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_VISIBLE = "CUDA_VISIBLE_DEVICES"
_MARK = "VDVAE_FLOW"  # in the environment of every process that a flow starts
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of <malloc.h>


def grace_seconds() -> float:
    """How long a process may take to end after SIGTERM, say to write a checkpoint, before SIGKILL.

    Raises:
        UserError: VDVAE_GRACE_SECONDS is no number from 0 to 86400.
    """
    from pipeline.settings import Settings  # which wants pydantic; `make gpu` does without

    return Settings().grace_seconds


def end_with_parent(parent: int | None = None) -> None:
    """Asks the system for SIGTERM when the parent dies, so that a killed DVC leaves no trainer.

    A parent that died before we asked is not told, so it is looked for: where it has gone, this
    process ends by SIGTERM as if it had been.

    Args:
        parent: its number, where whoever started us can say it, as in
            `preexec_fn=partial(end_with_parent, os.getpid())`.
    """
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    here = os.getppid()
    gone = parent not in (None, here)
    if "DVC_STAGE" in os.environ and "RANK" not in os.environ:
        # DVC starts a stage in its own process group; whom orphans are given to is in another.
        with contextlib.suppress(OSError):  # a parent whom we may not look at
            gone |= os.getpgid(here) != os.getpgrp()
    if gone:
        os.kill(os.getpid(), signal.SIGTERM)


def adopt_orphans() -> None:
    """Makes orphans below this process its children, so that it can wait for the last of them."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def _prctl(option: int, value: int) -> None:
    with contextlib.suppress(OSError, AttributeError):  # only Linux has it
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def keep_freed_memory() -> None:
    """Keeps memory that is freed for what is allocated next.

    glibc would give the large pieces of each step back to the system, which clears every page when
    it hands it out again: 75,000 of them in a step of cifar10, and up to a tenth of its time.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(_M_MMAP_THRESHOLD, 2**30)


class StopRequest:
    """Turns SIGTERM and SIGINT into a question that a loop asks after each step.

    Before it has `begun` there is nothing to be kept, and they end the process at once.
    """

    def __init__(self, begun: bool = True) -> None:
        self.asked, self.begun = False, begun
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        if not self.begun:
            sys.exit(CANCELLED)


@contextlib.contextmanager
def exclusive_lock(
    lock: Path, wait_seconds: float | None = None, doing: str = "training this"
) -> Iterator[None]:
    """Holds a file lock while the block runs.

    Args:
        lock: the file; it holds the process number of its holder.
        wait_seconds: how long to wait for another holder, with a message; by default a bit longer
            than that has after SIGTERM to write its last checkpoint.
        doing: what the lock is held for, for messages.

    Raises:
        UserError: another process still holds it after that, or its folder cannot be made.
    """
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{lock.parent}: cannot be made ({error.strerror}); set VDVAE_RUNS to another folder"
        ) from None
    if wait_seconds is None:
        wait_seconds = grace_seconds() + 20
    with open_lock(lock) as file:
        deadline = time.monotonic() + wait_seconds
        announced = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                file.seek(0)
                holder = f"process {file.read().strip() or 'unknown'} is {doing}"
                if not announced:
                    print(f"{holder}; waiting for it ({lock})", flush=True)
                    announced = True
                if time.monotonic() > deadline:
                    raise UserError(
                        f"{lock}: {holder}; wait for it, or stop it with 'kill' and run the same "
                        f"command again"
                    ) from None
                time.sleep(0.2)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


@contextlib.contextmanager
def marked(runs: Path) -> Iterator[Path]:
    """Marks every process that is started in the block, so that `reap` finds it if we are killed.

    Args:
        runs: the folder of VDVAE_RUNS.

    Yields:
        A folder of one's own for what should not outlive the block; it need not be made.
    """
    folder = runs / "flows" / uuid.uuid4().hex
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = folder.with_suffix(".lock")
    file = None
    while file is None:
        file = try_lock(lock)
    before = os.environ.get(_MARK)
    os.environ[_MARK] = folder.name
    try:
        yield folder
    finally:
        if before is None:
            os.environ.pop(_MARK)
        else:
            os.environ[_MARK] = before
        shutil.rmtree(folder, ignore_errors=True)
        lock.unlink(missing_ok=True)
        file.close()


def reap(runs: Path) -> int:
    """Ends what killed flows left running and removes their folders; returns how many processes.

    A flow is dead where nobody holds its lock, which the system frees with its process.
    """
    ended = 0
    for lock in sorted((runs / "flows").glob("*.lock")):
        file = try_lock(lock)
        if file is None:
            continue
        with file:
            ended += end_all(partial(_carries, lock.stem), grace_seconds())
            shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
            lock.unlink(missing_ok=True)
    return ended


def _carries(mark: str, environment: dict[str, str]) -> bool:
    return environment.get(_MARK) == mark


def try_lock(path: Path, kind: int = fcntl.LOCK_EX) -> IO[str] | None:
    """The file, locked until it is closed or this process ends; None where another holds it."""
    file = open_lock(path)
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
        # Its last holder may have removed it between our two calls.
        if path.exists() and path.stat().st_ino == os.fstat(file.fileno()).st_ino:
            return file
    except BlockingIOError:
        pass
    file.close()
    return None


def take_gpus(runs: Path, wanted: int) -> tuple[str, contextlib.ExitStack] | None:
    """GPUs that no other run has, as CUDA_VISIBLE_DEVICES names them, with their locks.

    None: too few are free. A lock is $VDVAE_RUNS/gpu-<name>.lock; the system frees it with the
    process, whatever ends it.

    Raises:
        UserError: this machine has not so many.
    """
    runs.mkdir(parents=True, exist_ok=True)
    names = visible_gpus()
    if len(names) < wanted:
        remedy = "choose 0, which trains on the CPU (preset smoke is made for that)"
        if names:
            remedy = f"choose at most {len(names)}"
        raise UserError(
            f"gpus: {wanted} asked for, but "
            f"{'nvidia-smi -L' if named_gpus() is None else _VISIBLE} lists {len(names) or 'none'} "
            f"on this machine; {remedy}"
        )
    taken: list[str] = []
    with contextlib.ExitStack() as locks:
        for name in names:
            if len(taken) < wanted and (file := try_lock(runs / f"gpu-{name}.lock")) is not None:
                locks.enter_context(file)
                taken.append(name)
        if len(taken) < wanted:
            return None
        return ",".join(taken), locks.pop_all()


def named_gpus(environment: Mapping[str, str] = os.environ) -> list[str] | None:
    """The GPUs that CUDA_VISIBLE_DEVICES names; empty text names none. None: it is not set.

    As CUDA reads it: what stands behind a word that is no GPU's name, such as -1, does not count.
    """
    if _VISIBLE not in environment:
        return None
    words = (word.strip() for word in environment[_VISIBLE].split(","))
    return list(takewhile(re.compile(r"\d+|(GPU|MIG)-.+").fullmatch, words))


def visible_gpus(environment: Mapping[str, str] = os.environ) -> list[str]:
    """The GPUs that a run may use: those that are named, else all that `nvidia-smi -L` lists."""
    named = named_gpus(environment)
    if named is not None:
        return named
    try:
        listed = subprocess.run(
            ["nvidia-smi", "-L"], capture_output=True, text=True, check=True, timeout=60
        )
    except (OSError, subprocess.SubprocessError):
        return []
    # A GPU's parts (MIG) are listed below it.
    return [str(i) for i in range(len(re.findall(r"(?m)^GPU \d", listed.stdout)))]


# Processes by what their environment carries. Numbers come round: no signal goes to one without it.


def environment_of(pid: int) -> dict[str, str]:
    """What a process was started with; empty where it has ended or is another user's."""
    import psutil  # which `make gpu` does without

    try:
        return psutil.Process(pid).environ()
    except psutil.Error:
        return {}


def send(number: int, pid: int, ours: Callable[[dict[str, str]], bool]) -> None:
    """Sends a signal to a process that is still there and is ours by its environment."""
    import psutil

    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        if ours(process.environ()):
            process.send_signal(number)


def end_all(ours: Callable[[dict[str, str]], bool], grace_seconds: float) -> int:
    """Ends every process that is ours by its environment, but this one; returns how many.

    TERM, which makes training write a checkpoint, once; time to do so; KILL.
    """
    signalled: set[int] = set()
    deadline = time.monotonic() + grace_seconds
    calm = 0
    while calm < 2:  # a process that is just becoming another program shows no environment
        left = _all(ours)
        calm = 0 if left else calm + 1
        late = time.monotonic() > deadline
        for pid in left if late else left - signalled:
            send(signal.SIGKILL if late else signal.SIGTERM, pid, ours)
        signalled |= left
        time.sleep(0.1)
    return len(signalled)


def _all(ours: Callable[[dict[str, str]], bool]) -> set[int]:
    import psutil

    return {pid for pid in psutil.pids() if pid != os.getpid() and ours(environment_of(pid))}

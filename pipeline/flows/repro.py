"""Runs one DVC stage as a child that leaves nothing behind, whatever ends it.

The child has its own process group, which DVC, its shell and the stage share. A signal to us goes
to the group; training answers it with a checkpoint; what is still there after that is killed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from pipeline.system.events import listening
from pipeline.system.process import adopt_orphans, end_with_parent, grace_seconds

_ALWAYS = ("register",)  # idempotent, and its work is not DVC's to keep
_TAIL = 20  # lines of output in the message of a failure


class StageFailed(RuntimeError):
    """A stage ended with a code other than 0; the message holds the end of its output."""

    def __init__(self, stage: str, code: int, tail: list[str], stopped: bool = False) -> None:
        self.stage, self.code, self.tail = stage, code, tail
        self.stopped = stopped  # by a signal to us
        super().__init__(f"{stage} ended with exit code {code}:\n" + "\n".join(tail))


def run_stage(
    stage: str,
    recipe: str,
    on_line: Callable[[str], None],
    on_event: Callable[[dict[str, Any]], None],
) -> None:
    """Brings one stage of a recipe up to date, by `dvc repro -s`.

    Args:
        stage: one of STAGES.
        recipe: an active recipe.
        on_line: gets each line that the stage prints for people.
        on_event: gets each event that it tells but the last, in another thread.

    Raises:
        StageFailed: the stage ended with another code than 0; 143 after a signal to us.
        UserError: VDVAE_GRACE_SECONDS is no number of seconds.
    """
    target = f"{stage}@{recipe}"
    command = [sys.executable, "-m", "dvc", "repro", "-s", target]
    command += ["-f"] if stage in _ALWAYS else []
    # The stages' `python` is ours, also where no environment was activated.
    here = str(Path(sys.executable).parent)
    environment = {
        **os.environ,
        "PATH": f"{here}{os.pathsep}{os.environ.get('PATH', '')}",
        "SHELL": "/bin/sh",  # which DVC uses; a person's own may be anything
        "PYTHONUNBUFFERED": "1",
    }
    end_code: int | None = None  # the stage's own; that of DVC is always 255

    def take(event: dict[str, Any]) -> None:
        nonlocal end_code
        if event["event"] == "end":
            end_code = event["code"]
        else:
            on_event(event)

    with listening(take) as pipe:
        code, tail, stopped = _follow(command, environment | pipe, on_line)
    if stopped:
        code = 128 + signal.SIGTERM
    elif code < 0:  # DVC was killed: that the stage then ended by itself is no cancel
        code = 128 - code
    elif code and end_code is not None:  # else the stage was killed, or DVC did not start it
        code = end_code
    if code:
        raise StageFailed(target, code, tail, stopped=stopped)


def _follow(
    command: list[str], environment: dict[str, str], on_line: Callable[[str], None]
) -> tuple[int, list[str], bool]:
    """Runs DVC: its exit code, the end of what was printed, and whether a signal to us ended it."""
    grace = grace_seconds()
    adopt_orphans()
    child = subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
        preexec_fn=partial(end_with_parent, os.getpid()),
    )
    assert child.stdout is not None
    tail: deque[str] = deque(maxlen=_TAIL)
    stopped = False
    patience = threading.Timer(grace, _signal, (child.pid, signal.SIGKILL))
    patience.daemon = True

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stopped
        if not stopped:
            patience.start()
        stopped = True
        _signal(child.pid, signal.SIGTERM)

    with _handlers(stop):
        try:
            for line in child.stdout:
                tail.append(line.rstrip())
                on_line(line.rstrip())
            code = child.wait()
        finally:
            _end(child, grace)
            patience.cancel()
    return code, list(tail), stopped


@contextlib.contextmanager
def _handlers(stop: Callable[[int, FrameType | None], None]):  # type: ignore[no-untyped-def]
    # Signal handlers belong to the main thread; elsewhere the flow's own end reaches `finally`.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, stop) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _signal(group: int, number: int) -> bool:
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True


def _end(child: subprocess.Popen[str], grace: float) -> None:
    """Ends the child's whole group: TERM, a time of grace, KILL; returns when it is gone."""
    if not _signal(child.pid, signal.SIGTERM):
        return
    deadline = time.monotonic() + grace
    while _still_there(child):
        if time.monotonic() > deadline:
            _signal(child.pid, signal.SIGKILL)
        time.sleep(0.1)


def _still_there(child: subprocess.Popen[str]) -> bool:
    if child.poll() is None:
        return True
    with contextlib.suppress(ChildProcessError):
        # Orphans of the group are ours since adopt_orphans: take leave of the ended ones.
        while os.waitpid(-child.pid, os.WNOHANG)[0]:
            pass
    return _signal(child.pid, 0)

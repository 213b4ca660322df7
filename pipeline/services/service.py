"""One service as a process: how it is started, asked and ended."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from pipeline.services.folder import LOGS
from pipeline.system.process import end_with_parent

_MOST_LOG_BYTES = 10_000_000
_END_SECONDS = 15

# No proxy of the environment stands between this machine and itself.
direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def answers(url: str) -> bool:
    """Whether a server is there, be it that it wants credentials."""
    try:
        with direct.open(url, timeout=5):
            return True
    except urllib.error.HTTPError as error:
        return error.code < 500
    except (OSError, ValueError):
        return False


@dataclass
class Service:
    """What is started, where it answers, and how it has fared."""

    name: str
    command: list[str]
    environment: dict[str, str]
    address: str  # for people
    probe: str = ""  # a URL that answers when the service is up
    before: Callable[[], None] = field(default=lambda: None)  # each start
    process: subprocess.Popen[bytes] | None = None
    restarts: int = 0
    since: float = 0  # of the monotonic clock
    given_up: bool = False

    @property
    def log(self) -> Path:
        """What it prints."""
        return LOGS / f"{self.name}.log"

    def spawn(self) -> None:
        """Starts it in a session of its own, as a child that ends with us."""
        self.before()
        self.since = time.monotonic()
        if self.log.exists() and self.log.stat().st_size > _MOST_LOG_BYTES:
            self.log.replace(self.log.with_suffix(".log.1"))
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=partial(end_with_parent, os.getpid()),
            )

    def end(self) -> None:
        """Ends it with all of its group, whether it runs or has died."""
        if self.process is None:
            return
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(_END_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # it leads its own group
        self.process.wait()

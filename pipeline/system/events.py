"""What a stage tells the program that runs it: one JSON object a line, on a pipe of their own.

Lines on the terminal are for people. Whoever listens makes a named pipe and puts its path into
VDVAE_EVENTS, because DVC, which starts the stage, passes on no other open file.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import json
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

PIPE = "VDVAE_EVENTS"


def tell(event: str, **facts: Any) -> bool:
    """Sends an event; False where nobody listens.

    A listener that does not keep up, or has gone, misses events: it holds nothing up.
    """
    pipe = _pipe(os.environ.get(PIPE))
    if pipe is None:
        return False
    with contextlib.suppress(OSError):
        os.write(pipe, json.dumps({"event": event, **facts}).encode() + b"\n")
    return True


@functools.cache
def _pipe(path: str | None) -> int | None:
    if path:
        with contextlib.suppress(OSError):  # ENXIO: it has gone
            return os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    return None


@contextlib.contextmanager
def listening(on_event: Callable[[dict[str, Any]], object]) -> Iterator[dict[str, str]]:
    """Calls back with each event while the block runs, from another thread.

    Yields what to add to the environment of the stage. All that was told before the block ends has
    been passed on when this returns.
    """
    with tempfile.TemporaryDirectory(prefix="vdvae-events-") as folder:
        path = Path(folder) / "pipe"
        os.mkfifo(path, 0o600)
        reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        writer = os.open(path, os.O_WRONLY | os.O_CLOEXEC)  # ours: between stages it does not end
        os.set_blocking(reader, True)

        def listen() -> None:
            with os.fdopen(reader, errors="replace") as lines:
                for line in lines:
                    with contextlib.suppress(ValueError):  # of a writer that was killed
                        on_event(json.loads(line))

        here = contextvars.copy_context()  # who is called back belongs to this flow run
        thread = threading.Thread(target=here.run, args=(listen,), name="events", daemon=True)
        thread.start()
        try:
            yield {PIPE: str(path)}
        finally:
            os.close(writer)  # the last one: the stage has ended
            thread.join(5)

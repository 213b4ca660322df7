"""What a flow run asks of Prefect's engine, and tells it."""

from __future__ import annotations

import contextlib
import os
import signal
import time
import uuid
from typing import NoReturn

from prefect import get_client, runtime
from prefect.exceptions import Abort
from prefect.states import Cancelled, State

PARENT = os.getppid()  # of a deployment's run, its worker


def leave(state: State[None]) -> NoReturn:
    """Gives this flow run a state and ends its process, which Prefect then calls no error."""
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(uuid.UUID(str(runtime.flow_run.id)), state, force=True)
    leaving = Abort(state.name)
    leaving.state = state  # else the log says that it ended "in state Running"
    raise leaving


def cancelling() -> bool:
    """Whether somebody has cancelled this flow run."""
    with contextlib.suppress(Exception), get_client(sync_client=True) as client:
        state = client.read_flow_run(uuid.UUID(str(runtime.flow_run.id))).state
        return state is not None and state.is_cancelling()
    return False


def stopped(message: str) -> State[None]:
    """The state of a flow run whose work a signal has ended, which was ours while it worked.

    So Prefect has not taken note of a cancel: told to end now, it would call the run Crashed first,
    at which its page stays, and Cancelled later.
    """
    if in_engine() and not cancelling():
        os.kill(os.getpid(), signal.SIGTERM)  # the worker is going down: Prefect's to answer
        time.sleep(10)
    return Cancelled(message=message)


def in_engine() -> bool:
    """Whether a worker started this process for one flow run."""
    return bool(os.environ.get("PREFECT__FLOW_RUN_ID"))

"""services/: the lock, the record of how they are, the logs; and the mark of their processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.system import process
from vdvae.files import atomic_write_json, read_json

FOLDER = Path("services")
LOCK = FOLDER / "lock"  # held by the supervisor for as long as it lives
LOGS = FOLDER / "logs"
MARK = "VDVAE_SERVICES"  # in the environment of every process: the folder
_CANCEL_SECONDS = 40  # a flow run has 30 s to end after it was cancelled, whatever it runs
_FLOW_RUN = "PREFECT__FLOW_RUN_ID"  # Prefect's own mark in the processes of a flow run
_RECORD = FOLDER / "state.json"


def grace_seconds() -> float:
    """How long a flow run may take to end, and to leave nothing that still writes a checkpoint."""
    return _CANCEL_SECONDS + process.grace_seconds()


def ours(environment: dict[str, str]) -> bool:
    """Whether a process with this environment belongs to the services of this folder."""
    return environment.get(MARK) == str(FOLDER.resolve())


def of_a_flow_run(environment: dict[str, str]) -> bool:
    """Whether it belongs to one of their flow runs."""
    return ours(environment) and bool(environment.get(_FLOW_RUN))


def read_record() -> dict[str, Any] | None:
    """{"supervisor": pid, "ready", "error", "services": […]}; None where there is none yet."""
    try:
        found: dict[str, Any] = read_json(
            _RECORD, "stop the services with 'make stop', then remove it"
        )
    except FileNotFoundError:
        return None
    return found


def write_record(record: dict[str, Any]) -> None:
    """Replaces it in one step."""
    atomic_write_json(_RECORD, record)


def remove_record() -> None:
    """Nothing is known any more."""
    _RECORD.unlink(missing_ok=True)

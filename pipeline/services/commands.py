"""start, stop and status: what a person asks of the services."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any

from pipeline.services import definitions, folder
from pipeline.services.folder import FOLDER, LOCK, LOGS, MARK, grace_seconds, ours
from pipeline.services.service import answers
from pipeline.services.settings import Settings
from pipeline.system.process import end_all, environment_of, send, try_lock
from vdvae.config import UserError

_READY_SECONDS = 180
_STOP_SECONDS = 60  # beside the time that its flow runs have


def start(settings: Settings) -> None:
    """Starts the supervisor, waits until everything answers, and prints the addresses.

    Raises:
        UserError: a port is busy, or a service does not come up.
    """
    if not Path("prefect.yaml").exists():
        raise UserError("prefect.yaml: not found; run this at the project's root")
    for name in ("", "logs", "prefect"):
        (FOLDER / name).mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = try_lock(LOCK)
    if lock is None:
        print("the services are running already")
    else:
        with lock:
            end_all(ours, grace_seconds())  # left by a supervisor that was killed
            for name, setting, host, port in settings.listeners(definitions.own_mlflow()):
                _check_free(name, setting, host, port)
            folder.remove_record()
            _supervise_in_background(lock)
        # The lock stays with the supervisor: it has inherited the open file.
    record = _wait_until_ready()
    for service in record["services"]:
        print(f"{service['name']:8} {service['address']}")
    print(f"logs in {LOGS}; 'make stop' ends everything")


def stop() -> None:
    """Cancels the active runs, which writes checkpoints, and ends all services."""
    FOLDER.mkdir(mode=0o700, exist_ok=True)
    lock = try_lock(LOCK)
    if running := lock is None:
        signalled = 0
        deadline = time.monotonic() + _STOP_SECONDS + 2 * grace_seconds()
        while (lock := try_lock(LOCK)) is None:
            # One that has just begun has not said its number yet.
            supervisor = int((folder.read_record() or {}).get("supervisor", 0))
            if supervisor and time.monotonic() > deadline:
                send(signal.SIGKILL, supervisor, ours)
            elif supervisor != signalled:
                send(signal.SIGTERM, supervisor, ours)
                signalled = supervisor
            time.sleep(0.1)
    with lock:
        left = end_all(ours, grace_seconds())
        folder.remove_record()
    if running:
        print("the services have stopped")
    else:
        print("the services were not running" + (f"; ended {left} left over" if left else ""))


def status() -> bool:
    """Prints how each service is; whether all are well."""
    if not _supervised():
        print("the services are not running; 'make services' starts them")
        return False
    record = folder.read_record()
    if not record or not record["ready"]:
        print(f"the services are starting; see {LOGS}")
        return False
    all_well = True
    for service in record["services"]:
        alive = ours(environment_of(service["pid"]))
        well = alive and (not service["probe"] or answers(service["probe"]))
        how = "answers" if well and service["probe"] else "runs" if well else "DOWN"
        again = f", started again {service['restarts']} times" if service["restarts"] else ""
        print(f"{service['name']:8} {how}{again}  {service['address']}  {service['log']}")
        all_well &= well
    return all_well


def _supervised() -> bool:
    """Whether a supervisor lives: it holds the lock."""
    lock = try_lock(LOCK) if FOLDER.exists() else None
    if lock is not None:
        lock.close()
    return FOLDER.exists() and lock is None


def _check_free(name: str, setting: str, host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen()
        except OSError as error:
            raise UserError(
                f"{name} cannot listen on {host} port {port} ({error.strerror}); "
                f"set {setting} to another port, or end the program that has this one"
            ) from None


def _supervise_in_background(lock: IO[str]) -> None:
    with (LOGS / "supervisor.log").open("ab") as log:
        subprocess.Popen(
            [sys.executable, "-m", "pipeline.services", "supervise"],
            env={**os.environ, MARK: str(FOLDER.resolve()), "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            pass_fds=[lock.fileno()],
            preexec_fn=_heed_signals,
        )


def _heed_signals() -> None:
    # A shell's `&` and some supervisors hand down ignored signals; Prefect's worker would then
    # never end.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])


def _wait_until_ready() -> dict[str, Any]:
    deadline = time.monotonic() + _READY_SECONDS
    while time.monotonic() < deadline:
        record = folder.read_record()
        if record and record["error"]:
            raise UserError(record["error"])
        if record and record["ready"]:
            return record
        if not _supervised() and not (folder.read_record() or {}).get("error"):
            raise UserError(
                f"the services ended while they were starting; see {LOGS}/supervisor.log"
            )
        time.sleep(0.1)
    raise UserError(f"the services are not up after {_READY_SECONDS} s; see {LOGS}")

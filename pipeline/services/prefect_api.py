"""The few calls of Prefect's API that the supervisor makes, without importing Prefect."""

from __future__ import annotations

import base64
import json
import socket
import time
import urllib.error
import urllib.request
from datetime import datetime
from typing import Any

from pipeline.services.service import direct
from pipeline.services.settings import POOL, Settings

_BUSY_SECONDS = 30
_ACTIVE = ("RUNNING", "PENDING", "CANCELLING")


class PrefectApi:
    """Prefect's server, asked with the settings' credentials."""

    def __init__(self, settings: Settings) -> None:
        self.url = f"{settings.prefect_url}/api"
        token = base64.b64encode(settings.auth.encode()).decode()
        self.headers = {"Content-Type": "application/json"}
        if settings.auth:
            self.headers["Authorization"] = f"Basic {token}"

    def call(self, method: str, path: str, body: object = None) -> Any:
        """The answer's JSON; None where it is empty.

        Raises:
            OSError: it does not answer, or refuses (urllib.error.HTTPError).
        """
        request = urllib.request.Request(
            f"{self.url}{path}",
            data=None if body is None else json.dumps(body).encode(),
            method=method,
            headers=self.headers,
        )
        deadline = time.monotonic() + _BUSY_SECONDS
        while True:
            try:
                with direct.open(request, timeout=20) as answer:
                    text = answer.read()
                return json.loads(text) if text else None
            except urllib.error.HTTPError as error:
                # SQLite was busy: Prefect asks its clients to try again.
                if error.code != 503 or time.monotonic() > deadline:
                    raise
                time.sleep(0.5)

    def set_up_pool(self, runs_at_once: int) -> None:
        """Makes the work pool, or sets how many runs it hands out at once."""
        try:
            self.call("PATCH", f"/work_pools/{POOL}", {"concurrency_limit": runs_at_once})
        except urllib.error.HTTPError as error:
            if error.code != 404:
                raise
            self.call(
                "POST",
                "/work_pools/",
                {"name": POOL, "type": "process", "concurrency_limit": runs_at_once},
            )

    def worker_is_online(self, since: float) -> bool:
        """Whether a worker has reported to the pool after a moment (Unix time)."""
        found = self.call("POST", f"/work_pools/{POOL}/workers/filter", {})
        beats = (worker["last_heartbeat_time"] for worker in found)
        return any(datetime.fromisoformat(beat).timestamp() >= since for beat in beats if beat)

    def active_runs(self) -> list[dict[str, Any]]:
        """The pool's flow runs that have or had a process."""
        found: list[dict[str, Any]] = self.call(
            "POST",
            "/flow_runs/filter",
            {
                "flow_runs": {"state": {"type": {"any_": list(_ACTIVE)}}},
                "work_pools": {"name": {"any_": [POOL]}},
            },
        )
        return found

    def set_state(self, run: str, kind: str, message: str, force: bool = False) -> None:
        """Proposes a state, or forces it."""
        state = {"type": kind, "name": kind.capitalize(), "message": message}
        self.call("POST", f"/flow_runs/{run}/set_state", {"state": state, "force": force})

    def settle_lost_runs(self) -> dict[str, str]:
        """Gives an end to this machine's active runs, all of whose processes are gone.

        Returns:
            The state that each run was given.
        """
        settled = {}
        for run in self.active_runs():
            host = (run["infrastructure_pid"] or "").rpartition(":")[0]
            if host in ("", socket.gethostname()):
                kind = "CANCELLED" if run["state_type"] == "CANCELLING" else "CRASHED"
                message = "Its process is gone; retry it to go on from the newest checkpoint."
                self.set_state(run["id"], kind, message, force=True)
                settled[run["id"]] = kind
        return settled

"""A project whose services run for a test, and what is asked of them."""

from __future__ import annotations

import base64
import contextlib
import json
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Project, narrow

from pipeline.services.definitions import free_ports
from pipeline.services.folder import MARK
from pipeline.system.process import environment_of

ENDED = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}


class Services(Project):
    """A project whose services listen on ports of their own."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        (folder / "prefect.yaml").write_bytes((ROOT / "prefect.yaml").read_bytes())
        self.set(narrow)
        self.run("git", "add", "-A")
        self.run("git", "commit", "-qm", "narrow")
        self.prefect_port, self.mlflow_port = free_ports(2)
        self.auth = ""  # "user:password" that `api` sends
        self.environment |= {
            "VDVAE_PREFECT_PORT": str(self.prefect_port),
            "VDVAE_MLFLOW_PORT": str(self.mlflow_port),
            "PREFECT_WORKER_QUERY_SECONDS": "2",
        }

    def services(self, word: str, code: int = 0, **environment: str) -> str:
        words = (sys.executable, "-m", "pipeline.services", word)
        return self.run(*words, code=code, **environment)

    def api(self, path: str, body: dict[str, Any] | None = None) -> tuple[int, Any]:
        """Status and JSON of a call to Prefect's API; a body makes it a POST."""
        headers = {"Content-Type": "application/json"}
        if self.auth:
            headers["Authorization"] = f"Basic {base64.b64encode(self.auth.encode()).decode()}"
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.prefect_port}/api{path}",
            data=None if body is None else json.dumps(body).encode(),
            headers=headers,
        )
        for _ in range(5):
            try:
                with urllib.request.urlopen(request, timeout=60) as answer:
                    return answer.status, json.loads(answer.read() or b"null")
            except urllib.error.HTTPError as error:
                status, body_of_it = error.code, json.loads(error.read() or b"null")
            if status != 503:  # SQLite is busy: Prefect asks its clients to try again
                break
            time.sleep(1)
        return status, body_of_it

    def deployment(self, name: str) -> str:
        status, found = self.api(f"/deployments/name/run-recipe/{name}")
        assert status == 200, found
        return str(found["id"])

    def begin(self, deployment: str, **parameters: Any) -> tuple[int, Any]:
        path = f"/deployments/{self.deployment(deployment)}/create_flow_run"
        return self.api(path, {"parameters": parameters})

    def wait(self, run: str, wanted: set[str]) -> str:
        """Waits until a run is in one of these states; which one. One that has ended stays so."""
        while True:
            state = self.api(f"/flow_runs/{run}")[1]["state"]["type"]
            if state in wanted:
                return str(state)
            if state in ENDED:
                pytest.fail(f"the run is {state}, not {wanted}\n{self.logs(run)}")
            time.sleep(0.5)

    def wait_for_log(self, run: str, words: str) -> None:
        """Waits until a run that has not ended has said these words."""
        while words not in self.logs(run):
            state = self.api(f"/flow_runs/{run}")[1]["state"]["type"]
            if state in ENDED and words not in self.logs(run):
                pytest.fail(f"the run is {state} and has not said {words!r}\n{self.logs(run)}")
            time.sleep(0.5)

    def logs(self, run: str) -> str:
        """All that a run has said so far, a line a message."""
        lines: list[str] = []
        while True:
            body = {
                "logs": {"flow_run_id": {"any_": [run]}},
                "sort": "TIMESTAMP_ASC",
                "offset": len(lines),
            }
            page = self.api("/logs/filter", body)[1]
            lines += [line["message"] for line in page]
            if not page:
                return "\n".join(lines)

    def marked(self, word: str = "") -> list[int]:
        """Processes of these services, by the mark in their environment, with a word in them."""
        mark, found = str((self.folder / "services").resolve()), []
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has ended
                command = (entry / "cmdline").read_bytes()
                if environment_of(int(entry.name)).get(MARK) == mark and word.encode() in command:
                    found.append(int(entry.name))
        return found

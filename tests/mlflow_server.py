"""A real MLflow server on this machine that a test can stop, kill and start again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from pipeline.services.definitions import free_ports


class MlflowServer:
    """The server of one database; artifacts go through it, the harder way for an outage."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        (self.port,) = free_ports(1)
        self.url = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Starts it and returns when it answers."""
        command = [
            *(sys.executable, "-m", "mlflow", "server", "--workers", "1"),
            *("--host", "127.0.0.1", "--port", str(self.port)),
            *("--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db"),
            *("--artifacts-destination", str(self.folder / "artifacts")),
        ]
        with (self.folder / "log.txt").open("ab") as log:
            self._process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                env={
                    **{k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")},
                    "MLFLOW_DISABLE_TELEMETRY": "true",
                    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
                },
                start_new_session=True,
            )
        deadline = time.monotonic() + 60
        while True:
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return
            except OSError:
                assert time.monotonic() < deadline, (self.folder / "log.txt").read_text()
                time.sleep(0.2)

    def kill(self) -> None:
        """Ends it at once: connections are refused from here on."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def pause(self) -> None:
        """Stops it: connections are taken, and nothing answers."""
        os.killpg(self._process.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        """Lets it go on: it does what it was asked meanwhile, also where nobody waits for it."""
        os.killpg(self._process.pid, signal.SIGCONT)

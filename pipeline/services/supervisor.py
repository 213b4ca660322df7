"""The supervisor: starts the services in their order, keeps them up, and ends them."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from pipeline.params import Places
from pipeline.services import definitions, folder
from pipeline.services.folder import FOLDER, LOGS, grace_seconds, of_a_flow_run
from pipeline.services.prefect_api import PrefectApi
from pipeline.services.service import Service, answers
from pipeline.services.settings import Settings
from pipeline.system.process import StopRequest, end_all, end_with_parent
from vdvae.config import UserError

_MOST_RESTARTS = 5
_WELL_SECONDS = 600  # a service that ran this long may be started again as often


class _Stop(Exception):
    """Somebody asked the supervisor to end."""


class Supervisor:
    """Starts the services in their order, keeps them up, and ends them in the opposite order."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.services: list[Service] = []
        self.api = PrefectApi(settings)
        self.stop = StopRequest()

    def run(self) -> None:
        """Lives as long as the services do."""
        self._record(ready=False)
        error = ""
        try:
            self._start()
            _say("all services answer")
            self._record(ready=True)
            while True:
                self._pause(0.5)
                self._restart_the_dead()
        except _Stop:
            pass
        except UserError as failure:
            error = str(failure)
        except OSError as failure:
            error = f"the services cannot go on ({failure}); see {LOGS}"
        finally:
            self._shut_down()
            # A reason is kept for the one who waits for us; else nothing is.
            self._record(ready=False, error=error)

    def _pause(self, seconds: float) -> None:
        if self.stop.asked:
            raise _Stop
        time.sleep(seconds)

    def _record(self, ready: bool, error: str = "") -> None:
        services = [
            {
                "name": service.name,
                "address": service.address,
                "probe": service.probe,
                "pid": service.process.pid if service.process else 0,
                "restarts": service.restarts,
                "log": str(service.log),
            }
            for service in self.services
        ]
        record = {
            "supervisor": os.getpid(),
            "ready": ready,
            "error": error,
            "services": services,
        }
        folder.write_record(record)

    def _start(self) -> None:
        environment = definitions.common_environment(self.settings)
        prefect = definitions.prefect(self.settings, environment)
        self._add(prefect)
        if self.settings.s3:
            self._add(definitions.s3(self.settings, environment))
        places = Places.from_env()
        if definitions.own_mlflow():
            # While Prefect starts: the database with the experiment whose pictures and models lie
            # where runs without this server put them, too.
            prepare = [sys.executable, "-m", "pipeline.tracking"]
            self._finish("mlflow-prepare", prepare, environment)
            self._add(definitions.mlflow(self.settings, environment, places))
        self._wait_for(prefect)
        self.api.set_up_pool(self.settings.at_once)
        worker = definitions.worker(self.settings, environment, places, self._before_worker)
        deploy = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
        self._finish("deploy", deploy, worker.environment)
        began = time.time()
        self._add(worker)
        for service in self.services:
            self._wait_for(service)
        while not self.api.worker_is_online(since=began):
            self._watch(worker)

    def _add(self, service: Service) -> None:
        self.services.append(service)
        service.spawn()
        _say(f"started {service.name}")

    def _finish(self, name: str, command: list[str], environment: Mapping[str, str]) -> None:
        """Runs a command to its end, watching out for a wish to stop."""
        log_path = LOGS / f"{name}.log"
        with log_path.open("wb") as log:
            child = subprocess.Popen(
                command,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=partial(end_with_parent, os.getpid()),
            )
        try:
            while child.poll() is None:
                self._pause(0.1)
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
        if child.returncode:
            raise UserError(
                f"'{' '.join(command[1:])}' ended with {child.returncode}: {_last_line(log_path)}; "
                f"see {log_path}"
            )

    def _wait_for(self, service: Service) -> None:
        while service.probe and not answers(service.probe):
            self._watch(service)

    def _watch(self, service: Service) -> None:
        assert service.process is not None
        if service.process.poll() is not None:
            raise UserError(
                f"{service.name} ended with {service.process.returncode} while it was starting: "
                f"{_last_line(service.log)}; see {service.log}"
            )
        self._pause(0.1)

    def _restart_the_dead(self) -> None:
        for service in self.services:
            assert service.process is not None
            if service.given_up or service.process.poll() is None:
                continue
            code = service.process.returncode
            if time.monotonic() - service.since > _WELL_SECONDS:
                service.restarts = 0
            if service.restarts == _MOST_RESTARTS:
                _say(f"{service.name} ended with {code}; not started again, see {service.log}")
                service.given_up = True
                continue
            if service.name == "worker" and not answers(self.services[0].probe):
                continue  # it is Prefect that knows which runs the dead one has lost
            with contextlib.suppress(ProcessLookupError):
                os.killpg(service.process.pid, signal.SIGKILL)  # what it left in its group
            self._pause(min(2.0**service.restarts, 30))
            service.restarts += 1
            _say(f"{service.name} ended with {code}; start {service.restarts} of {_MOST_RESTARTS}")
            service.spawn()
            self._record(ready=True)

    def _before_worker(self) -> None:
        """No worker ever looks after the runs of one that died: that is done here."""
        end_all(of_a_flow_run, grace_seconds())
        self._settle_lost_runs()
        temporary = FOLDER / "tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(mode=0o700)

    def _settle_lost_runs(self) -> None:
        with contextlib.suppress(OSError, ValueError):  # Prefect may be starting again
            for run, state in self.api.settle_lost_runs().items():
                _say(f"flow run {run} has no process: {state.lower()}")

    def _shut_down(self) -> None:
        _say("stopping")
        try:
            self._cancel_runs()
        except (OSError, ValueError) as error:
            _say(f"runs could not be cancelled: {error}")
        for service in reversed(self.services):
            if service.name == "worker":
                service.end()
                end_all(of_a_flow_run, grace_seconds())
                self._settle_lost_runs()
            else:
                service.end()
            _say(f"ended {service.name}")

    def _cancel_runs(self) -> None:
        if not any(service.name == "worker" for service in self.services):
            return
        self.api.set_up_pool(0)  # what is scheduled waits for the next start
        deadline = time.monotonic() + grace_seconds()
        asked: set[str] = set()
        while (runs := self.api.active_runs()) and time.monotonic() < deadline:
            for run in runs:
                if run["id"] not in asked and run["state_type"] != "CANCELLING":
                    _say(f"cancels flow run {run['id']}")
                    self.api.set_state(run["id"], "CANCELLING", "The services are being stopped.")
                    asked.add(run["id"])
            time.sleep(0.3)


def _last_line(path: Path) -> str:
    lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else "it said nothing"


def _say(text: str) -> None:
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}", flush=True)

"""What a person needs beside the stages: Prefect's server, MLflow's, a worker, started and stopped.

One supervisor, a process of ours, holds a file lock for as long as it lives, starts the services as
its children, and starts one again that dies. All of them carry a mark in their environment, by
which the next start finds what a killed supervisor left behind; no signal goes to a process
without it. Everything they write lies in services/.

    settings.py     where they listen, who may ask     commands.py    start, stop, status
    folder.py       services/: lock, record, mark      service.py     one of them, as a process
    definitions.py  what each is started with          prefect_api.py the calls that we make
    supervisor.py   starts, keeps and ends them
"""

from __future__ import annotations

import argparse
import os
import sys

_PORTS = ("prefect", "mlflow", "s3")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The words of `vdvae services` and `python -m pipeline.services`."""
    parser.add_argument(
        "action", choices=("start", "stop", "status", "supervise"), metavar="start|stop|status"
    )
    for name in _PORTS:
        variable = f"VDVAE_{name.upper()}_PORT"
        parser.add_argument(f"--{name}-port", metavar="PORT", help=f"instead of ${variable}")
    parser.add_argument("--s3", action="store_true", help="with a local S3 server for the store")


def run(words: argparse.Namespace) -> None:
    """Does what the words say; exits with 1 where `status` finds something down.

    Raises:
        UserError: what is wrong and what would help.
    """
    # Not before they are needed: `vdvae --help` works where only the model library is installed.
    from pipeline.services import commands
    from pipeline.services.settings import Settings

    for name in _PORTS:
        if getattr(words, f"{name}_port"):
            os.environ[f"VDVAE_{name.upper()}_PORT"] = getattr(words, f"{name}_port")
    if words.s3:
        os.environ["VDVAE_S3"] = "1"
    if words.action == "stop":
        commands.stop()
    elif words.action == "status":
        sys.exit(0 if commands.status() else 1)
    elif words.action == "start":
        commands.start(Settings.from_env(os.environ))
    else:
        from pipeline.services.supervisor import Supervisor

        Supervisor(Settings.from_env(os.environ)).run()

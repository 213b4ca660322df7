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

import os
import sys
from typing import Literal

Action = Literal["start", "stop", "status", "supervise"]


def run(action: Action, **settings: object) -> None:
    """Does what the word says; exits with 1 where `status` finds something down.

    Args:
        action: `supervise` is for `start` alone.
        settings: fields of `Settings` that go before the environment's; None and False do not.

    Raises:
        UserError: what is wrong and what would help.
    """
    # Not before they are needed: `vdvae --help` is quick.
    from pipeline.services import commands
    from pipeline.services.settings import Settings
    from pipeline.settings import variable

    given = {name: value for name, value in settings.items() if value is not None}
    os.environ |= {variable(name): str(v) for name, v in given.items() if v is not False}
    if action == "stop":
        commands.stop()
    elif action == "status":
        sys.exit(0 if commands.status() else 1)
    elif action == "start":
        commands.start(Settings())
    else:
        from pipeline.services.supervisor import Supervisor

        Supervisor(Settings()).run()

"""Python commands from an interpreter that has loaded what takes seconds: PyTorch and MLflow.

`python -m pipeline.stages.train` spends 3 to 5 s on imports. Here one process imports the
libraries, none of this project's own code, and forks for each command, which then runs in a
session, a folder and an environment of its own.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import traceback
import types
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

LIBRARIES = (
    *(
        "torch",
        "torch.distributed",
        "safetensors.torch",
        "numpy",
        "scipy.stats",
        "sklearn.datasets",
    ),
    *("mlflow", "mlflow.pyfunc", "mlflow.store.tracking.sqlalchemy_store", "alembic.command"),
    *("PIL.Image", "boto3", "yaml", "ruamel.yaml", "webdataset", "pandas"),
)


class Warm:
    """The process that forks; for one command at a time."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        words = [sys.executable, __file__, str(theirs.fileno())]
        self._process = subprocess.Popen(words, pass_fds=[theirs.fileno()])
        theirs.close()
        self._socket, self._lock = ours, threading.Lock()

    def run(
        self, words: Sequence[str], cwd: Path, environment: dict[str, str], seconds: float
    ) -> tuple[int, str]:
        """Exit code (negative: the signal) and output of `python WORDS`, which begin with -m or -c.

        After so many seconds it is killed, with its session.
        """
        reader, writer = os.pipe()
        request = {"words": list(words), "cwd": str(cwd), "environment": environment}
        with self._lock, os.fdopen(reader, errors="replace") as output:
            request_fd = os.memfd_create("request")
            with os.fdopen(request_fd, "wb", closefd=False) as file:
                file.write(json.dumps(request).encode())
            socket.send_fds(self._socket, [b"run"], [request_fd, writer])
            os.close(request_fd)
            os.close(writer)
            pid = int(self._socket.recv(64))
            late = threading.Timer(seconds, _kill_session, [pid])
            late.start()
            said = output.read()  # until the last holder of the pipe has gone
            code = int(self._socket.recv(64))
            late.cancel()
        return code, said


def _kill_session(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def serve(fd: int) -> None:
    for name in LIBRARIES:
        __import__(name)
    assert threading.active_count() == 1, "a process with threads must not fork"
    asked = socket.socket(fileno=fd)
    while True:
        _, fds, _, _ = socket.recv_fds(asked, 16, 2)
        if not fds:
            os._exit(0)  # whoever asked has gone
        request_fd, writer = fds
        pid = os.fork()
        if pid == 0:
            asked.close()
            _become(request_fd, writer)
        os.close(request_fd)
        os.close(writer)
        asked.send(str(pid).encode())
        _, status = os.waitpid(pid, 0)
        asked.send(str(os.waitstatus_to_exitcode(status)).encode())


def _become(request_fd: int, writer: int) -> NoReturn:
    os.setsid()
    with os.fdopen(request_fd, "rb") as file:
        file.seek(0)
        request = json.load(file)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(writer, 1)
    os.dup2(writer, 2)
    os.close(writer)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])
    sys.path[0] = request["cwd"]
    how, what, *rest = request["words"]
    sys.argv = [how, *rest]
    code = 1
    try:
        if how == "-m":
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        else:
            module = sys.modules["__main__"] = types.ModuleType("__main__")
            exec(compile(what, "<string>", "exec"), module.__dict__)
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    # The interpreter's own end, but for freeing all objects of the libraries, which takes 2 s.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    serve(int(sys.argv[1]))

"""Python commands from an interpreter that has loaded what takes seconds: PyTorch, MLflow and DVC.

`python -m pipeline.stages.train` spends 3 to 5 s on imports. Here one process for all of pytest's
workers imports the libraries, none of this project's own code, once the first command is asked
for. It forks for each command, which then runs in a session, a folder and an environment of its
own. A script named `python` asks for the same, so that DVC's stages start so, too.

Who is killed must be a process of its own: tests that kill start real interpreters.
"""

from __future__ import annotations

import atexit
import json
import os
import runpy
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

LIBRARIES = (
    *("torch", "torch.distributed", "safetensors.torch", "numpy", "scipy.stats"),
    *("mlflow", "mlflow.pyfunc", "mlflow.store.tracking.sqlalchemy_store", "alembic.command"),
    *("PIL.Image", "boto3", "yaml", "ruamel.yaml", "webdataset", "pandas", "sklearn.datasets"),
    *("dvc.cli", "dvc.repo", "dvc.commands.repro", "dvc.repo.experiments"),
)
PREFIX = "warm-"  # of the folder of socket and script
OURS = ("-m pipeline.", "-c from pipeline.", "-m dvc ")  # commands that are forked
_ITSELF = "-m pipeline.services supervise"  # it is looked for by its command, to be killed


class Warm:
    """The process that forks, and the script that asks it to.

    It ends with the process that made it.
    """

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix=PREFIX))
        parent, self._open = os.pipe()  # it closes when this process ends, whatever ends it
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(str(self.folder / "socket"))
            listener.listen(64)
            fds = (listener.fileno(), parent)
            words = [sys.executable, __file__, "serve", *map(str, fds), str(self.folder)]
            subprocess.Popen(words, pass_fds=fds)
        os.close(parent)
        script = self.folder / "python"
        ask = shlex.join([sys.executable, "-IS", __file__, "ask", str(self.folder / "socket")])
        script.write_text(f'#!/bin/sh\nexec {ask} "$@"\n')
        script.chmod(0o755)


def run(
    folder: Path, words: Sequence[str], cwd: Path, environment: Mapping[str, str], seconds: float
) -> tuple[int, str]:
    """Exit code (negative: the signal) and output of `python WORDS`, forked by the one in a folder.

    After so many seconds it is killed, with its session.
    """
    reader, writer = os.pipe()
    with open(os.devnull) as nothing, os.fdopen(reader, errors="replace") as output:
        asked = _ask(folder / "socket", words, cwd, environment, (nothing.fileno(), writer, writer))
        os.close(writer)
        late = threading.Timer(seconds, asked.shutdown, [socket.SHUT_RDWR])
        late.start()
        said = output.read()  # until the last holder of the pipe has gone
        code = asked.recv(64)
        late.cancel()
        asked.close()
    return int(code or -signal.SIGKILL), said


def _ask(
    path: Path, words: Sequence[str], cwd: Path, environment: Mapping[str, str], fds: Sequence[int]
) -> socket.socket:
    request = {"words": list(words), "cwd": str(cwd), "environment": dict(environment)}
    with os.fdopen(os.memfd_create("request"), "wb+", buffering=0) as file:
        file.write(json.dumps(request).encode())
        asked = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        asked.connect(str(path))
        socket.send_fds(asked, [b"run"], [file.fileno(), *fds])
    return asked


def ask(path: Path, words: Sequence[str]) -> NoReturn:
    """What the script does: in the place of `python WORDS`."""
    command = " ".join(words)
    if not command.startswith(OURS) or command.startswith(_ITSELF):
        os.execv(sys.executable, [sys.executable, *words])
    asked = _ask(path, words, Path.cwd(), os.environ, (0, 1, 2))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: asked.send(str(number).encode()))
    code = int(asked.recv(64) or -signal.SIGKILL)
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def serve(listener: socket.socket, parent: int) -> None:
    """Forks for each connection until the parent has gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal; the parent's end ends us
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # leaves no zombies
    loaded = False
    while parent not in (ready := select.select([listener, parent], [], [])[0]):
        assert ready
        if not loaded:
            for name in LIBRARIES:
                __import__(name)
            assert threading.active_count() == 1, "a process with threads must not fork"
            loaded = True
        asked, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            os.close(parent)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            _watch(asked)
        asked.close()


def _watch(asked: socket.socket) -> NoReturn:
    """Runs one command and passes signals on; kills its session where whoever asked has gone."""
    _, fds, _, _ = socket.recv_fds(asked, 16, 4)
    if not fds:
        os._exit(0)
    os.setsid()  # of the command too, which finds its parent in its own group, as DVC's stages do
    pid = os.fork()
    if pid == 0:
        asked.close()
        _become(*fds)
    for fd in fds:
        os.close(fd)
    ended = os.pidfd_open(pid)
    while ended not in select.select([ended, asked], [], [])[0]:
        number = asked.recv(64)
        if not number:
            os.killpg(0, signal.SIGKILL)
        os.kill(pid, int(number))
    _, status = os.waitpid(pid, 0)
    asked.send(str(os.waitstatus_to_exitcode(status)).encode())
    os._exit(0)


def _become(request_fd: int, *standard: int) -> NoReturn:
    with os.fdopen(request_fd, "rb") as file:
        file.seek(0)
        request = json.load(file)
    for fd, given in enumerate(standard):
        os.dup2(given, fd)
        os.close(given)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])
    sys.path[0] = request["cwd"]
    first = Path(os.environ["PATH"].partition(os.pathsep)[0], "python")
    if first.parent.name.startswith(PREFIX):
        sys.executable = str(first)  # what it starts is forked in turn
    how, what, *rest = request["words"]
    sys.argv = [how, *rest]
    sys.stdout.reconfigure(line_buffering="PYTHONUNBUFFERED" in os.environ)  # type: ignore[union-attr]
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
    if sys.argv[1] == "ask":
        ask(Path(sys.argv[2]), sys.argv[3:])
    serve(socket.socket(fileno=int(sys.argv[2])), int(sys.argv[3]))
    shutil.rmtree(sys.argv[4])

"""A stage runs under the python of its environment, whatever `python` the shell has.

`.venv/bin/dvc repro` finds a stage's `python` on the caller's PATH. This file, and what is imported
before it, has to run under any Python from 3.7 on that is found there.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec

_NEEDED = ("numpy", "safetensors", "torch", "yaml", "PIL", "webdataset", "mlflow")
_LEAST = (3, 11)


def _words() -> list[str]:
    with open("/proc/self/cmdline", "rb") as file:
        return [os.fsdecode(word) for word in file.read().split(b"\0")[:-1]]


def _is_stage(words: list[str]) -> bool:
    return "-m" in words and words[words.index("-m") + 1].startswith("pipeline.stages.")


def _change(words: list[str]) -> None:
    """Puts the project's python, or that of the DVC above us, in our place.

    The process stays the same one: its parent, whose end it is told, and its signals. Where there
    is no such python, it ends with a sentence and exit code 2.
    """
    for python in (os.path.join(".venv", "bin", "python"), _python_of_parent()):
        if python and os.access(python, os.X_OK) and _does(python):
            python = os.path.abspath(python)  # a link, whose place says which environment it is
            os.execv(python, [python, *words[1:]])
    lacks = ", ".join(name for name in _NEEDED if not find_spec(name)) or "Python 3.11"
    print(
        f"error: the shell's python, {sys.executable}, lacks {lacks}; run '. .venv/bin/activate', "
        f"after 'make setup' where there is no .venv, then the same command again",
        file=sys.stderr,
    )
    sys.exit(2)


def _does(python: str | None = None) -> bool:
    """Whether a python, by default this one, is new enough and has the packages of the stages."""
    if python is None:
        return sys.version_info >= _LEAST and all(map(find_spec, _NEEDED))
    check = (
        f"import sys; from importlib.util import find_spec; "
        f"sys.exit(sys.version_info < {_LEAST} or not all(map(find_spec, {_NEEDED})))"
    )
    return not subprocess.call([python, "-c", check], stdin=subprocess.DEVNULL)


def _python_of_parent() -> str | None:
    try:
        with open(f"/proc/{os.getppid()}/cmdline", "rb") as file:
            first = os.fsdecode(file.read().partition(b"\0")[0])
    except OSError:
        return None
    is_python = os.path.basename(first).startswith("python")
    return shutil.which(first) if is_python else None


if _is_stage(_words()) and not _does():
    _change(_words())

"""Models and training states on disk: safetensors and JSON, nothing executable, index last."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import threading
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from vdvae.config import ModelConfig, UserError
from vdvae.files import atomic_path, atomic_write, atomic_write_json, sha256_of
from vdvae.model import VDVAE

WEIGHTS, CONFIG = "model.safetensors", "config.json"


def save(model: VDVAE, folder: str | Path) -> None:
    """Writes a model's weights and, last, its config; each file appears whole or not at all."""
    folder = Path(folder)
    weights = {name: value.detach().cpu().contiguous() for name, value in model.named_parameters()}
    _write_tensors(weights, folder / WEIGHTS)
    atomic_write_json(folder / CONFIG, model.config.to_dict())


def load(folder: str | Path) -> VDVAE:
    """Reads a model that `save` wrote, on the CPU, in evaluation mode.

    Raises:
        UserError: for a missing or unreadable file, or weights that do not fit the config.
    """
    folder = Path(folder)
    try:
        config = ModelConfig.from_dict(
            json.loads((folder / CONFIG).read_text()), where=str(folder / CONFIG)
        )
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder / CONFIG}: not found; is {folder} a model's folder?") from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise UserError(f"{folder / CONFIG}: not readable as JSON; copy the model again") from None
    weights = _read_tensors(folder / WEIGHTS, "copy the model again")
    with torch.device("meta"):
        model = VDVAE(config)
    expected = {name: value.shape for name, value in model.named_parameters()}
    found = {name: value.shape for name, value in weights.items()}
    if expected != found:
        names = sorted(name for name in expected | found if expected.get(name) != found.get(name))
        raise UserError(
            f"{folder / WEIGHTS}: does not fit {CONFIG} beside it: {len(names)} parameters are "
            f"missing, extra or misshapen, the first {names[0]}; copy the model again"
        )
    model.load_state_dict(weights, assign=True)
    return model.requires_grad_(True).eval()


class StateWriter:
    """Writes training states beside training, which waits for the copy in memory alone.

    One state is written at a time: the next waits for it. As a context, it leaves when the last
    one is on the disk.

    Raises (from every method, and where the block is left without an error): what the state before
    could not be written for, say an OSError; those before it are kept.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep
        self._copies: dict[str, Tensor] = {}  # used again for every state
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, traceback: TracebackType | None
    ) -> None:
        if self._thread is not None:
            self._thread.join()
        if kind is None:
            self.wait()

    def check_room(self, state_bytes: int) -> None:
        """Refuses to begin where the disk cannot hold the states that are kept, and one more.

        Raises:
            UserError: naming the folder and what it needs.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        held = sum(path.stat().st_size for path in self.folder.glob("step-*.safetensors"))
        needed = state_bytes * (self.keep + 1) - held
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise UserError(
                f"{self.folder}: {free / 2**30:.2f} GiB are free, but {self.keep + 1} checkpoints "
                f"need {needed / 2**30:.2f} GiB more; free some space, set VDVAE_RUNS to another "
                f"disk, or lower train.keep_checkpoints"
            )

    def write(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Takes a copy of the tensors and returns; they may change after that, `state` may not."""
        self.wait()
        for name, value in tensors.items():
            if name not in self._copies:  # in the same memory layout: then a copy is a plain one
                self._copies[name] = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
            self._copies[name].copy_(value, non_blocking=True)
        if any(value.is_cuda for value in tensors.values()):
            torch.cuda.synchronize()
        copies = {name: self._copies[name] for name in tensors}
        self._thread = threading.Thread(target=self._write, args=(step, copies, state))
        self._thread.start()

    def wait(self) -> None:
        """Returns when the last state is on the disk."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _write(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        try:
            write_state(self.folder, step, tensors, state)
            keep_newest_states(self.folder, self.keep, step)
        except BaseException as error:  # raised where the next state is written
            self._error = error


def write_state(folder: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Writes a training state; the JSON index, which names the tensors' hash, comes last."""
    path = folder / f"step-{step:09d}.safetensors"
    _write_tensors({name: value.contiguous() for name, value in tensors.items()}, path)
    index = {**state, "sha256": sha256_of(path)}
    atomic_write(path.with_suffix(".json"), json.dumps(index))  # figures may be infinite


def read_newest_state(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The newest whole training state of a folder, or None where there is none.

    A state without its index does not exist; one whose bytes changed since is passed over for the
    one before it.

    Raises:
        OSError: a state cannot be read at this moment: to go on without it would remove it.
        UserError: there are states, but none is whole.
    """
    index = None
    for index in sorted(folder.glob("step-*.json"), reverse=True):
        path = index.with_suffix(".safetensors")
        try:
            state = json.loads(index.read_text())
            if state.pop("sha256") == sha256_of(path):
                return _read_tensors(path, ""), state
        except (FileNotFoundError, LookupError, TypeError, ValueError):
            pass
        print(f"{path}: passed over, its bytes are not those that were written", flush=True)
    if index is not None:
        raise UserError(
            f"{folder}: no checkpoint in it is whole; restore one of them, or remove the folder to "
            f"begin anew"
        )
    return None


def keep_newest_states(folder: Path, count: int, newest: int) -> None:
    """Removes all but the newest states, each one's index first, and what a kill left half-way.

    Args:
        newest: the step that was written last; those beyond it were damaged, or training would have
            gone on from them.
    """
    indices = sorted(folder.glob("step-*.json"), reverse=True)
    beyond = [index for index in indices if index.stem > f"step-{newest:09d}"]
    for index in [*beyond, *indices[len(beyond) + count :]]:
        index.unlink()
    for path in folder.glob("step-*.safetensors"):
        if not path.with_suffix(".json").exists():
            path.unlink()
    for path in folder.glob(".step-*.tmp"):
        path.unlink()


def _write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    with atomic_path(path) as temporary:
        try:
            safetensors.torch.save_file(tensors, temporary)
        except safetensors.SafetensorError as error:
            # Its own exception hides the system's: a full disk must look like one.
            code = re.search(r"os error (\d+)", str(error))
            if code is None:
                raise
            number = int(code[1])
            raise OSError(number, os.strerror(number), str(path)) from error


def _read_tensors(path: Path, remedy: str) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path}: not found; {remedy}") from None
    except (safetensors.SafetensorError, struct.error, OSError) as error:
        raise UserError(f"{path}: not a whole safetensors file ({error}); {remedy}") from None

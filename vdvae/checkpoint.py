"""Models and training states on disk: safetensors and JSON, nothing executable, index last."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import os
import re
import shutil
import threading
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from vdvae.config import UserError, model_config_of
from vdvae.doctor import Point
from vdvae.files import (
    atomic_path,
    atomic_write,
    atomic_write_json,
    parse_json,
    read_json,
    read_regular,
    sha256_of,
)
from vdvae.models import ImageModel, build

WEIGHTS, CONFIG = "model.safetensors", "config.json"
LARGEST = 1e6  # of a weight: no training comes near, and sums of its products stay finite
MOST_BYTES = 2**36  # of a training state whose model is not known
_MOST_INDEX_BYTES = 2**28  # the points of 1,000,000 intervals
_HEADER_BYTES = 2**24  # of a safetensors file, at most: names and shapes


@dataclass(kw_only=True)
class Resumable:
    """What a training state keeps in its JSON index: its fields are the one list of that."""

    step: int = 0  # updates, skipped ones included
    skipped: int = 0  # updates
    skipped_in_a_row: int = 0
    best_bits_per_dim: float | None = None  # of the validations; None before the first finite one
    validations_since_best: int = 0
    findings_seen: dict[str, int] = field(default_factory=dict)  # see `doctor.examine`
    history: list[Point] = field(default_factory=list)  # points are not changed once they are made
    window: dict[str, float] = field(default_factory=dict)  # sums since the last point
    # This step's point, and whether it is still to be validated: both that and `on_log` take long,
    # so a checkpoint is written before them. It joins `history` after them. Older states lack it.
    pending: tuple[Point, bool] | None = None

    def to_index(self) -> dict[str, Any]:
        """The fields by name; what training changes in place is copied."""
        names = (item.name for item in dataclasses.fields(Resumable))
        return {name: copy.copy(getattr(self, name)) for name in names}

    def restore(self, index: dict[str, Any]) -> None:
        """Sets the fields from an index that `read_newest_state` has checked."""
        for item in dataclasses.fields(Resumable):
            setattr(self, item.name, index.get(item.name, item.default))
        if self.pending is not None:
            point, due = self.pending  # a list, in JSON
            self.pending = point, due


def _are_numbers(value: Any) -> bool:
    return isinstance(value, dict) and all(type(v) in (int, float) for v in value.values())


_VALID: dict[Any, Callable[[Any], bool]] = {  # by the type of a field of Resumable
    int: lambda v: type(v) is int and v >= 0,
    float | None: lambda v: v is None or type(v) in (int, float),
    dict[str, int]: _are_numbers,
    dict[str, float]: _are_numbers,
    list[Point]: lambda v: isinstance(v, list) and all(map(_are_numbers, v)),
    tuple[Point, bool] | None: lambda v: (
        v is None or (isinstance(v, list) and len(v) == 2 and _are_numbers(v[0]))
    ),
}


class _DamagedError(UserError):
    """The bytes on the disk are not those that were written."""


def save(model: ImageModel, folder: str | Path) -> None:
    """Writes a model's weights and, last, its config; each file appears whole or not at all.

    Args:
        model: with weights in float32, on any device.
        folder: gets model.safetensors and config.json.

    Raises:
        UserError: the weights are not float32.
    """
    folder = Path(folder)
    dtype = next(model.parameters()).dtype
    if dtype != torch.float32:
        raise UserError(f"{folder}: weights of {dtype} are not written; call model.float() first")
    weights = {name: value.detach().cpu().contiguous() for name, value in model.named_parameters()}
    _write_tensors(weights, folder / WEIGHTS)
    atomic_write_json(folder / CONFIG, model.config.to_dict())


def load(folder: str | Path) -> ImageModel:
    """Reads a model that `save` wrote.

    Args:
        folder: with model.safetensors and config.json.

    Returns:
        The model, on the CPU, in evaluation mode.

    Raises:
        UserError: a file is missing, unreadable, not a regular one or too large, or the weights do
            not fit the config, are not float32, not finite or beyond LARGEST.
    """
    folder, remedy = Path(folder), "copy the model again"
    path = folder / WEIGHTS
    try:
        values = read_json(folder / CONFIG, remedy)
    except FileNotFoundError:
        raise UserError(f"{folder / CONFIG}: not found; is {folder} a model's folder?") from None
    config = model_config_of(values, where=str(folder / CONFIG))
    with torch.device("meta"):
        model = build(config)
    expected = dict(model.named_parameters())
    try:
        data = read_regular(path, 4 * _count(expected.values()) + _HEADER_BYTES, remedy)
    except FileNotFoundError:
        raise UserError(f"{path}: not found; {remedy}") from None
    weights = _tensors(data, path, remedy)
    check_fit(weights, expected, f"{path}: does not fit {CONFIG} beside it", remedy)
    check_values(weights, f"{path}", remedy)
    model.load_state_dict(weights, assign=True)
    return model.requires_grad_(True).eval()


def check_fit(
    tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str, remedy: str
) -> None:
    """Checks that tensors have the names and shapes of others.

    Raises:
        UserError: beginning with `what`; it gives the number of those that do not, and the first.
    """
    given, wanted = ({n: t.shape for n, t in named.items()} for named in (tensors, expected))
    names = sorted(name for name in given | wanted if given.get(name) != wanted.get(name))
    if names:
        raise UserError(
            f"{what}: {len(names)} parameters are missing, extra or misshapen, the first "
            f"{names[0][:100]}; {remedy}"
        )


def check_values(
    tensors: Mapping[str, Tensor],
    where: str,
    remedy: str,
    *,
    dtype: torch.dtype = torch.float32,
    largest: float = LARGEST,
) -> None:
    """Checks the dtype and values of tensors that weights are read from.

    Args:
        tensors: by name.
        where: the file, for messages.
        remedy: for messages.
        dtype: that all must have.
        largest: absolute value.

    Raises:
        UserError: naming the first tensor of another dtype, or with a value that is not finite or
            beyond `largest`.
    """
    for name, tensor in tensors.items():
        if tensor.dtype != dtype or tensor.layout != torch.strided:
            raise UserError(
                f"{where}: {name[:100]} is {tensor.dtype}, {tensor.layout}, where {dtype} is read; "
                f"{remedy}"
            )
        least, most = torch.aminmax(tensor.detach())
        if not (-largest <= least and most <= largest):  # NaN is in no order
            raise UserError(
                f"{where}: {name[:100]} has a value that is not finite, or beyond "
                f"±{largest:g}; {remedy}"
            )


def _count(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


class StateWriter:
    """Writes training states in a thread: training waits only for the copy in memory.

    One state is written at a time; the next waits for it. Used as a context manager, it returns
    when the last one is on the disk.

    Args:
        folder: of the states.
        keep: the number of newest states that are kept.

    Raises (from every method, and at the end of the `with` block if that raised nothing): the error
    that the previous state could not be written for, such as OSError; older states are kept.
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
        """Checks that the disk can hold the states that are kept, and one more.

        Args:
            state_bytes: the size of one.

        Raises:
            UserError: it cannot; naming the folder and the room it needs.
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
        """Copies the tensors and returns; they may change after that, `state` may not."""
        self.wait()
        for name, value in tensors.items():
            if name not in self._copies:  # in the same memory layout, which copies fastest
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
    path = folder / f"{_stem(step)}.safetensors"
    _write_tensors({name: value.contiguous() for name, value in tensors.items()}, path)
    index = {**state, "sha256": sha256_of(path)}
    atomic_write(path.with_suffix(".json"), json.dumps(index))  # figures may be infinite


def read_newest_state(
    folder: Path, most_bytes: int = MOST_BYTES
) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The newest undamaged training state of a folder.

    A state without its index does not exist; of a damaged one the predecessor is taken.

    Args:
        folder: of the states.
        most_bytes: of the tensors; a larger file is not read.

    Returns:
        Its tensors and its index, or None if there is no state.

    Raises:
        UserError: a state cannot be read at this moment, or is not a regular file or too large (to
            go on without it would remove it); or there are states, but all are damaged.
    """
    index = None
    for index in sorted(folder.glob("step-*.json"), reverse=True):
        path = index.with_suffix(".safetensors")
        try:
            return _read_state(index, path, most_bytes)
        except (FileNotFoundError, _DamagedError):
            print(f"{path}: passed over, its bytes are not those that were written", flush=True)
    if index is not None:
        raise UserError(
            f"{folder}: no checkpoint in it is whole; restore one of them, or remove the folder to "
            f"begin anew"
        )
    return None


def _read_state(
    index: Path, path: Path, most_bytes: int
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    remedy = f"mend that, or move {index.parent} away to begin anew, then run the same command"
    text = read_regular(index, _MOST_INDEX_BYTES, remedy)
    try:
        state = parse_json(text, str(index), remedy, finite=False)
    except UserError as error:
        raise _DamagedError(str(error)) from None
    if not (isinstance(state, dict) and _is_index(state) and index.stem == _stem(state["step"])):
        raise _DamagedError(f"{index}: is no index of a training state")
    # Read, not mapped: a failing disk then gives an error, not SIGBUS.
    data = read_regular(path, most_bytes, remedy)
    if hashlib.sha256(data).hexdigest() != state.pop("sha256", None):
        raise _DamagedError(f"{path}: has another sha256")
    return _tensors(data, path, remedy), state


def _is_index(state: dict[str, Any]) -> bool:
    kinds = typing.get_type_hints(Resumable)
    return isinstance(state.get("config"), dict) and all(
        _VALID[kind](state[name]) if name in state else name == "pending"
        for name, kind in kinds.items()
    )


def _stem(step: int) -> str:
    return f"step-{step:09d}"


def keep_newest_states(folder: Path, count: int, newest: int) -> None:
    """Removes all but the newest states, each one's index first, and unfinished files.

    Args:
        folder: of the states.
        count: the number that is kept.
        newest: the step that was written last; states beyond it are damaged, or training would have
            gone on from them.
    """
    indices = sorted(folder.glob("step-*.json"), reverse=True)
    beyond = [index for index in indices if index.stem > _stem(newest)]
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
            # Its exception hides the system's error, such as a full disk.
            code = re.search(r"os error (\d+)", str(error))
            if code is None:
                raise
            number = int(code[1])
            raise OSError(number, os.strerror(number), str(path)) from error


def _tensors(data: bytes, path: Path, remedy: str) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(data)
    except (safetensors.SafetensorError, LookupError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error)[:200]
        raise UserError(f"{path}: not a whole safetensors file ({reason}); {remedy}") from None

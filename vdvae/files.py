"""Files that are written atomically, and user's files that are read with bounds and checks."""

from __future__ import annotations

import contextlib
import csv
import errno
import hashlib
import io
import json
import os
import secrets
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from vdvae.config import UserError, shown

MOST_CSV_BYTES = 2**28  # of a file; the figures of a million images have some 100 MB
MOST_JSON_BYTES = 2**24  # of a file; a manifest of 10,000 shards has 3 MB


def path_of(text: str) -> Path:
    """A path as a person writes it: with `~` for the home folder, which not every shell expands."""
    return Path(os.path.expanduser(text))


def shown_path(path: Path) -> str:
    """The path as messages show it; a very long one is cut."""
    text = str(path)
    return text if len(text) <= 300 else shown(text)


def target_of(path: Path) -> Path:
    """The file that writing to `path` replaces: if that is a symbolic link, its target.

    Raises:
        UserError: a folder, device, FIFO or socket is there, or links lead in a circle.
        OSError: the path cannot be followed.
    """
    try:
        _check_regular(path, os.stat(path).st_mode, "name a file to write")
    except FileNotFoundError:
        pass
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise _unusable(path, error, "name another place") from None
        raise
    return Path(os.path.realpath(path)) if path.is_symlink() else path


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`; if the block raises nothing it is synced and renamed to it.

    Permissions follow the umask. If `path` is a symbolic link, its target is replaced.

    Raises:
        UserError: `path` exists and is not a regular file; nothing has been created then.
    """
    path = target_of(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The longest name that `path` can have leaves no room beside it, so a part of it must do.
    temporary = path.parent / f".{path.name[:40]}.{secrets.token_hex(4)}.tmp"
    os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def atomic_write(path: Path, data: bytes | str) -> None:
    """Writes a whole file at once: a reader sees the old content or the new, never a part."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


def atomic_write_json(path: Path, value: Any) -> None:
    """Writes a value as indented JSON, atomically; NaN and infinity are refused."""
    atomic_write(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def open_lock(path: Path) -> IO[str]:
    """Opens a file to lock, creating it if needed; its folder must exist.

    Raises:
        UserError: it is a link, folder, device, FIFO or socket.
        OSError: it cannot be created.
    """
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    remedy = "a lock is a file of its own: remove what is there, or choose another place"
    with contextlib.suppress(FileNotFoundError):
        # Before it is opened, which some devices take for a command.
        _check_regular(path, os.lstat(path).st_mode, remedy)
    return open(path, "a+", encoding="utf-8", opener=lambda name, _: os.open(name, flags, 0o666))


def open_regular(path: Path, remedy: str = "name a file") -> io.BufferedReader:
    """Opens a regular file to read, and never blocks on a FIFO or a device.

    Raises:
        FileNotFoundError: it does not exist.
        UserError: it is a folder, FIFO, device or socket, or cannot be opened.
    """
    try:
        _check_regular(path, os.stat(path).st_mode, remedy)
        # Should it have become a FIFO since then, opening it does not wait for a writer.
        return open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise _unusable(path, error, remedy) from None


def read_regular(path: Path, most_bytes: int, remedy: str = "name a file") -> bytes:
    """The bytes of a regular file that has no more than `most_bytes`.

    Raises:
        FileNotFoundError: it does not exist.
        UserError: it is no regular file, is larger, or cannot be read.
    """
    with open_regular(path, remedy) as file:
        try:
            size = os.fstat(file.fileno()).st_size
            # No larger buffer than the file needs; files of /proc have size 0.
            data = file.read(min(max(size, 2**16), most_bytes) + 1) if size <= most_bytes else None
        except OSError as error:
            raise _unusable(path, error, remedy) from error
    if data is None or len(data) > most_bytes:
        raise UserError(f"{shown_path(path)}: has more than {most_bytes:,} bytes; {remedy}")
    return data


def parse_json(text: bytes | str, where: str, remedy: str, *, finite: bool = True) -> Any:
    """Parses JSON from outside.

    Args:
        text: whatever it is.
        where: the file, for messages.
        remedy: what to do if it is not valid, for messages.
        finite: refuse NaN and infinity.

    Raises:
        UserError: it is not JSON, is nested too deeply, has a number that Python does not read, or
            a key twice, of which readers would take different ones.
    """
    constant = _no_number if finite else float
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{where}: is damaged (not readable as JSON: {str(error)[:300]}); {remedy}"
        ) from None


def read_json(
    path: Path, remedy: str, *, finite: bool = True, most_bytes: int = MOST_JSON_BYTES
) -> Any:
    """Reads a JSON file with `parse_json`.

    Raises:
        FileNotFoundError: it does not exist.
        UserError: it is not a regular file, is larger, or is not valid.
    """
    data = read_regular(path, most_bytes, remedy)
    return parse_json(data, shown_path(path), remedy, finite=finite)


def read_csv(path: Path, remedy: str, *, most_bytes: int = MOST_CSV_BYTES) -> list[dict[str, str]]:
    """The rows of a CSV file by the names in its first line.

    Raises:
        FileNotFoundError: it does not exist.
        UserError: it is no regular file, is larger, is not UTF-8, or a row has other columns.
    """
    data = read_regular(path, most_bytes, remedy)
    try:
        rows = list(csv.DictReader(io.StringIO(data.decode(), newline="")))
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{shown_path(path)}: not readable as CSV ({error}); {remedy}") from None
    for row in rows:
        if None in row or None in row.values():
            raise UserError(f"{shown_path(path)}: cannot read the row {shown(row)}; {remedy}")
    return rows


def sha256_of(path: Path) -> str:
    """The sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_regular(path: Path, mode: int, remedy: str) -> None:
    kinds = (
        (stat.S_ISDIR, "a folder"),
        (stat.S_ISFIFO, "a FIFO"),
        (stat.S_ISLNK, "a link"),
        (stat.S_ISSOCK, "a socket"),
    )
    if not stat.S_ISREG(mode):
        kind = next((name for test, name in kinds if test(mode)), "a device")
        raise UserError(f"{shown_path(path)}: is {kind}; {remedy}")


def _unusable(path: Path, error: OSError | ValueError, remedy: str) -> UserError:
    if isinstance(error, UserError):
        return error
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return UserError(f"{shown_path(path)}: cannot be used ({reason}); {remedy}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {shown(twice)} is given twice")
    return values


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is not a number")


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

"""Raw data: files in a folder or below an S3 prefix, by the same names and rules."""

from __future__ import annotations

import io
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple, Protocol

import numpy as np

from pipeline.params import DataConfig, raw_path
from pipeline.sources.decode import OddImage
from pipeline.storage import S3Folder, one_line, s3_address, shown_url
from vdvae.config import UserError

OBJECT_BYTES = 2**28  # of the largest image that is decoded, its pixels uncompressed


def setting(recipe: str, key: str) -> str:
    """The full name of a data setting, for messages."""
    return f"params.yaml: recipes.{recipe}.data.{key}"


class File(NamedTuple):
    """One file below a folder or prefix."""

    name: str  # relative, with '/' between its parts
    stamp: str  # of its size and time: another one where the file was written again


class Files(Protocol):
    """Where raw data lie. A file that cannot be read is a UserError that names it."""

    root: str

    def list(self, skipped: Counter[str]) -> Iterator[File]:
        """The files, in any order; what is hidden, a link or no file is counted instead."""
        ...

    def find(self, name: str) -> File | None:
        """One of them by its name."""
        ...

    def open(self, name: str) -> io.BufferedReader:
        """One of them, to be read from any place."""
        ...

    def image(self, name: str) -> bytes:
        """One of them, whole; OddImage where it is larger than an image may be."""
        ...


def raw_files(recipe: str, data: DataConfig, remedy: str) -> Files:
    """The folder or prefix at the recipe's path.

    Raises:
        UserError: with the remedy, where the path is no folder and no address.
    """
    if data.path.startswith("s3://"):
        address = s3_address(data.path)
        if address is None:
            raise UserError(
                f"{setting(recipe, 'path')}: {shown_url(data.path)} is not s3://bucket/prefix; "
                f"{remedy}"
            )
        return _Prefix(*address)
    if not data.path or not raw_path(data.path).is_dir():
        raise UserError(
            f"{setting(recipe, 'path')}: there is no folder {shown_url(data.path)}; {remedy}"
        )
    return _Directory(str(Path(data.path)), raw_path(data.path))


def raw_file(recipe: str, data: DataConfig, remedy: str) -> tuple[Files, File]:
    """The one file at the recipe's path, and where it lies.

    Raises:
        UserError: with the remedy, where no such file is there.
    """
    files: Files | None = None
    if not data.path.startswith("s3://"):
        path = raw_path(data.path)
        files, name = _Directory(str(Path(data.path).parent), path.parent), path.name
    elif address := s3_address(data.path):
        folder, _, name = address[1].rpartition("/")
        files = _Prefix(address[0], folder)
    found = files.find(name) if files and name else None
    if files is None or found is None:
        raise UserError(
            f"{setting(recipe, 'path')}: there is no file {shown_url(data.path)}; {remedy}"
        )
    return files, found


class _Directory:
    """A folder on this machine."""

    def __init__(self, root: str, folder: Path) -> None:
        self.root = root  # as it is written in params.yaml
        self._folder = str(folder)  # absolute: a worker may have another working directory

    def list(self, skipped: Counter[str]) -> Iterator[File]:
        folders = [""]
        while folders:
            above = folders.pop()
            with os.scandir(f"{self._folder}/{above}") as entries:
                for entry in entries:
                    name = above + entry.name
                    if entry.name.startswith("."):
                        skipped["hidden"] += 1
                    elif entry.is_symlink():
                        skipped["link"] += 1
                    elif entry.is_dir():
                        folders.append(f"{name}/")
                    elif entry.is_file():
                        yield File(name, _stamp(entry.stat()))
                    else:
                        skipped[suffix_of(name)] += 1

    def find(self, name: str) -> File | None:
        path = Path(self._folder, name)
        return File(name, _stamp(path.stat())) if path.is_file() else None

    def open(self, name: str) -> io.BufferedReader:
        try:
            return Path(self._folder, name).open("rb")
        except OSError as error:
            raise UserError(
                f"{one_line(f'{self.root}/{name}')}: cannot be read ({error.strerror}); mend that, "
                f"then run the same command again"
            ) from None

    def image(self, name: str) -> bytes:
        return read_image(Path(self._folder, name), one_line(f"{self.root}/{name}"))


def read_image(path: Path, name: str) -> bytes:
    """A whole regular file; nothing else is waited for.

    Raises:
        OddImage: it is no regular file, or larger than an image may be.
        UserError: the machine cannot give it.
    """
    try:
        # Without waiting for a pipe's writer; on a regular file that changes nothing.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise OddImage(f"{name}: is no regular file; take it out", "no regular file")
            content = file.read(OBJECT_BYTES + 1)
    except OSError as error:
        raise UserError(
            f"{name}: cannot be read ({error.strerror}); mend that, then run the same command again"
        ) from None
    if len(content) > OBJECT_BYTES:
        raise _too_many_bytes(name)
    return content


def _too_many_bytes(name: str) -> OddImage:
    return OddImage(
        f"{name}: has more than {OBJECT_BYTES:,} bytes; shrink it or take it out", "too large"
    )


class _Prefix:
    """Objects of an S3 bucket below a prefix, by the rules of a folder."""

    def __init__(self, bucket: str, prefix: str) -> None:
        self.objects = S3Folder(bucket, prefix)
        self.root = self.objects.root

    def list(self, skipped: Counter[str]) -> Iterator[File]:
        hidden: set[str] = set()
        for name, size, modified in self.objects.list():
            # Up to the first part with a dot in front: a hidden folder counts once.
            dotted = re.match(r"(?:|.*?/)\.[^/]*", name, re.DOTALL)
            if not dotted:
                yield File(name, f"{size}-{modified}")
            elif dotted[0] not in hidden:
                hidden.add(dotted[0])
                skipped["hidden"] += 1

    def find(self, name: str) -> File | None:
        found = self.objects.find(name)
        return found and File(name, f"{found.bytes}-{found.modified}")

    def open(self, name: str) -> io.BufferedReader:
        return self.objects.open(name)

    def image(self, name: str) -> bytes:
        content = self.objects.read(name, OBJECT_BYTES)
        if content is None:
            raise _too_many_bytes(one_line(f"{self.root}/{name}"))
        return content


def npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and type of an array in NumPy's format; the file is then at its first value.

    Raises:
        ValueError: it is no such array in C order. Nothing is unpickled.
    """
    form = np.lib.format
    version = form.read_magic(file)
    if version != (1, 0):  # a later one may say that its header has gigabytes
        raise ValueError(f"version {version} of the format")
    shape, fortran_order, dtype = form.read_array_header_1_0(file)
    if fortran_order:
        raise ValueError("its order is Fortran's")
    return shape, dtype


def _stamp(status: os.stat_result) -> str:
    return f"{status.st_size}-{status.st_mtime_ns}"


def suffix_of(name: str) -> str:
    """The end of a file's name, in small letters and fit to be shown: `.png`."""
    suffix = PurePosixPath(name.rpartition("/")[2]).suffix.lower()
    return ascii(suffix)[1:-1] or "no suffix"

"""Decoded shards on a local disk: each is decoded once, whoever reads it how often.

A file holds the pixels of one shard, uncompressed, then a CRC-32 an image, then the keys:

    x_NCHW uint8 | crc_N uint32 | keys as JSON | crc of crc_N and keys, uint32

Its name is the shard's sha256 and what its pixels were checked against. Every image is compared
with its CRC whenever it is read, so that opening costs next to nothing and nothing damaged passes.
Images are read, not mapped into memory: a disk that fails is an error here, not a SIGBUS.

Locks (flock) say what is in use: readers share a file's, whoever writes one has it alone; the
system frees them with their process. The folder's own lock is held while room is made.

Shapes: N images of a shard, C channels, H W pixels.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import json
import math
import os
import shutil
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.params import Places
from pipeline.shards.decode import Decoded
from vdvae.config import UserError
from vdvae.files import open_lock

_RESERVE_BYTES = 2**30  # of the disk, for everything else
_KEY_BYTES = 100  # of a key in the file, about
Decode = Callable[[], Iterable[tuple[str, NDArray[np.uint8]]]]
_FULL = (errno.ENOSPC, errno.EDQUOT)


class DamagedBlock(Exception):
    """A file of the cache is not what was written."""


class Block(Protocol):
    """The images of a shard, wherever they are."""

    @property
    def keys_N(self) -> list[str]:
        """Names of all its images."""
        ...

    def read(self, rows: list[int], places: list[int], out_BCHW: NDArray[np.uint8]) -> None:
        """Copies each of `rows` to its place in the batch; DamagedBlock where one has changed."""
        ...


class DecodedBlock:
    """A block in memory."""

    def __init__(self, decoded: Decoded) -> None:
        self.keys_N, self._x_NCHW = decoded

    def read(self, rows: list[int], places: list[int], out_BCHW: NDArray[np.uint8]) -> None:
        """See Block."""
        out_BCHW[places] = self._x_NCHW[rows]


class CachedBlock:
    """A block on disk; the cache does not remove it as long as this object lives."""

    def __init__(self, file: BinaryIO, shape: tuple[int, int, int, int]) -> None:
        """Takes over a locked file; DamagedBlock where it is not a whole one of this shape."""
        self._file = file
        images, pixels = shape[0], math.prod(shape)
        self._image_bytes = pixels // images
        rest = os.pread(file.fileno(), os.fstat(file.fileno()).st_size, pixels)
        index, crc = rest[:-4], rest[-4:]
        if len(crc) < 4 or zlib.crc32(index) != int.from_bytes(crc, "little"):
            raise DamagedBlock
        self._crc_N = np.frombuffer(index[: 4 * images], "<u4")
        self._keys = index[4 * images :]

    @functools.cached_property
    def keys_N(self) -> list[str]:
        """Parsed when asked for: training asks for none."""
        keys: list[str] = json.loads(self._keys)
        return keys

    def read(self, rows: list[int], places: list[int], out_BCHW: NDArray[np.uint8]) -> None:
        """See Block."""
        handle, size = self._file.fileno(), self._image_bytes
        out = out_BCHW.data.cast("B")
        crcs = self._crc_N[rows].tolist()
        for row, place, crc in zip(rows, places, crcs, strict=True):
            image = out[place * size : (place + 1) * size]
            if os.preadv(handle, [image], row * size) != size or zlib.crc32(image) != crc:
                raise DamagedBlock


@dataclass(frozen=True, kw_only=True)
class BlockCache:
    """A folder of blocks of at most `limit_bytes`; those used longest ago make room for others.

    Any number of processes may share one.
    """

    folder: Path
    limit_bytes: int  # 0: nothing is kept

    @classmethod
    def from_env(cls) -> BlockCache:
        """The one at VDVAE_CACHE, of VDVAE_CACHE_GIB.

        Raises:
            UserError: the size is not a number of GiB.
        """
        from pipeline.settings import Settings

        limit_bytes = round(Settings().cache_gib * 2**30)
        return cls(folder=Places.from_env().cache, limit_bytes=limit_bytes)

    def open(self, name: str, shape: tuple[int, int, int, int]) -> CachedBlock | None:
        """A block that is there whole; a damaged one is told of and removed.

        Args:
            name: of the block.
            shape: N, C, H, W.
        """
        path = self._path(name)
        try:
            file = path.open("rb")
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._failure(error) from error
        fcntl.flock(file, fcntl.LOCK_SH)
        if os.fstat(file.fileno()).st_nlink == 0:  # removed before it was locked
            return None
        try:
            block = CachedBlock(file, shape)
        except DamagedBlock:
            self.drop(name)
            return None
        with contextlib.suppress(OSError):  # another user's, in a shared folder
            os.utime(path)
        return block

    def drop(self, name: str) -> None:
        """Removes a damaged block and says so."""
        path = self._path(name)
        print(f"{path}: is damaged; decodes its shard again", file=sys.stderr, flush=True)
        path.unlink(missing_ok=True)

    def add(self, name: str, images: int, pixel_bytes: int, decode: Decode) -> bool:
        """Makes a block, unless another process has made it or does so now: then waits for that.

        Args:
            name: of the block.
            images: in it.
            pixel_bytes: of all its images.
            decode: gives key and x_CHW of each image; its errors pass through.

        Returns:
            Whether the block is there; False where there is no room for it.

        Raises:
            UserError: the folder cannot be written.
        """
        size = pixel_bytes + images * (4 + _KEY_BYTES)
        temporary = self._path(name).with_suffix(".tmp")
        while not self._path(name).exists():
            try:
                with self._folder_lock():
                    # Neither emptied nor appended to: what is reserved below is written over.
                    handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
                    file = os.fdopen(handle, "rb+")
                    mine = _lock_alone(temporary, file)
                    if mine and not self._make_room(size, temporary):
                        temporary.unlink()
                        return False
                    if mine:
                        os.posix_fallocate(file.fileno(), 0, size)
                with file:
                    if mine:
                        self._fill(file, temporary, name, decode)
                    else:
                        fcntl.flock(file, fcntl.LOCK_SH)  # until its writer has ended
            except OSError as error:
                if error.errno in _FULL:
                    return False
                raise self._failure(error) from error
        return True

    def _fill(self, file: BinaryIO, temporary: Path, name: str, decode: Decode) -> None:
        # No fsync: what a power cut leaves of a block does not have its CRCs.
        try:
            keys_N, crcs_N = [], []
            for key, x_CHW in decode():  # one after the other, while it is in the CPU's cache
                file.write(x_CHW.data)
                keys_N.append(key)
                crcs_N.append(zlib.crc32(x_CHW.data))
            index = np.array(crcs_N, "<u4").tobytes() + json.dumps(keys_N).encode()
            file.write(index + zlib.crc32(index).to_bytes(4, "little"))
            file.truncate()  # what was reserved for longer keys
            file.flush()
            temporary.replace(self._path(name))
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    def _make_room(self, size: int, temporary: Path) -> bool:
        """Removes what was left half-written, then blocks, until `size` more bytes fit."""
        if size > self.limit_bytes:
            return False
        files = [found for found in self.files() if found[0] != temporary]
        used = sum(found[1] for found in files)
        for path, bytes_, _ in files:
            fits = used + size <= self.limit_bytes
            if path.suffix != ".tmp" and fits and self._disk_has(size):
                return True
            if remove_unused(path):
                used -= bytes_
        return used + size <= self.limit_bytes and self._disk_has(size)

    def files(self) -> list[tuple[Path, int, float]]:
        """Path, bytes on disk and time of last use; half-written ones first, then the oldest."""
        found = []
        for path in (*self.folder.glob("*.block"), *self.folder.glob("*.tmp")):
            with contextlib.suppress(FileNotFoundError):  # removed in the meantime
                status = path.stat()
                found.append((path, 512 * status.st_blocks, status.st_mtime))
        return sorted(found, key=lambda item: (item[0].suffix != ".tmp", item[2]))

    def _disk_has(self, size: int) -> bool:
        return shutil.disk_usage(self.folder).free >= size + _RESERVE_BYTES

    @contextlib.contextmanager
    def _folder_lock(self) -> Iterator[None]:
        self.folder.mkdir(parents=True, exist_ok=True)
        with open_lock(self.folder / "lock") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.block"

    def changed(self) -> UserError:
        """Blocks are damaged each time that they are written."""
        return UserError(
            f"{self.folder}: what was just written there comes back changed; set VDVAE_CACHE to "
            f"another disk"
        )

    def _failure(self, error: OSError) -> UserError:
        return UserError(
            f"{self.folder}: decoded shards cannot be kept there ({error.strerror}); mend that, "
            f"set VDVAE_CACHE to another folder, or VDVAE_CACHE_GIB=0 to keep none"
        )


def remove_unused(path: Path) -> bool:
    """Removes a file of a cache unless a lock holds it; returns whether it is gone."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
    except FileNotFoundError:
        return True
    except OSError:  # in use, or another user's
        return False
    return True


def _lock_alone(path: Path, file: BinaryIO) -> bool:
    """Locks a file that was just opened; False where another holds it or has renamed it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return path.exists() and path.stat().st_ino == os.fstat(file.fileno()).st_ino

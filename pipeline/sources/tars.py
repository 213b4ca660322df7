"""Walks tars of unknown origin: tarfile believes whatever their headers say."""

from __future__ import annotations

import gzip
import tarfile
from collections.abc import Iterator
from typing import IO, Any

_NAME_BYTES = 255
_HEADER_BYTES = 16 * tarfile.BLOCKSIZE  # of a long name or an extended header


def members(file: IO[bytes] | gzip.GzipFile, most_bytes: int) -> Iterator[tarfile.TarInfo]:
    """What an uncompressed tar holds, in its order, up to its end, which must be there.

    Args:
        file: from its beginning; may be read in between.
        most_bytes: of one member.

    Raises:
        Exception: whatever tarfile raises where the file is damaged or made to do harm.
    """
    headers: Any = _Headers(file)
    with tarfile.open(fileobj=headers, mode="r:") as opened:
        before = 0
        while (member := opened.next()) is not None:
            # A size below 0 leads back to a header that was read before, for ever.
            if not 0 <= member.size <= most_bytes or opened.offset <= before:
                raise tarfile.ReadError(f"the size {member.size} at byte {member.offset}")
            if member.issparse():
                raise tarfile.ReadError(f"a sparse file at byte {member.offset}")
            if len(member.name.encode("utf-8", "surrogateescape")) > _NAME_BYTES:
                raise tarfile.ReadError(f"a name of over {_NAME_BYTES} bytes at {member.offset}")
            before = opened.offset
            yield member
            opened.members.clear()  # type: ignore[attr-defined]  # a million would stay
        # At a damaged header or a cut between two files tarfile ends without a word.
        file.seek(opened.offset)
        if file.read(2 * tarfile.BLOCKSIZE) != bytes(2 * tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"no header and no end at byte {opened.offset}")


class _Headers:
    """The file as tarfile may read it: no header is so large that it fills memory or takes long."""

    def __init__(self, file: IO[bytes] | gzip.GzipFile) -> None:
        self._file, self.seek, self.tell = file, file.seek, file.tell

    def read(self, count: int) -> bytes:
        if not 0 <= count <= _HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {count} bytes")
        return self._file.read(count)

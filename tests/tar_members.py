"""Members of tars for tests: their headers say whatever they are told to."""

from __future__ import annotations

import tarfile


def member(name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, **fields: object) -> bytes:
    """A header and its data, whatever the header says of them."""
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    return info.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % 512)


def extended(records: dict[str, str], **fields: object) -> bytes:
    """An extended header, for the member that follows."""
    data = b"".join(
        next(line for n in range(999) if len(line := f"{n} {key}={value}\n".encode()) == n)
        for key, value in records.items()
    )
    return member("pax", data, tarfile.XHDTYPE, **fields)

"""Files from where they are published: fetched with patience, held to what they were."""

from __future__ import annotations

import hashlib
import http.client
import math
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

from pipeline.sources import cifar10, fashion_mnist, ffhq, imagenet
from pipeline.sources.raw import npy_header
from pipeline.sources.tars import members
from pipeline.system.process import exclusive_lock, try_lock
from pipeline.system.progress import Bar
from vdvae.config import UserError
from vdvae.files import atomic_write_json, open_regular, read_json, target_of

SUMS = Path("data/fetched.json")  # sha256 by file name, of the first fetch; for git to keep
_CHUNK = 1 << 20
_MEMBER_BYTES = 2**24  # of a picture in a tar
_PATIENCE_S = 60
_INTERVAL_S = 5.0


class Raw(NamedTuple):
    """One file of a data set: where it is published, and where its recipe looks for it."""

    url: str
    target: Path
    md5: str = ""  # where the publisher says it
    check: Callable[[Path], object] | None = None  # reads it as what it should be; needs no md5


def _imagenet(size: int) -> tuple[Raw, ...]:
    urls = [imagenet.URL.format(split=split, size=size) for split in ("train", "valid")]
    folder = Path(f"data/raw/imagenet{size}")
    return tuple(Raw(u, folder / u.rpartition("/")[2], check=_check_tar) for u in urls)


def _check_tar(file: Path) -> None:
    with file.open("rb") as opened:
        if not sum(1 for _ in members(opened, _MEMBER_BYTES)):
            raise ValueError("it is empty")


def _check_array(file: Path) -> None:
    with file.open("rb") as opened:
        shape, dtype = npy_header(opened)
        if opened.tell() + math.prod(shape) * dtype.itemsize != file.stat().st_size:
            raise ValueError("its length is not what its header says")


DATA = {
    "cifar10": (Raw(cifar10.URL, Path("data/raw/cifar-10-binary.tar.gz"), cifar10.MD5),),
    "fashion-mnist": tuple(
        Raw(fashion_mnist.URL.format(file=file), Path("data/raw/fashion-mnist") / file, md5)
        for file, md5 in fashion_mnist.MD5.items()
    ),
    "imagenet32": _imagenet(32),
    "imagenet64": _imagenet(64),
    "ffhq256": (Raw(ffhq.URL, Path("data/raw/ffhq-256.npy"), check=_check_array),),
}


def fetch_data(name: str, mirror: str | None = None) -> list[Path]:
    """Brings a data set's raw files to where its recipe looks for them; files that are there stay.

    Args:
        name: a key of DATA.
        mirror: an address below which files of the same names are, instead of the published one.

    Raises:
        UserError: a file cannot be had, or is not what it was.
    """
    found = []
    for raw in DATA[name]:
        file = raw.target.name
        url = f"{mirror.rstrip('/')}/{file}" if mirror else raw.url
        remedy = (
            f"such addresses vanish: give another one with --mirror ADDRESS, or put the file at "
            f"{raw.target}, or set recipes.{name}.data.path to where you have it"
        )
        download(url, raw.target, remedy)
        if raw.md5:
            with raw.target.open("rb") as opened:
                md5 = hashlib.file_digest(opened, "md5").hexdigest()
            if md5 != raw.md5:
                raise UserError(
                    f"{raw.target}: has md5 {md5} where the published file has {raw.md5}; remove "
                    f"it and run 'vdvae fetch {name}' again"
                )
        with held(raw.target, SUMS):
            _read(raw, f"remove it and run 'vdvae fetch {name}' again")
        found.append(raw.target)
    return found


def _read(raw: Raw, remedy: str) -> None:
    if raw.check is not None:
        try:
            raw.check(raw.target)
        except OSError:
            raise  # the disk's
        except Exception as error:  # of a page in its place, say: readers raise all sorts of things
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            raise UserError(
                f"{raw.target}: cannot be read as what it should be ({reason}); {remedy}"
            ) from None


def download(url: str, target: Path, remedy: str) -> None:
    """Brings the file of an address to `target`; a broken download goes on where it was.

    Args:
        remedy: what helps where the address does not answer.

    Raises:
        UserError: it does not come, comes short, or another process is fetching it.
    """
    target = target_of(target)
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.part")
    lock = try_lock(part)
    if lock is None:
        raise UserError(f"{part}: another process is fetching it; wait for it")
    with lock, part.open("ab") as out:
        try:
            whole = _receive(url, out, part.with_name(f"{part.name}-of"))
        except urllib.error.HTTPError as error:
            raise UserError(f"{url}: {error.code} {error.reason}; {remedy}") from None
        except (OSError, ValueError, http.client.HTTPException) as error:
            if getattr(error, "filename", None):
                raise  # the disk's, not the address's
            raise UserError(
                f"{url}: cannot be fetched ({error}); run the same command again to go on; {remedy}"
            ) from None
        size = out.tell()
        if whole is not None and size != whole:
            raise UserError(
                f"{url}: ended after {size} of {whole} bytes; run the same command again to go on"
            )
        part.replace(target)
    part.with_name(f"{part.name}-of").unlink(missing_ok=True)


def _receive(url: str, out: BinaryIO, known: Path) -> int | None:
    """Appends what is missing; how many bytes there are in all, where the server says it.

    Args:
        known: keeps which file the beginning is of, so that another one is not appended to it.
    """
    start = out.seek(0, os.SEEK_END)
    headers = {"Range": f"bytes={start}-"} if start else {}
    if start and known.exists():
        headers["If-Range"] = known.read_text()
    request = urllib.request.Request(url, headers=headers)
    try:
        answer = urllib.request.urlopen(request, timeout=_PATIENCE_S)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not start:
            raise
        if error.headers.get("Content-Range") == f"bytes */{start}":
            return start  # nothing after what is here: it was whole already
        out.truncate(0)  # it is of another file
        return _receive(url, out, known)
    with answer:
        if answer.status != 206:
            out.truncate(start := 0)
            out.seek(0)
            etag = answer.headers.get("ETag", "")
            mark = etag if etag.startswith('"') else answer.headers.get("Last-Modified", "")
            if mark:
                known.write_text(mark)
            else:
                known.unlink(missing_ok=True)
        length = answer.headers.get("Content-Length")
        whole = int(length) + start if length else None
        of = f" of {whole / 2**20:.0f}" if whole else ""
        with Bar(url.rpartition("/")[2], "bytes", _INTERVAL_S) as bar:
            while chunk := answer.read(_CHUNK):
                out.write(chunk)
                line = f"{url}: {out.tell() / 2**20:.0f}{of} MiB"
                bar.show(out.tell(), whole, line)
        out.flush()
        os.fsync(out.fileno())
    return whole


@contextmanager
def held(file: Path, sums: Path) -> Iterator[str]:
    """The sha256 of a file, held to what was written down at its first use.

    It is written down where the block, which reads the file as what it should be, ends well.

    Args:
        file: a regular one.
        sums: sha256 by file name, as JSON.

    Raises:
        UserError: it is not what it was, or no regular file.
    """
    with open_regular(file) as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    _check_sum(file, found, sums)
    yield found
    with exclusive_lock(sums.with_suffix(".lock"), doing=f"writing {sums}"):
        known = _check_sum(file, found, sums)
        atomic_write_json(sums, {**known, file.name: found})


def _check_sum(file: Path, found: str, sums: Path) -> dict[str, str]:
    known = _held(sums)
    wanted = known.get(file.name, found)
    if wanted != found:
        raise UserError(
            f"{file}: sha256 is {found}, {sums} says {wanted}; remove the file and fetch it "
            f"again, or remove its line where the new one is right"
        )
    return known


def _held(sums: Path) -> dict[str, str]:
    remedy = f"restore it with 'git checkout {sums}', or remove it to write the sums anew"
    try:
        known = read_json(sums, remedy)
    except FileNotFoundError:
        return {}
    if not isinstance(known, dict) or not all(isinstance(sha256, str) for sha256 in known.values()):
        raise UserError(f"{sums}: is not a sha256 by file name; {remedy}")
    return known

"""Where shards lie: a folder or an S3 bucket, behind one small interface; and S3 to read from.

Keys name their content (they carry its sha256), so an object never changes once it is whole, two
writers of one key write the same bytes, and an object with other bytes is damaged.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.system.exits import ServerUnavailable
from vdvae.config import UserError, shown
from vdvae.files import atomic_write

_RANGE_BYTES = 2**20  # of a large object, asked for at once
_ATTEMPTS = 6
_PART_BYTES = 16 * 2**20
_PIECE_BYTES = 2**20


class ObjectMissing(UserError):
    """The store works but has nothing under this key."""


class Stored(NamedTuple):
    """An object as a list shows it."""

    key: str
    bytes: int
    modified: float  # when it was put last, Unix time in seconds


class Store(ABC):
    """Objects by key. Every failure is a UserError that names the store, the key and the remedy."""

    root: str  # the store's own URL, without a slash at its end

    @abstractmethod
    def put(self, key: str, data: bytes) -> None:
        """Stores an object, whole or not at all; replaces one whose bytes are others.

        One with the same bytes stays and becomes new: what removes old objects spares it.
        """

    @abstractmethod
    def get(self, key: str, limit: int | None = None) -> bytes:
        """The object's bytes, at most `limit` of them; ObjectMissing where there is none."""

    @abstractmethod
    def size(self, key: str) -> int | None:
        """How many bytes an object has; None where there is none."""

    def exists(self, key: str) -> bool:
        """Whether an object lies under this key."""
        return self.size(key) is not None

    @abstractmethod
    def list(self) -> Iterator[Stored]:
        """All objects, whoever put them there; none where the store does not exist yet."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Removes an object; one that is not there is none the less gone."""

    def url(self, key: str) -> str:
        """The object's full URL."""
        return f"{self.root}/{_checked(key)}"

    def _failure(self, doing: str, key: str, reason: object) -> UserError:
        return UserError(
            f"store {self.root}: cannot {doing} {key}: {reason}; "
            f"mend that, or set VDVAE_STORE to another store"
        )


def open_store(url: str) -> Store:
    """The store at `file:///absolute/path` (taken literally, no %-escapes) or `s3://bucket/prefix`.

    Raises:
        UserError: for any other URL. Nothing is touched before the first use.
    """
    scheme, separator, rest = url.partition("://")
    if separator and scheme == "file" and rest.startswith("/"):
        return FileStore(Path(rest))
    address = s3_address(url)
    if address:
        bucket, prefix = address
        return S3Store(bucket, _checked(prefix) if prefix else "")
    raise UserError(
        f"VDVAE_STORE: {shown_url(url)} is not file:///absolute/path or s3://bucket/prefix; "
        f"set it to one of these, or unset it for the folder store/"
    )


def s3_address(url: str) -> tuple[str, str] | None:
    """Bucket and prefix of `s3://bucket/prefix`, taken literally; None for any other URL.

    A prefix with parts that are empty, '.' or '..' is refused too: some servers resolve them.
    """
    found = re.fullmatch(r"s3://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])(/.*)?", url, re.DOTALL)
    if not found:
        return None
    prefix = (found[2] or "").strip("/")
    if prefix and {"", ".", ".."} & set(prefix.split("/")):
        return None
    return found[1], prefix


def one_line(text: str) -> str:
    """A name of unknown origin for a message: on one line, whatever it holds."""
    return text if text.isprintable() else ascii(text)


def shown_url(url: str) -> str:
    """What a person gave as a URL for a message, unless a secret may be in it."""
    if re.search("://.*[@?]", url, re.DOTALL):
        return "an address with a user name, a password or a query"
    return shown(url)


class FileStore(Store):
    """A folder, made at the first `put`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.root = f"file://{folder}"

    def put(self, key: str, data: bytes) -> None:
        path = self.folder / _checked(key)
        with self._errors("write", key):
            if not (path.is_file() and path.read_bytes() == data):
                atomic_write(path, data)
                return
            with contextlib.suppress(PermissionError):  # another user's, in a shared folder
                path.touch()

    def get(self, key: str, limit: int | None = None) -> bytes:
        path = self.folder / _checked(key)
        with self._errors("read", key), path.open("rb") as file:
            return file.read(-1 if limit is None else limit)

    def size(self, key: str) -> int | None:
        path = self.folder / _checked(key)
        with self._errors("read", key):
            return path.stat().st_size if path.is_file() else None

    def list(self) -> Iterator[Stored]:
        with self._errors("list", "the folder"):
            for folder, _, names in os.walk(self.folder):
                for path in (Path(folder, name) for name in names):
                    with contextlib.suppress(FileNotFoundError):  # removed in the meantime
                        status = path.lstat()
                        key = path.relative_to(self.folder).as_posix()
                        yield Stored(key, status.st_size, status.st_mtime)

    def delete(self, key: str) -> None:
        with self._errors("delete", key):
            (self.folder / _checked(key)).unlink(missing_ok=True)

    @contextlib.contextmanager
    def _errors(self, doing: str, key: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if doing == "read" and isinstance(error, FileNotFoundError):
                raise ObjectMissing(f"store {self.root}: has no {key}") from None
            raise self._failure(doing, key, error.strerror or error) from error


class S3Store(Store):
    """A prefix of a bucket; endpoint, region and credentials come from boto3's standard chain."""

    def __init__(self, bucket: str, prefix: str) -> None:
        self.bucket = bucket
        self.prefix = prefix
        self.root = f"s3://{bucket}/{prefix}".rstrip("/")

    def put(self, key: str, data: bytes) -> None:
        from botocore.exceptions import ClientError

        with self._errors("write", key) as client:
            if self._create(client, key, data):
                return
            place = self._place(key)
            if self._holds(key, data):  # over itself, which alone renews an object's date
                client.copy_object(**place, CopySource=place, MetadataDirective="REPLACE")
                return
            try:
                _upload(client, place, data)
            except ClientError:
                if not self._holds(key, data):  # its answer was lost, perhaps
                    raise

    def get(self, key: str, limit: int | None = None) -> bytes:
        with self._errors("read", key) as client:
            return _download(client, self._place(key), limit)

    def size(self, key: str) -> int | None:
        try:
            with self._errors("read", key) as client:
                size: int = client.head_object(**self._place(key))["ContentLength"]
        except ObjectMissing:
            return None
        return size

    def list(self) -> Iterator[Stored]:
        start = f"{self.prefix}/" if self.prefix else ""
        with self._errors("list", "the bucket") as client:
            yield from _listed(client, self.bucket, start)

    def delete(self, key: str) -> None:
        with self._errors("delete", key) as client:
            client.delete_object(**self._place(key))

    def _place(self, key: str) -> dict[str, str]:
        return {"Bucket": self.bucket, "Key": "/".join(filter(None, (self.prefix, _checked(key))))}

    def _holds(self, key: str, data: bytes) -> bool:
        try:
            return self.get(key, len(data) + 1) == data
        except ObjectMissing:
            return False

    def _create(self, client: Any, key: str, data: bytes) -> bool:
        from botocore.exceptions import ClientError

        try:
            _upload(client, self._place(key), data, IfNoneMatch="*")
        except ClientError as error:
            # 412: it is there already; 409: somebody is writing it at this moment; 501: the server
            # knows no conditions. NoSuchUpload: the last answer was lost, and asked for once more.
            status = error.response["ResponseMetadata"]["HTTPStatusCode"]
            if status not in (409, 412, 501) and error.response["Error"]["Code"] != "NoSuchUpload":
                raise
            return False
        return True

    def _errors(self, doing: str, key: str) -> contextlib.AbstractContextManager[Any]:
        def failure(code: str, reason: str) -> UserError:
            # A HEAD answer has no body and so no name of the error, only the number 404.
            if doing == "read" and code in ("NoSuchKey", "404"):
                return ObjectMissing(f"store {self.root}: has no {key}")
            return self._failure(doing, key, reason)

        return _s3(failure)


class S3Folder:
    """Objects below a prefix of anybody's bucket, to be read; '/' in a name makes a folder.

    Names are not trusted: they are asked for as they were listed, and lead to no local path.
    Every failure is a UserError that names the bucket, the reason and the remedy.
    """

    def __init__(self, bucket: str, prefix: str) -> None:
        self.bucket = bucket
        self.root = f"s3://{bucket}/{prefix}".rstrip("/")
        self._start = f"{prefix}/" if prefix else ""

    def list(self) -> Iterator[Stored]:
        """The objects below the prefix, without empty ones that only mark a folder."""
        with self._errors(one_line(self.root), "listed") as client:
            for stored in _listed(client, self.bucket, self._start):
                # The prefix itself may have a mark, whose name below it is empty.
                if stored.bytes or not f"{self._start}{stored.key}".endswith("/"):
                    yield stored

    def find(self, name: str) -> Stored | None:
        """One object by its name below the prefix; None where there is none."""
        with self._errors(one_line(f"{self.root}/{name}"), "read") as client:
            for stored in _listed(client, self.bucket, self._start + name):
                if not stored.key:  # which comes before longer names
                    return stored._replace(key=name)
                break
        return None

    def open(self, name: str) -> io.BufferedReader:
        """An object of any size, to be read from any place; blocks of it are asked for."""
        with self._errors(one_line(f"{self.root}/{name}"), "read") as client:
            answer = client.head_object(Bucket=self.bucket, Key=self._start + name)
        return io.BufferedReader(_Ranges(self, name, answer["ContentLength"]), _RANGE_BYTES)

    def read_range(self, name: str, start: int, count: int) -> bytes:
        """Some of an object's bytes, which must be there."""
        with self._errors(one_line(f"{self.root}/{name}"), "read") as client:
            place = {"Bucket": self.bucket, "Key": self._start + name}
            return _download(client, place, None, start, start + count)

    def read(self, name: str, limit: int) -> bytes | None:
        """An object's bytes; None where there are more than `limit`."""
        where = one_line(f"{self.root}/{name}")
        with self._errors(where, "read") as client:
            place = {"Bucket": self.bucket, "Key": self._start + name}
            data = _download(client, place, limit + 1)
        return data if len(data) <= limit else None

    def _errors(self, where: str, done: str) -> contextlib.AbstractContextManager[Any]:
        return _s3(
            lambda code, reason: UserError(
                f"{where}: cannot be {done}: {reason}; check its name, AWS_ENDPOINT_URL and this "
                f"machine's AWS credentials, then run the same command again"
            )
        )


class _Ranges(io.RawIOBase):
    """An object as a file."""

    def __init__(self, folder: S3Folder, name: str, size: int) -> None:
        self._folder, self._name, self._size, self._at = folder, name, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        from_where = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}
        self._at = from_where[whence] + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self._size - self._at))
        if count:
            data = self._folder.read_range(self._name, self._at, count)
            count = len(data)
            buffer[:count] = data
            self._at += count
        return count


def _download(
    client: Any, place: dict[str, str], limit: int | None, start: int = 0, end: int | None = None
) -> bytes:
    """An object's bytes from `start` to `end`, at most `limit`.

    Where the connection is cut it goes on from there: boto3 itself tries a request again, but not
    the body that follows.
    """
    from botocore.exceptions import HTTPClientError, IncompleteReadError

    def span(at: int) -> str:
        return f"bytes={at}-{'' if end is None else end - 1}"

    data = bytearray()
    resume = {} if end is None else {"Range": span(start)}
    useless = 0  # cuts in a row that brought nothing
    while True:
        before = len(data)
        answer = client.get_object(**place, **resume)
        whole = before + answer["ContentLength"]
        most = whole if limit is None else min(whole, limit)
        try:
            with contextlib.closing(answer["Body"]) as body:
                while piece := body.read(min(_PIECE_BYTES, most - len(data))):
                    data += piece
        except (HTTPClientError, IncompleteReadError):
            useless = 0 if len(data) > before else useless + 1
            if useless == _ATTEMPTS:
                raise
        if len(data) == most:
            return bytes(data)
        if data:  # the rest, of this version: that of another one would not belong to it
            resume = {"Range": span(start + len(data)), "IfMatch": answer["ETag"]}


def _upload(client: Any, place: dict[str, str], data: bytes, **condition: str) -> None:
    """Puts an object, in parts where it is large: what is cut then costs one part again."""
    if len(data) <= _PART_BYTES:
        client.put_object(**place, Body=data, **condition)
        return
    upload = {**place, "UploadId": client.create_multipart_upload(**place)["UploadId"]}
    try:
        parts = []
        for number, start in enumerate(range(0, len(data), _PART_BYTES), 1):
            body = data[start : start + _PART_BYTES]
            done = client.upload_part(**upload, PartNumber=number, Body=body)
            parts.append({"PartNumber": number, "ETag": done["ETag"]})
        client.complete_multipart_upload(**upload, MultipartUpload={"Parts": parts}, **condition)
    except BaseException:
        with contextlib.suppress(Exception):  # the first error is the one to tell
            client.abort_multipart_upload(**upload)
        raise


def _listed(client: Any, bucket: str, start: str) -> Iterator[Stored]:
    """Every object whose key begins with `start`, under what follows it."""
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=start):
        for entry in page.get("Contents", ()):
            key, modified = entry["Key"].removeprefix(start), entry["LastModified"]
            yield Stored(key, entry["Size"], modified.timestamp())


@contextlib.contextmanager
def _s3(failure: Callable[[str, str], UserError]) -> Iterator[Any]:
    # The client; its errors become those that `failure` makes of their code and reason.
    from botocore.exceptions import (
        BotoCoreError,
        ClientError,
        ConnectionError,
        HTTPClientError,
        IncompleteReadError,
    )

    try:
        yield _s3_client(os.getpid())
    except ClientError as error:
        code = error.response.get("Error", {}).get("Code", "")
        message = error.response.get("Error", {}).get("Message") or "no reason given"
        refusal = failure(code, one_line(f"{code} {message}".strip(".")))
        its_own = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 400) >= 500
        raise (ServerUnavailable(str(refusal)) if its_own else refusal) from error
    except BotoCoreError as error:
        # An endpoint may be written with a password.
        reason = re.sub(r"//[^/\s]*@", "//", str(error).strip("."))
        refusal = failure("", one_line(reason))
        cut = isinstance(error, (ConnectionError, HTTPClientError, IncompleteReadError))
        raise (ServerUnavailable(str(refusal)) if cut else refusal) from error


@functools.lru_cache(maxsize=1)
def _s3_client(pid: int) -> Any:
    # One a process: clients do not survive a fork, and a new process has a new number.
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    config = Config(
        connect_timeout=5,
        read_timeout=30,
        # Between them up to 1, 2, 4, 8, 16 seconds, by chance: a server may be starting again.
        retries={"mode": "standard", "total_max_attempts": _ATTEMPTS},
        # The default checksums break some S3 servers; the manifest's sha256 decides anyway.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    session = boto3.session.Session()
    try:
        return session.client("s3", config=config)
    except ValueError as error:
        if isinstance(error, BotoCoreError):
            raise
        raise UserError(
            "AWS_ENDPOINT_URL: is not http://host:port or https://host; set it to one of these, "
            "or unset it for Amazon's own"
        ) from None


def _checked(key: str) -> str:
    # Keys come from manifests, which are not trusted: none may lead out of the store.
    parts = key.split("/")
    if not all(re.fullmatch(r"[A-Za-z0-9_.-]+", part) and set(part) != {"."} for part in parts):
        raise UserError(
            f"store: the key {key!r} is not made of letters, digits, '_', '-' and '.' between "
            f"slashes; rename what it is made from"
        )
    return key

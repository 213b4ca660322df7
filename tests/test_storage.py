"""The two stores keep one contract; S3 is a real server."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from faulty_proxy import Faults, faulty_proxy
from s3_server import s3_server

from pipeline import storage
from pipeline.params import DataConfig
from pipeline.services.definitions import S3_PORTS, free_ports
from pipeline.shards import BlockCache, ShardReader, write_shards
from pipeline.sources import open_source
from pipeline.storage import ObjectMissing, Store, open_store, s3_address
from pipeline.system.exits import ServerUnavailable
from vdvae.config import UserError

KEY = "shards/digits/abc.tar"


@pytest.fixture(params=["file", "s3"])
def store(request, tmp_path) -> Store:
    if request.param == "file":
        return open_store(f"file://{tmp_path}/store")
    return open_store(request.getfixturevalue("s3_url"))


def digits(**options) -> DataConfig:
    return DataConfig(
        source="digits", image_size=8, channels=1, num_levels=17, validation=180, test=360,
        **options,
    )  # fmt: skip


def use(monkeypatch, environment: dict[str, str]) -> None:
    """Lets the next request go where the environment says."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    storage._s3_client.cache_clear()


@pytest.fixture
def faults(s3_url, s3, monkeypatch) -> Iterator[Faults]:
    """The S3 server behind a proxy that lets a tenth of everything fail."""
    monkeypatch.setattr(
        "botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0.01
    )
    with faulty_proxy(s3.endpoint, share=0.1) as running:
        use(monkeypatch, {"AWS_ENDPOINT_URL": running.endpoint})
        yield running


def test_what_was_put_comes_back(store):
    assert not store.exists(KEY)
    with pytest.raises(ObjectMissing, match=f"store {store.root}: has no {KEY}"):
        store.get(KEY)
    data = bytes(range(256)) * 1000
    store.put(KEY, data)
    assert store.exists(KEY) and store.size(KEY) == len(data) and store.size("none") is None
    assert store.get(KEY) == data
    assert store.get(KEY, limit=10) == data[:10]
    assert store.get(KEY, limit=len(data) + 1) == data
    assert store.url(KEY) == f"{store.root}/{KEY}"


def test_put_replaces_other_bytes_and_renews_the_same(store):
    store.put(KEY, b"one")
    if isinstance(store, storage.FileStore):
        os.utime(store.folder / KEY, (time.time() - 9,) * 2)
    [before] = store.list()
    time.sleep(1.1)  # S3 tells whole seconds
    store.put(KEY, b"one")
    [after] = store.list()
    assert after.modified > before.modified + 0.9  # or what removes old objects would take it
    assert store.get(KEY) == b"one"
    store.put(KEY, b"another")
    assert store.get(KEY) == b"another"


def test_a_list_holds_everything_until_it_is_deleted(store):
    assert list(store.list()) == []
    keys = {f"shards/digits/{number}.tar" for number in range(9)}
    for key in sorted(keys):
        store.put(key, b"data")
    listed = list(store.list())
    assert {stored.key for stored in listed} == keys
    assert {stored.bytes for stored in listed} == {4}
    assert all(abs(stored.modified - time.time()) < 600 for stored in listed)
    gone = keys - {"shards/digits/7.tar"}
    for key in [*gone, "never-there"]:
        store.delete(key)
    assert [stored.key for stored in store.list()] == ["shards/digits/7.tar"]
    assert not store.exists("shards/digits/8.tar") and store.exists("shards/digits/7.tar")


def test_a_neighbour_with_a_longer_name_is_not_listed(s3_url):
    near, far = open_store(s3_url), open_store(f"{s3_url}-neighbour")
    near.put("mine", b"1")
    far.put("theirs", b"2")
    assert [stored.key for stored in near.list()] == ["mine"]


@pytest.mark.parametrize("key", ["", "/etc/passwd", "../out", "a/../../b", "a//b", "a/./b", "a\nb"])
def test_no_key_leads_out_of_the_store(tmp_path, key):
    store = open_store(f"file://{tmp_path}/store")
    for use in (store.get, store.exists, store.url, store.delete, lambda key: store.put(key, b"")):
        with pytest.raises(UserError, match="store: the key"):
            use(key)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "url", ["", "store", "file://store", "http://x/y", "s3://", "s3://UP", "s3://me:pass@b/p"]
)
def test_other_urls_are_refused_without_showing_a_password(url):
    with pytest.raises(UserError, match=r"VDVAE_STORE: .*file:///absolute/path") as caught:
        open_store(url)
    assert "pass" not in str(caught.value).replace("password", "")


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match=rf"store file://{tmp_path}/file: cannot write {KEY}: .*; "):
        open_store(f"file://{tmp_path}/file").put(KEY, b"1")


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match="No space left on device; mend that, or set VDVAE_STORE"):
        open_store(f"file://{tmp_path}/store").put(KEY, b"1")
    assert not [path for path in Path(tmp_path).rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("variable", "value", "bucket", "reason"),
    [
        ("AWS_ENDPOINT_URL", "http://127.0.0.1:9", "bucket", "Could not connect"),
        ("AWS_SECRET_ACCESS_KEY", "wrong", "bucket", "SignatureDoesNotMatch"),
        ("AWS_DEFAULT_REGION", "us-east-1", "no-such-bucket", "NoSuchBucket"),
        ("AWS_ENDPOINT_URL", "http://me:pass@127.0.0.1:9", "bucket", "//127.0.0.1:9/bucket"),
    ],
)
def test_s3_says_why_it_fails(s3_url, monkeypatch, variable, value, bucket, reason):
    monkeypatch.setattr(storage, "_ATTEMPTS", 2)
    monkeypatch.setenv(variable, value)
    store = open_store(f"s3://{bucket}/prefix")
    for use, doing in (
        (lambda: store.put(KEY, b"1"), f"write {KEY}"),
        (lambda: store.get(KEY), f"read {KEY}"),
        (lambda: store.delete(KEY), f"delete {KEY}"),
        (lambda: list(store.list()), "list the bucket"),
    ):
        if (bucket, doing) == ("no-such-bucket", f"delete {KEY}"):
            continue  # SeaweedFS finds nothing to delete there, and says no more
        words = f"cannot {doing}: .*{reason}.*VDVAE_STORE"
        with pytest.raises(UserError, match=words) as caught:
            use()
        assert "pass" not in str(caught.value)
        may_come_back = "127.0.0.1:9" in value
        assert isinstance(caught.value, ServerUnavailable) == may_come_back


@pytest.mark.parametrize("endpoint", ["me:pass@host", "http://"])
def test_an_endpoint_that_is_none(s3_url, monkeypatch, endpoint):
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    with pytest.raises(UserError, match=r"^AWS_ENDPOINT_URL: is not http://host:port") as caught:
        open_store(s3_url).get(KEY)
    assert "pass" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("s3://bucket", ("bucket", "")),
        ("s3://bucket/", ("bucket", "")),
        ("s3://bucket/a b/ü%20/?#@/", ("bucket", "a b/ü%20/?#@")),
        ("s3://bucket/.a/..b", ("bucket", ".a/..b")),
        *((url, None) for url in ("s3://bucket/a/../b", "s3://bucket/a//b", "s3://bucket/./a")),
        *((url, None) for url in ("s3://", "s3:///a", "s3://UP", "s3://me@bucket", "file:///a")),
        ("s3://me:pass@bucket/a", None),
        ("s3://bucket\n", None),
    ],
)
def test_an_s3_address_is_taken_literally_or_not_at_all(url, address):
    assert s3_address(url) == address


def test_shards_in_s3_are_those_of_a_folder(s3_url, tmp_path):
    data = digits()
    scans = []
    none = BlockCache(folder=tmp_path / "none", limit_bytes=0)
    for url in (s3_url, f"file://{tmp_path}/store"):
        store, source = open_store(url), open_source("digits", data)
        manifest = write_shards("digits", data, source, store, tmp_path / "digits.json")
        reader = ShardReader(manifest, store, "validation", cache=none)
        scans.append((manifest, [*reader.scan(200)]))
    (one, [(keys, x_BCHW)]), (other, [(other_keys, other_x_BCHW)]) = scans
    assert one == other and keys == other_keys and x_BCHW.equal(other_x_BCHW)
    shard, there = one.splits["validation"].shards[0], open_store(s3_url)
    whole = there.get(shard.key)
    for damaged, words in (
        (whole[:600] + bytes([whole[600] ^ 1]) + whole[601:], "sha256 mismatch"),
        (whole[:-512], f"{len(whole) - 512} bytes instead of {len(whole)}"),
        (b"damaged", f"7 bytes instead of {len(whole)}"),
        (whole + bytes(512), "more bytes instead of"),
    ):
        there.put(shard.key, damaged)
        sentence = rf"shard {shard.name}: .*{words}.*run 'dvc repro -f -s shard@digits'"
        with pytest.raises(UserError, match=sentence):
            next(ShardReader(one, there, "validation", cache=none).scan(1))


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(storage, "_PART_BYTES", 5 * 2**20)  # S3's own least


def test_two_writers_of_a_large_object_do_not_clobber_each_other(s3_url, small_parts):
    store = open_store(s3_url)
    data = os.urandom(11 * 2**20)
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda _: store.put(KEY, data), range(4)))
    assert store.get(KEY) == data
    assert store.get(KEY, limit=2**20 + 1) == data[: 2**20 + 1]
    assert [stored.bytes for stored in store.list()] == [len(data)]
    other = os.urandom(11 * 2**20)
    store.put(KEY, other)
    assert store.get(KEY) == other
    client = storage._s3_client(os.getpid())
    assert not client.list_multipart_uploads(Bucket="bucket").get("Uploads")


@pytest.mark.parametrize(
    ("status", "code", "done"),
    [
        (404, "NoSuchUpload", True),  # the answer was lost, and boto3 asked once more
        (404, "NoSuchUpload", False),
        (409, "ConditionalRequestConflict", False),  # the other writer gave up
        (501, "NotImplemented", False),
    ],
)
@pytest.mark.parametrize("size", [100, 6 * 2**20])
def test_a_put_that_did_not_create_looks_at_what_is_there(
    s3_url, small_parts, monkeypatch, status, code, done, size
):
    from botocore.exceptions import ClientError

    client = storage._s3_client(os.getpid())
    data = os.urandom(size)
    last = "put_object" if size < 2**20 else "complete_multipart_upload"
    real = getattr(client, last)

    def answer(**request):
        conditional = request.pop("IfNoneMatch", None)
        if done or not conditional:
            real(**request)
        if not conditional and code != "NoSuchUpload":
            return
        response = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
        raise ClientError(response, last)

    monkeypatch.setattr(client, last, answer)
    store = open_store(s3_url)
    store.delete(KEY)  # of the parameters before, whose store it is too
    store.put(KEY, data)
    assert store.get(KEY) == data


def test_requests_that_fail_and_bodies_that_are_cut_lose_nothing(s3_url, faults, small_parts):
    data = [os.urandom(size) for size in (100, 2**20, 7 * 2**20)]
    store = open_store(s3_url)
    for number, content in enumerate(data * 3):
        store.put(f"{KEY}.{number}", content)
    for number, content in enumerate(data * 3):
        assert store.get(f"{KEY}.{number}") == content
    uncut = faults.counts["cut"]
    address = s3_address(s3_url)
    assert address
    with storage.S3Folder(*address).open(f"{KEY}.2") as file:  # in parts, as raw tars are read
        assert file.read(3) == data[2][:3]
        file.seek(2**20 + 1)
        assert file.read() == data[2][2**20 + 1 :]
    assert faults.counts["cut"] > uncut
    assert faults.counts["failed"] >= 3 and faults.counts["cut"] >= 3, faults.counts


def test_shards_are_written_and_read_through_faults(s3_url, faults, tmp_path):
    data = digits(shard_images=40)
    source, plain = open_source("digits", data), open_store(f"file://{tmp_path}/store")
    expected = write_shards("digits", data, source, plain, tmp_path / "digits.json")
    cache = BlockCache(folder=tmp_path / "cache", limit_bytes=2**30)
    store = open_store(s3_url)
    manifest = write_shards("digits", data, source, store, tmp_path / "digits.json")
    reader = ShardReader(manifest, store, "train", cache=cache, workers=1)
    read = torch.cat([x_BCHW for _, x_BCHW in reader.scan(200)])
    assert faults.counts["failed"] >= 3, faults.counts
    assert manifest == expected
    none = BlockCache(folder=tmp_path / "none", limit_bytes=0)
    [(_, x_BCHW)] = ShardReader(expected, plain, "train", cache=none, workers=0).scan(1257)
    assert read.equal(x_BCHW)


class Outage:
    """A server that is killed at a moment of the test's choice, and started again once a request
    has failed and waits for its next try."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.ports = folder, free_ports(len(S3_PORTS))
        self._failed, self._up = threading.Event(), threading.Event()
        self._up.set()
        monkeypatch.setattr(
            "botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: self._wait()
        )
        self._running = contextlib.ExitStack()
        use(monkeypatch, self._running.enter_context(s3_server(folder, self.ports)).environment())

    def _wait(self) -> float:
        self._failed.set()
        assert self._up.wait(60)
        return 0

    def kill(self) -> None:
        self._up.clear()
        self._running.close()  # SIGKILL

    def start_again(self) -> None:
        assert self._failed.wait(60)
        self._running.enter_context(s3_server(self.folder, self.ports))
        self._up.set()

    def end(self) -> None:
        self._running.close()
        storage._s3_client.cache_clear()


@pytest.fixture
def outage(tmp_path, monkeypatch):
    (tmp_path / "s3").mkdir()
    made = Outage(tmp_path / "s3", monkeypatch)
    yield made
    made.end()


def test_a_server_that_is_killed_and_starts_again_costs_time_alone(tmp_path, outage):
    data = digits(shard_images=100)
    source, plain = open_source("digits", data), open_store(f"file://{tmp_path}/store")
    expected = write_shards("digits", data, source, plain, tmp_path / "digits.json")
    store, killed = open_store("s3://bucket/again"), threading.Event()

    def kill(images: int) -> None:
        if images > 200 and not killed.is_set():
            outage.kill()
            killed.set()

    with ThreadPoolExecutor(1) as threads:
        writing = threads.submit(
            write_shards, "digits", data, source, store, tmp_path / "digits.json", kill
        )
        assert killed.wait(60)
        outage.start_again()
        assert writing.result() == expected

        keys = [shard.key for split in expected.splits.values() for shard in split.shards]
        reading = threads.submit(lambda: all(store.get(key) == plain.get(key) for key in keys * 9))
        outage._failed.clear()
        outage.kill()
        outage.start_again()
        assert reading.result()

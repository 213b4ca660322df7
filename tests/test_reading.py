"""Reading fast and through faults: the cache of decoded shards, workers, and an S3 that fails."""

from __future__ import annotations

import itertools
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from test_shards import CUTS, Counting, config, write

from pipeline.shards import BlockCache, Manifest, ShardReader
from pipeline.shards.reader import _Reading, _with_following
from pipeline.shards.workers import Blocks
from pipeline.storage import FileStore
from vdvae.config import UserError


@pytest.fixture
def made(tmp_path) -> tuple[Manifest, Counting]:
    return write(tmp_path, config())


def cache_in(folder: Path, limit_bytes: int = 2**30) -> BlockCache:
    return BlockCache(folder=folder / "cache", limit_bytes=limit_bytes)


def images(manifest, store, **how) -> torch.Tensor:
    return torch.cat([x for _, x in ShardReader(manifest, store, "train", **how).scan(4)])


def blocks(cache: BlockCache) -> list[Path]:
    return sorted(cache.folder.glob("*.block"))


@pytest.mark.parametrize("part", [0, 0.5, 0.8, 0.9, 0.999])  # pixels, sums, keys, the last sum
@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_a_damaged_block_is_made_again_and_told_of(made, tmp_path, capfd, damage, part):
    manifest, store = made
    cache = cache_in(tmp_path)
    expected = images(manifest, store, cache=cache)
    path = blocks(cache)[2]
    whole = path.read_bytes()
    changed, place = bytearray(whole), int(part * len(whole))
    changed[place] ^= 1
    path.write_bytes(changed if damage == "flip" else whole[:place])
    assert images(manifest, store, cache=cache).equal(expected)
    assert f"{path}: is damaged" in capfd.readouterr().err
    assert path.read_bytes() == whole


@pytest.mark.parametrize(("call", "gives"), [("preadv", 0), ("pread", b"")])  # images, the index
def test_a_disk_that_keeps_nothing_right_ends_it(made, tmp_path, monkeypatch, call, gives):
    manifest, store = made
    monkeypatch.setattr(f"pipeline.shards.cache.os.{call}", lambda *_: gives)
    with pytest.raises(UserError, match=r"cache: what was just written .* set VDVAE_CACHE to"):
        images(manifest, store, cache=cache_in(tmp_path))


def test_what_was_reserved_on_disk_is_kept_until_it_is_written(tmp_path):
    cache, sizes = cache_in(tmp_path), []
    pixels = np.zeros((2, 3, 6, 6), np.uint8)

    def decode():
        for key, x_CHW in zip(["x", "y"], pixels, strict=True):
            sizes.append((cache.folder / "a.tmp").stat().st_size)
            yield key, x_CHW

    assert cache.add("a", 2, pixels.size, decode)
    assert len(sizes) == 2 and min(sizes) >= pixels.size
    block = cache.open("a", pixels.shape)
    assert block and block.keys_N == ["x", "y"]


def test_each_process_has_a_shard_to_go_on_with_while_a_window_is_read():
    windows = [(0,), (1, 2), (3,), (4,)]
    runs = [(window, np.arange(3)) for window in windows]
    following = [part.following for part in _with_following(iter(runs), 2)]
    assert following == [(1, 2), (3, 4), (4,), ()]
    assert [part.window for part in _with_following(iter(runs), 1)] == windows


def test_a_shard_that_could_not_be_read_ahead_is_asked_for_again(made, tmp_path):
    manifest, counting = made
    store = FileStore(counting.folder)
    path = store.folder / manifest.splits["train"].shards[1].key
    path.rename(tmp_path / "away")
    reader = ShardReader(manifest, store, "train", cache=cache_in(tmp_path), workers=1)
    reading = _Reading(reader, True, 0)
    try:
        for _ in range(3):
            reading._enter((0,), (1,))
            assert isinstance(reading._held[1].exception(timeout=60), UserError)
            assert len(decoders()) == 1  # which goes on after what it refused
        (tmp_path / "away").rename(path)
        reading._enter((1,), ())
        assert len(reading._block(1).keys_N) == 4
    finally:
        reading.close()


def test_however_many_shards_a_split_has_they_are_begun_ahead(tmp_path, monkeypatch):
    manifest, store = write(tmp_path, config(shard_images=1), {**CUTS, "train": 300})
    begun, block = [], _Reading._block

    def watched(reading, number):
        begun.append(number in reading._held)
        return block(reading, number)

    monkeypatch.setattr(_Reading, "_block", watched)
    found = images(manifest, FileStore(store.folder), cache=cache_in(tmp_path), workers=2)
    assert len(found) == len(begun) == 300 and all(begun)
    assert found.equal(images(manifest, store, workers=0))


def test_of_windows_of_very_many_shards_few_are_open(tmp_path, monkeypatch):
    manifest, store = write(tmp_path, config(shard_images=1), {**CUTS, "train": 60})
    monkeypatch.setattr("pipeline.shards.reader._OPEN_BLOCKS", 8)
    enter, held = _Reading._enter, []

    def watched(reading, window, following):
        held.append(len(reading._held))
        enter(reading, window, following)

    monkeypatch.setattr(_Reading, "_enter", watched)
    how = {"cache": cache_in(tmp_path), "window_bytes": 30 * (6 * 6 * 3 + 128)}
    there = FileStore(store.folder)
    found = [
        list(
            itertools.islice(
                ShardReader(manifest, there, "train", workers=n, **how).batches(5, 0), 60
            )
        )
        for n in (2, 0)
    ]
    assert all(map(torch.equal, *found))
    assert len(held) > 15 and max(held) <= 8 + 1  # one more where none is made yet


def test_without_a_cache_nothing_is_fetched_in_vain(made, tmp_path, monkeypatch):
    manifest, store = made
    asked, make = [], Blocks.make

    def watched(blocks, shard, keep=True):
        asked.append(shard.name)
        return make(blocks, shard, keep)

    monkeypatch.setattr(Blocks, "make", watched)
    how = {"cache": cache_in(tmp_path, 0), "window_bytes": 8 * (6 * 6 * 3 + 128), "workers": 1}
    assert len(list(ShardReader(manifest, FileStore(store.folder), "train", **how).scan(23))) == 1
    assert sorted(asked) == [shard.name for shard in manifest.splits["train"].shards]


def test_without_a_cache_only_the_window_is_held_in_memory(made, tmp_path, monkeypatch):
    manifest, store = made
    enter, held = _Reading._enter, []

    def watched(reading, window, following):
        enter(reading, window, following)
        done = {number for number, block in reading._held.items() if block.done()}
        held.append({number for number in done if reading._held[number].result()} - {*window})

    monkeypatch.setattr(_Reading, "_enter", watched)
    reader = ShardReader(
        *(manifest, FileStore(store.folder), "train"),
        window_bytes=8 * (6 * 6 * 3 + 128),
        cache=cache_in(tmp_path, 0),
        workers=3,
    )
    stream = reader.batches(4, seed=0)
    for _ in range(4 * reader.images // 4):
        next(stream)
    stream.close()
    assert len(held) > 8 and not any(held)


def test_a_window_of_many_shards_is_made_at_once(made):
    manifest, store = made
    train = manifest.splits["train"]
    many = train.model_copy(update={"shards": train.shards[:1] * 20_000, "images": 80_000})
    splits = {**manifest.splits, "train": many}
    reader = ShardReader(manifest.model_copy(update={"splits": splits}), store, "train")
    looks = itertools.count()

    class Looked(tuple):
        def __getitem__(self, number):
            next(looks)
            return super().__getitem__(number)

    reader._shards = Looked(reader._shards)
    assert len(list(reader._windows(range(20_000)))) == 1
    assert next(looks) == 20_000  # each once: not the whole window again for each


def test_room_is_made_by_age_but_never_of_what_is_in_use(made, tmp_path):
    manifest, store = made
    images(manifest, store, cache=cache_in(tmp_path))
    cache = cache_in(tmp_path, limit_bytes=3 * 4096)  # blocks take a page each
    [held] = [path for path in blocks(cache) if path.name.startswith(first(manifest).sha256)]
    for path in set(blocks(cache)) - {held}:
        path.unlink()
    (cache.folder / "left-by-a-kill.tmp").write_bytes(bytes(4096))
    holding = cache.open(held.stem, (4, 3, 6, 6))
    os.utime(held, (0, 0))
    list(ShardReader(manifest, store, "train", window_bytes=1, cache=cache).scan(4))
    assert len(blocks(cache)) == 3 and held in blocks(cache)
    assert not list(cache.folder.glob("*.tmp"))
    del holding
    images(manifest, store, cache=cache)
    assert sum(size for _, size, _ in cache.files()) <= cache.limit_bytes


def first(manifest: Manifest):
    return manifest.splits["train"].shards[0]


def test_a_full_disk_costs_speed_alone(made, tmp_path, monkeypatch):
    manifest, store = made
    cache = cache_in(tmp_path)
    expected = images(manifest, store, cache=cache_in(tmp_path / "other"))
    monkeypatch.setattr(BlockCache, "_disk_has", lambda self, size: False)
    assert images(manifest, store, cache=cache).equal(expected)
    assert not blocks(cache)


def test_a_cache_that_cannot_be_written_is_named(made):
    manifest, store = made
    cache = BlockCache(folder=Path("/proc/nowhere"), limit_bytes=2**30)
    with pytest.raises(UserError, match=r"/proc/nowhere: decoded shards cannot be kept .*GIB=0"):
        images(manifest, store, cache=cache)


@pytest.mark.parametrize(("name", "value"), [("VDVAE_CACHE_GIB", "x"), ("VDVAE_CACHE_GIB", "-1")])
def test_a_bad_setting_is_named(made, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"^{name}: '{value}' is not a number from 0 to"):
        ShardReader(*made, "train")


PROCESS = """
import sys
from pathlib import Path
from pipeline.shards import BlockCache, Manifest, ShardReader
from pipeline.storage import FileStore
folder = Path(sys.argv[1])
cache = BlockCache(folder=folder / "cache", limit_bytes=2**30)
manifest, store = Manifest.load(folder / "m" / "r.json"), FileStore(folder / "store")
reader = ShardReader(manifest, store, "train", cache=cache, workers=1)
print("begins", flush=True)
sys.stdin.readline()
print(sum(int(x.sum()) for _, x in reader.scan(4)), flush=True)
"""


def test_processes_and_workers_share_one_cache(tmp_path):
    manifest, store = write(tmp_path, config(), {"train": 400, "validation": 5, "test": 4})
    expected = int(images(manifest, store, cache=cache_in(tmp_path / "other")).sum())
    children = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(tmp_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        for _ in range(2)
    ]
    for child in children:
        assert child.stdout.readline() == "begins\n"
    found = [child.communicate("\n", timeout=60)[0] for child in children]
    assert found == [f"{expected}\n"] * 2
    assert len(blocks(cache_in(tmp_path))) == 100
    assert not list(cache_in(tmp_path).folder.glob("*.tmp"))


def decoders() -> set[int]:
    """Processes that decode for this one."""
    command = ["pgrep", "-P", str(os.getpid()), "-f", "shards.workers import serve"]
    return set(map(int, subprocess.run(command, capture_output=True, text=True).stdout.split()))


def test_workers_raise_what_went_wrong_and_end_with_the_pass(made, tmp_path):
    manifest, counting = made
    store = FileStore(counting.folder)
    (store.folder / manifest.splits["train"].shards[4].key).unlink()
    reader = ShardReader(manifest, store, "train", cache=cache_in(tmp_path), workers=2)
    with pytest.raises(UserError, match=r"shard r-train-000004.tar: not found at"):
        list(reader.scan(4))
    assert not decoders()

    write(tmp_path, config())
    threads = threading.active_count()
    reader = ShardReader(manifest, store, "train", cache=cache_in(tmp_path / "other"), workers=2)
    stream = reader.batches(4, seed=0)
    next(stream)
    assert len(decoders()) == 2
    stream.close()
    assert not decoders()
    while threading.active_count() > threads:  # one learns of its process's end a moment later
        time.sleep(0.01)

    reader = ShardReader(manifest, store, "train", cache=cache_in(tmp_path / "third"), workers=1)
    stream = reader.batches(4, seed=0, start=0)
    killer = threading.Thread(target=kill_the_first_decoder)
    killer.start()
    with pytest.raises(UserError, match=r"the process that decodes it ended with -9"):
        list(itertools.islice(stream, 10))
    killer.join()


def kill_the_first_decoder() -> None:
    while not (found := decoders()):
        time.sleep(0.01)
    os.kill(found.pop(), signal.SIGKILL)


@pytest.mark.parametrize("number", range(3))
def test_stopped_anywhere_and_gone_on_with_on_other_ranks_and_workers(made, tmp_path, number):
    """Every image of the epoch once; benchmarks/reading.py does this 30 times."""
    manifest, counting = made
    store, choose = FileStore(counting.folder), random.Random(number)
    cache = cache_in(tmp_path, [0, 3 * 4096, 2**30][number])
    n, batch_size = CUTS["train"], 6
    names = [image.numpy().tobytes() for image in images(manifest, store, cache=cache)]
    seen: list[int] = []
    while len(seen) < 4 * n:
        ranks, workers = choose.choice([1, 2, 3]), choose.choice([0, 2]) if number == 2 else 0
        streams = [
            ShardReader(
                manifest, store, "train", window_bytes=2000, cache=cache, workers=workers
            ).batches(batch_size, 7, len(seen), rank, ranks)
            for rank in range(ranks)
        ]
        for batch in itertools.islice(zip(*streams, strict=True), choose.randint(1, 6)):
            seen += [names.index(image.numpy().tobytes()) for image in torch.cat(batch)]
    for epoch in range(4):
        assert sorted(seen[epoch * n : (epoch + 1) * n]) == list(range(n))

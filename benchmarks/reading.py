"""Times reading shards against a plain WebDataset pipeline on the same tars, and keeps the rows.

    python benchmarks/reading.py rate [--store s3://bucket/prefix] [--images 20000] [--size 32]
                                      [--rounds 3]
    python benchmarks/reading.py memory
    python benchmarks/reading.py exact

`rate`: images/s of batches of 256 in random order: WebDataset (tars, Pillow, its own shuffle
buffer, stacked by NumPy) in one process and with 2 loader workers, ours while the cache is being
built by 1 and 2 processes, from the cache, and without one (VDVAE_CACHE_GIB=0). All read the same
tars, one after the other; medians of some rounds.

`memory`: the greatest resident memory of a process that reads 2,000 and 200,000 images of 32x32.

`exact`: 30 runs of two epochs, each stopped at random points and gone on with on other ranks and
workers; counts those in which every image came exactly once an epoch.
"""

from __future__ import annotations

import argparse
import itertools
import mmap
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from rows import keep
from sharding import make

from pipeline.shards import BlockCache, Manifest, ShardReader, write_shards
from pipeline.sources import open_source
from pipeline.storage import FileStore, Store, open_store

BATCH = 256


def made(folder: Path, store: Store, images: int, size: int) -> Manifest:
    """Shards of about so many made images, most of them in train."""
    raw = folder / "raw"
    raw.mkdir()
    data = make(raw, images, size)
    return write_shards("made", data, open_source("made", data), store, folder / "made.json")


def plain(paths: list[str], workers: int, s3: bool, batch: int = BATCH) -> Iterable[torch.Tensor]:
    """Batches as WebDataset's own documentation makes them."""
    import webdataset

    if s3:
        from webdataset.gopen import gopen_schemes

        from pipeline import storage

        def opened(url: str, *_: object, **__: object) -> object:
            bucket, key = url.removeprefix("s3://").split("/", 1)
            client = storage._s3_client(os.getpid())
            return client.get_object(Bucket=bucket, Key=key)["Body"]

        gopen_schemes["s3"] = opened
    dataset = (
        webdataset.WebDataset(paths, shardshuffle=100)
        .shuffle(1000)
        .decode("rgb8")
        .to_tuple("png")
        .map(lambda sample: sample[0].transpose(2, 0, 1))
        .batched(batch, collation_fn=lambda images: torch.from_numpy(np.stack(images)))
    )
    loader: Iterable[torch.Tensor] = webdataset.WebLoader(
        dataset, batch_size=None, num_workers=workers
    )
    return loader


def per_second(batches: Iterable[torch.Tensor], images: int, size: int) -> float:
    """Images a second from before the first batch until so many are there."""
    # A virtual machine's memory may come from its host page by page, at ten times what it costs to
    # write one: whoever is measured finds what it will use.
    np.empty(3 * images * size**2, np.uint8)[:: mmap.PAGESIZE] = 1
    began, seen = time.perf_counter(), 0
    for x_BCHW in batches:
        seen += len(x_BCHW)
        if seen >= images:
            break
    return seen / (time.perf_counter() - began)


def rate(url: str | None, images: int, size: int, rounds: int) -> None:
    """One row of medians: all on the same tars, in turn."""
    with tempfile.TemporaryDirectory() as folder:
        store = open_store(url or f"file://{folder}/store")
        manifest = made(Path(folder), store, images, size)
        shards = manifest.splits["train"].shards
        images = manifest.splits["train"].images // BATCH * BATCH
        paths = [store.url(shard.key).removeprefix("file://") for shard in shards]
        found: defaultdict[str, list[float]] = defaultdict(list)
        for number in range(rounds):
            for workers in (0, 2):
                batches = plain(paths, workers, url is not None)
                found[f"webdataset_{workers}"].append(per_second(batches, images, size))
            for workers in (1, 2):
                cache = BlockCache(
                    folder=Path(folder) / f"cache{number}{workers}", limit_bytes=2**40
                )
                none = BlockCache(folder=Path(folder) / "none", limit_bytes=0)
                for state, used in (("cold", cache), ("cached", cache), ("uncached", none)):
                    reader = ShardReader(manifest, store, "train", cache=used, workers=workers)
                    ours = reader.batches(BATCH, seed=0)
                    found[f"ours_{state}_{workers}"].append(per_second(ours, images, size))
                    ours.close()
        seek = ShardReader(manifest, store, "train", cache=cache).batches(BATCH, 0, images // 2)
        began = time.perf_counter()
        next(seek)
        seek_ms = 1e3 * (time.perf_counter() - began)
    median = {name: statistics.median(rates) for name, rates in found.items()}
    keep(
        "reading",
        store="s3" if url else "file",
        images=images,
        size=size,
        **{name: f"{value:.0f}" for name, value in median.items()},
        cached_over_best_webdataset=(
            f"{median['ours_cached_1'] / max(median['webdataset_0'], median['webdataset_2']):.1f}"
        ),
        cache_build_s=f"{images / median['ours_cold_1']:.1f}",
        seek_ms=f"{seek_ms:.1f}",
        rounds=rounds,
    )


_CHILD = """
import resource, sys
from pathlib import Path
from pipeline.shards import BlockCache, Manifest, ShardReader
from pipeline.storage import FileStore
folder = Path(sys.argv[1])
manifest = Manifest.load(folder / "made.json")
cache = BlockCache(folder=folder / "cache", limit_bytes=2**40)
reader = ShardReader(manifest, FileStore(folder / "store"), "train", cache=cache, workers=1)
seen = 0
for x in reader.batches(256, seed=0):
    seen += len(x)
    if seen >= max(reader.images, 20_000):
        break
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def memory() -> None:
    """One row: peak MiB of a process, its decoding one not counted, cold and then cached."""
    found = {}
    for images in (2_000, 200_000):
        with tempfile.TemporaryDirectory() as folder:
            made(Path(folder), FileStore(Path(folder) / "store"), images, 32)
            for state in ("cold", "cached"):
                words = [sys.executable, "-c", _CHILD, folder]
                done = subprocess.run(words, capture_output=True, text=True, check=True)
                found[f"{state}_{images}_mib"] = int(done.stdout)
    keep("reading_memory", **found)


def exact(runs: int = 30) -> None:
    """One row: how many of the runs saw each image exactly once an epoch."""
    right = stops = 0
    with tempfile.TemporaryDirectory() as folder:
        store = FileStore(Path(folder) / "store")
        manifest = made(Path(folder), store, 3000, 8)
        n = manifest.splits["train"].images
        whole = ShardReader(manifest, store, "train", cache=BlockCache(
            folder=Path(folder) / "whole", limit_bytes=2**40))  # fmt: skip
        names = {x.numpy().tobytes(): key for keys, x_BCHW in whole.scan(100) for key, x in
                 zip(keys, x_BCHW, strict=True)}  # fmt: skip
        for run in range(runs):
            choose = random.Random(run)
            seen: list[str] = []
            while len(seen) < 2 * n:
                ranks, workers = choose.choice([1, 2, 3]), choose.choice([0, 1, 2, 3])
                limit = 2**40 if workers else choose.choice([0, 2**18])
                place = Path(folder) / f"cache{run % 3}-{limit}"
                cache = BlockCache(folder=place, limit_bytes=limit)
                streams = [
                    ShardReader(manifest, store, "train", 200_000, cache, workers).batches(
                        60, run, len(seen), rank, ranks
                    )
                    for rank in range(ranks)
                ]
                steps = choose.randint(1, 100)
                for parts in itertools.islice(zip(*streams, strict=True), steps):
                    seen += [names[x.numpy().tobytes()] for x in torch.cat(parts)]
                for stream in streams:
                    stream.close()
                stops += 1
            right += len(set(seen[:n])) == n and len(set(seen[n : 2 * n])) == n
    keep("reading_exact", runs=runs, stops=stops, each_image_once=right)


def main() -> None:
    """Measures what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["rate", "memory", "exact"])
    parser.add_argument("--store", help="s3://bucket/prefix; default: a folder")
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    words = parser.parse_args()
    torch.set_num_threads(1)
    if words.what == "rate":
        rate(words.store, words.images, words.size, words.rounds)
    else:
        {"memory": memory, "exact": exact}[words.what]()


if __name__ == "__main__":
    main()

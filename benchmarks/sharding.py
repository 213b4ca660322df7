"""Times the stage `shard` on made image files and keeps the rows: rate and peak memory.

    python benchmarks/sharding.py --images 200000 --size 32 --workers 1 2
    python benchmarks/sharding.py --images 1000 --size 256 --files jpeg

32 and 64 go through the source `imagenet` (tars of PNGs), others through `folder`. The images are
smooth noise, whose PNGs are as large as photographs'. PNGs compressed in haste (`png-fast`) and
JPEGs are encoded anew, others (`png`, as most programs write them) are handed through. Every
measurement is in a Python of its own; the raw files are made once, before any of them.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rows import keep

from pipeline.params import DataConfig
from pipeline.shards import write_shards
from pipeline.shards.jobs import open_workers
from pipeline.sources import open_source
from pipeline.storage import FileStore

FILES: dict[str, dict[str, Any]] = {
    "png": {"format": "PNG"},
    "png-fast": {"format": "PNG", "compress_level": 1},
    "jpeg": {"format": "JPEG", "quality": 95},
}
TEST_SHARE = 25  # one of so many images is in the test tar
FULL = 1_281_149 + 49_999  # the paper's ImageNet-32


def make(folder: Path, images: int, size: int, files: str = "png") -> DataConfig:
    """Raw data in `folder`, and the settings that read them."""
    random = np.random.RandomState(0)
    noise = Image.fromarray(random.randint(0, 256, (2048, 2048, 3)).astype(np.uint8))
    smooth = np.asarray(noise.resize((512, 512), Image.Resampling.BOX).resize((4096, 4096)))

    def image() -> bytes:
        top, left = random.randint(0, 4096 - size, 2)
        grain = random.randint(0, 8, (size, size, 3)).astype(np.uint8)
        out = io.BytesIO()
        picture = Image.fromarray((smooth[top : top + size, left : left + size] & 0xF8) | grain)
        picture.save(out, **FILES[files])
        return out.getvalue()

    if size not in (32, 64):
        for number in range(images):
            (folder / f"{number:07d}.{files.partition('-')[0]}").write_bytes(image())
        return DataConfig(source="folder", path=str(folder), image_size=size)
    for part, count in (("train", images - images // TEST_SHARE), ("valid", images // TEST_SHARE)):
        with tarfile.open(folder / f"{part}_{size}x{size}.tar", "w") as tar:
            for number in range(count):
                data = image()
                member = tarfile.TarInfo(f"{part}/{number:07d}.png")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    validation = images // TEST_SHARE
    return DataConfig(source="imagenet", path=str(folder), image_size=size, validation=validation)


def measure(data: DataConfig) -> dict[str, float]:
    """Seconds, and the most memory of this process and of any worker, MiB."""
    peak = 0
    ended = threading.Event()

    def watch() -> None:
        nonlocal peak
        children = Path(f"/proc/self/task/{os.getpid()}/children")
        while not ended.wait(0.2):
            peak = max([peak, *(_peak_kib(pid) for pid in children.read_text().split())])

    with tempfile.TemporaryDirectory() as temporary:
        store = FileStore(Path(temporary) / "store")
        began = time.monotonic()
        with open_workers() as workers:
            watcher = threading.Thread(target=watch)
            watcher.start()
            manifest = write_shards(
                "bench",
                data,
                open_source("bench", data),
                store,
                Path(temporary) / "bench.json",
                workers=workers,
                runs=Path(temporary) / "runs",
            )
            ended.set()
            watcher.join()
        seconds = time.monotonic() - began
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    return {
        "seconds": round(seconds, 1),
        "png_bytes": round(sum(shard.bytes for shard in shards) / sum(s.images for s in shards)),
        "stage_peak_mib": round(_peak_kib("self") / 1024),
        "worker_peak_mib": round(peak / 1024),
    }


def _peak_kib(pid: str) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:  # it has ended
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)


def main() -> None:
    """Makes the images, measures, prints and appends a row for each number of workers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, required=True)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--files", choices=FILES, default="png")
    parser.add_argument("--workers", nargs="+", default=["1", "2"])
    words = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = make(Path(folder), words.images, words.size, words.files)
        for workers in words.workers:
            code = "import json, sys; from sharding import *; "
            code += "print(json.dumps(measure(DataConfig(**json.loads(sys.argv[1])))))"
            load = os.getloadavg()[0]
            done = subprocess.run(
                [sys.executable, "-c", code, json.dumps(data.to_dict())],
                env={
                    **os.environ,
                    "VDVAE_SHARD_WORKERS": workers,
                    "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path[1:]]),
                },
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            figures = json.loads(done.stdout)
            rate = words.images / figures["seconds"]
            keep(
                "sharding",
                images=words.images,
                size=words.size,
                source=data.source,
                files=words.files,
                workers=workers,
                images_per_second=round(rate),
                minutes_for_imagenet32=round(FULL / rate / 60, 1) if words.size == 32 else "",
                **figures,
                load_before=round(load, 1),
            )


if __name__ == "__main__":
    main()

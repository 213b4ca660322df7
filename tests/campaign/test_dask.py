"""Sharding on a Dask cluster: the same jobs, the same bytes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.params import DataConfig
from pipeline.services.definitions import free_ports
from pipeline.shards import Manifest, jobs, write_shards
from pipeline.shards.jobs import open_workers
from pipeline.sources import open_source
from pipeline.storage import FileStore
from vdvae.config import UserError

distributed = pytest.importorskip("distributed")
pytestmark = pytest.mark.integration


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """A scheduler and two workers, each a process, on ports of their own."""
    # Each with a Python of its own, which must find this checkout.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[1]), *_paths()]))
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, dashboard_address=None, host="127.0.0.1"
    ) as running:
        monkeypatch.setenv("VDVAE_DASK", running.scheduler_address)
        yield running


def _paths() -> list[str]:
    return os.environ.get("PYTHONPATH", "").split(os.pathsep)


def write(folder: Path, data: DataConfig) -> Manifest:
    with open_workers() as workers:
        return write_shards(
            "r",
            data,
            open_source("r", data),
            FileStore(folder / "store"),
            folder / "r.json",
            workers=workers,
            runs=folder / "runs",
        )


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    images = tmp_path / "images"
    images.mkdir()
    for seed in range(120):
        pixels = np.random.RandomState(seed).randint(0, 256, (8, 8, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(images / f"{seed:03}.png")
    return DataConfig(source="folder", path=str(images), image_size=8, shard_images=7)


def test_a_cluster_gives_the_manifest_of_one_process(
    tmp_path: Path, data: DataConfig, cluster: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    far = write(tmp_path / "far", data)
    monkeypatch.delenv("VDVAE_DASK")
    monkeypatch.setenv("VDVAE_SHARD_WORKERS", "1")
    assert write(tmp_path / "here", data) == far
    files = [sorted(path.name for path in (tmp_path / n).rglob("*.tar")) for n in ("far", "here")]
    assert files[0] == files[1] and len(files[0]) > 15


def test_a_worker_that_dies_costs_nothing_and_bad_images_are_named(
    tmp_path: Path, data: DataConfig, cluster: object
) -> None:
    def kill_one(images: int) -> None:
        if images > 7 and not killed:
            killed.append(cluster.workers[0].pid)  # type: ignore[attr-defined]
            os.kill(killed[0], signal.SIGKILL)

    killed: list[int] = []
    with open_workers() as workers:
        manifest = write_shards(
            "r",
            data,
            open_source("r", data),
            FileStore(tmp_path / "store"),
            tmp_path / "r.json",
            kill_one,
            workers=workers,
        )
    assert killed and sum(split.images for split in manifest.splits.values()) == 120
    (Path(data.path) / "500.png").write_bytes(b"text")
    with pytest.raises(UserError, match=r"500.png: is no image in PNG"):
        write(tmp_path, data)


def start(*words: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "dask", *words, "--no-dashboard", "--host", "127.0.0.1"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@pytest.mark.parametrize("when", ["while it waits", "between two jobs"])
def test_a_cluster_that_is_lost_on_the_way(
    when: str,
    tmp_path: Path,
    data: DataConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[1]), *_paths()]))
    monkeypatch.setattr(jobs, "_PATIENCE_S", 0.3)
    real, clients, told, deserted = distributed.Client, [], [], threading.Event()

    def connect(at: str, **how: Any) -> distributed.Client:
        clients.append(real(at, **(how | {"timeout": 3})))  # then it gives the scheduler up
        return clients[-1]

    def tell(sentence: str, flush: bool) -> None:
        told.append(sentence)
        deserted.set()

    monkeypatch.setattr(distributed, "Client", connect)
    monkeypatch.setattr(jobs, "print", tell, raising=False)
    (port,) = free_ports(1)
    address = f"tcp://127.0.0.1:{port}"
    monkeypatch.setenv("VDVAE_DASK", address)
    scheduler = start("scheduler", "--port", str(port))
    worker = start("worker", address, "--nthreads", "1", "--no-nanny")

    def lose_all() -> None:
        worker.kill()
        deserted.wait()
        scheduler.kill()

    def on_progress(images: int) -> None:
        if images <= 7 and when == "between two jobs":
            scheduler.kill()
            while clients[-1].status != "closed":
                time.sleep(0.05)
        elif images <= 7:
            threading.Thread(target=lose_all).start()
            worker.wait()

    try:
        with real(address, timeout=60, set_as_default=False) as client:
            client.wait_for_workers(1)
        with (
            pytest.raises(UserError, match=rf"VDVAE_DASK: .*{address} was lost; .*go on$"),
            open_workers() as workers,
        ):
            write_shards("r", data, open_source("r", data), FileStore(tmp_path / "store"),
                         tmp_path / "r.json", on_progress, workers=workers)  # fmt: skip
        assert len(told) == (when == "while it waits")
        assert all(f"{address} has no workers left" in sentence for sentence in told)
    finally:
        for process in (scheduler, worker):
            process.kill()
            process.wait()


def test_a_cluster_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    for address, words in (("tcp://127.0.0.1:9", "cannot be reached"), ("x", "cannot be reached")):
        monkeypatch.setenv("VDVAE_DASK", address)
        with pytest.raises(UserError, match=f"^VDVAE_DASK: .*{words}") as caught, open_workers():
            pass
        assert "\n" not in str(caught.value)

"""Kills training with SIGKILL at random moments and compares what comes of it, bit for bit.

    python tests/kills.py 20 [--ranks 2] [--seed 0]

A small model in float32 on the CPU, a checkpoint every 20 steps, written beside training. Each life
lasts up to a second after its first step. All ranks are killed at once.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from test_training import MODEL, settings

from pipeline.system.launch import rank_environment
from vdvae.distributed import ranks
from vdvae.training import train

STEPS, BATCH = 1500, 4


def child(folder: Path) -> None:
    """One rank: trains to the end, or as far as it gets; then says the weights' hash."""
    torch.set_num_threads(1)
    config = settings(
        steps=STEPS, batch_size=BATCH, checkpoint_every=20, log_every=50, learning_rate=1e-3
    )
    with ranks(torch.device("cpu")) as group:

        def batches(seen: int) -> Iterator[torch.Tensor]:
            while True:
                generator = torch.Generator().manual_seed(seen)
                x_BCHW = torch.randint(0, 256, (BATCH, 1, 4, 4), generator=generator)
                yield x_BCHW.byte().chunk(group.size)[group.rank]
                seen += BATCH

        def on_progress(progress: object) -> bool:
            (folder / "begun").touch()
            return True

        model = train(MODEL, config, batches, folder, on_progress, ranks=group)
        assert model is not None
        digest = hashlib.sha256()
        for value in model.state_dict().values():
            digest.update(value.numpy().tobytes())
        if group.is_main:
            (folder / "weights").write_text(digest.hexdigest())


def begin(folder: Path, size: int) -> list[subprocess.Popen[bytes]]:
    """Starts the ranks, each in the same process group."""
    folder.mkdir(exist_ok=True)
    (folder / "begun").unlink(missing_ok=True)
    return begin_ranks(__file__, "child", str(folder), size=size, quiet=True)


def begin_ranks(*script: str, size: int, quiet: bool = False) -> list[subprocess.Popen[bytes]]:
    """Starts a script in so many ranks, with this process's own paths."""
    meeting = Path(tempfile.mkdtemp(prefix="what? #%41 "))  # as a project may be named
    paths = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    output = subprocess.DEVNULL if quiet else None
    return [
        subprocess.Popen(
            [sys.executable, *script],
            env={**os.environ, **paths, **rank_environment(rank, size, meeting)},
            stdout=output,
            stderr=output,
        )
        for rank in range(size)
    ]


def killed_to_the_end(folder: Path, size: int, kills: int, chance: random.Random) -> int:
    """Kills a training up to so many times, then lets it end; returns how often it was killed."""
    done = 0
    while done < kills:
        processes = begin(folder, size)
        while not (folder / "begun").exists() and processes[0].poll() is None:
            time.sleep(0.005)
        time.sleep(chance.random())
        ended = processes[0].poll() is not None
        for process in processes:
            process.send_signal(signal.SIGKILL)
        for process in processes:
            process.wait()
        if ended:
            break
        done += 1
    for process in begin(folder, size):
        assert process.wait(timeout=300) == 0
    return done


def equal_after(kills: int, size: int, seed: int, folder: Path) -> tuple[int, int]:
    """How many kills there were, and how many trainings were killed and ended with equal bits."""
    chance, done, equal, number = random.Random(seed), 0, 0, 0
    assert killed_to_the_end(folder / "whole", size, 0, chance) == 0
    whole = (folder / "whole" / "weights").read_text()
    while done < kills:
        number += 1
        done += killed_to_the_end(folder / str(number), size, kills - done, chance)
        assert (folder / str(number) / "weights").read_text() == whole, f"training {number}"
        equal += 1
    return done, equal


if __name__ == "__main__":
    if sys.argv[1] == "child":
        child(Path(sys.argv[2]))
    else:
        parser = argparse.ArgumentParser(description=__doc__)
        parser.add_argument("kills", type=int)
        parser.add_argument("--ranks", type=int, default=1)
        parser.add_argument("--seed", type=int, default=0)
        words = parser.parse_args()
        with tempfile.TemporaryDirectory() as scratch:
            done, equal = equal_after(words.kills, words.ranks, words.seed, Path(scratch))
        print(f"{words.ranks} ranks: {done} kills; {equal} trainings, all with equal bits")

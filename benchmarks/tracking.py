"""Times training with and without MLflow, turn and turn about in one run, and keeps the row.

    python benchmarks/tracking.py digits [--store sqlite | http] [--pairs 20] [--threads 2]

Blocks of 200 steps alternate: in one, three points are logged and delivered one by one (in earnest
all of 10 seconds go together); in the next, nothing. The wall clock has whatever else the machine
does in it, above all with a server on the same cores. So CPU time is compared, too, and what
logging takes is counted: the CPU time of the thread that delivers, of all CPU time, and the time
that the training thread spends on logging, of all time.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from rows import keep

from pipeline.params import Places, load_recipe
from pipeline.system import machine
from pipeline.tracking import BufferedRun, curve_point, open_run
from vdvae.config import TrainConfig
from vdvae.training import Progress, train

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
from mlflow_server import MlflowServer

BLOCK, EVERY = 200, 50  # steps


def measure(recipe_name: str, places: Places, pairs: int) -> dict[str, str]:
    """Trains 2 · pairs + 2 blocks, of which the first two are not counted."""
    recipe = load_recipe(recipe_name)
    folder = places.runs
    opened = open_run(recipe.name, places, folder / "run.json", recipe.flat(), {}, None)
    usage = machine.Usage("cpu", {})
    seconds: list[float] = []  # of each block; off, on, off, on ...
    cpu_seconds: list[float] = []
    delivering: list[float] = []
    logging: list[float] = []
    began = time.perf_counter()
    all_began = time.process_time()
    cpu_began = in_training = 0.0

    def on_progress(progress: Progress) -> bool:
        nonlocal began, all_began, cpu_began, in_training
        on = (progress.step - 1) // BLOCK % 2 == 1
        if progress.step % BLOCK == 0:
            now, cpu, all_cpu = time.perf_counter(), time.clock_gettime(clock), time.process_time()
            seconds.append(now - began)
            cpu_seconds.append(all_cpu - all_began)
            if on:
                delivering.append((cpu - cpu_began) / (all_cpu - all_began))
                logging.append(in_training / (now - began))
            began, all_began, cpu_began, in_training = now, all_cpu, cpu, 0.0
        elif on and progress.point is not None:
            before = time.perf_counter()
            run.log_points([curve_point(progress.point) | usage.sample()])
            in_training += time.perf_counter() - before
        return True

    values = recipe.train.to_dict() | {
        "steps": (2 * pairs + 2) * BLOCK,
        "log_every": EVERY,
        "validate_every": 0,
        "checkpoint_every": 10**9,
    }
    size = (recipe.model.image_channels, recipe.model.image_size, recipe.model.image_size)
    x_BCHW = torch.randint(0, 256, (recipe.train.batch_size, *size), dtype=torch.uint8)
    with BufferedRun(opened, folder) as run:
        assert run._thread.ident
        clock = time.pthread_getcpuclockid(run._thread.ident)
        train(
            recipe.model,
            TrainConfig(**values),
            lambda start: itertools.repeat(x_BCHW),
            folder / "checkpoints",
            on_progress,
        )
    return {
        "step_ms": f"{1e3 * statistics.median(seconds[2::2]) / BLOCK:.1f}",
        "wall_percent": _cost(seconds),
        "cpu_percent": _cost(cpu_seconds),
        "delivering_cpu_percent": f"{100 * statistics.mean(delivering[1:]):.2f}",
        "training_thread_percent": f"{100 * statistics.mean(logging[1:]):.3f}",
    }


def _cost(blocks: list[float]) -> str:
    """How much longer the blocks with logging took: median and quartiles, percent."""
    pairs = zip(blocks[2::2], blocks[3::2], strict=True)
    costs = sorted(100 * (on / off - 1) for off, on in pairs)
    quarter = len(costs) // 4
    return f"{statistics.median(costs):.2f} ({costs[quarter]:.2f} to {costs[-quarter - 1]:.2f})"


def main() -> None:
    """Measures, prints and appends one row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("--store", choices=("sqlite", "http"), default="sqlite")
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    words = parser.parse_args()
    torch.set_num_threads(words.threads)
    os.environ["VDVAE_TRACKING_SECONDS"] = "0.5"  # less than the time between two points
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        server = MlflowServer(folder / "server")
        if words.store == "http":
            server.start()
        try:
            places = Places(
                store_url=f"file://{folder}/store",
                runs=folder / "runs",
                tracking_uri=server.url if words.store == "http" else f"sqlite:///{folder}/m.db",
            )
            figures = measure(words.recipe, places, words.pairs)
        finally:
            if words.store == "http":
                server.kill()
    keep(
        "tracking",
        recipe=words.recipe,
        store=words.store,
        **figures,
        pairs=words.pairs,
        threads=words.threads,
        torch=torch.__version__,
    )


if __name__ == "__main__":
    main()

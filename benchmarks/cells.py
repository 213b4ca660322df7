"""Two trainings at once with one thread each, against one training with two threads.

    python benchmarks/cells.py fashion16 [--steps 100]

What `vdvae study NAME --jobs 2` gains on two cores. Both ways alternate in one run; in each round
every training makes the same number of steps, and the two of a pair wait for each other before the
first. The ratio is of the work done in the same time, round by round.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time

import torch
from measure import WARM, Measure, machine
from rows import keep

from pipeline.params import load_recipe
from vdvae.config import ModelConfig
from vdvae.precision import exact_float32

ROUNDS = 3


def train(recipe: str, steps: int) -> None:
    """Says when it is ready, waits for a line, and prints the seconds of the steps."""
    exact_float32()
    loaded = load_recipe(recipe)
    if not isinstance(loaded.model, ModelConfig):
        raise SystemExit(f"{recipe} is no VDVAE, which is what is timed here")
    step = Measure(loaded.model, loaded.train, torch.device("cpu"), steps).work("step", "ours")
    for _ in range(WARM):
        step()
    print("ready", flush=True)
    sys.stdin.readline()
    began = time.perf_counter()
    for _ in range(steps):
        step()
    print(time.perf_counter() - began, flush=True)


def seconds_a_step(recipe: str, steps: int, at_once: int, threads: int) -> float:
    """Of the slowest of some trainings at once."""
    children = [
        subprocess.Popen(
            [sys.executable, __file__, recipe, "--steps", str(steps), "--child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        )
        for _ in range(at_once)
    ]
    for child in children:
        assert child.stdout and child.stdout.readline() == "ready\n"
    for child in children:
        assert child.stdin
        child.stdin.write("\n")
        child.stdin.flush()
    return max(float(child.communicate()[0]) for child in children) / steps


def main() -> None:
    """Measures, prints and appends a row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.child:
        train(words.recipe, words.steps)
        return
    rounds = [
        (
            seconds_a_step(words.recipe, words.steps, at_once=1, threads=2),
            seconds_a_step(words.recipe, words.steps, at_once=2, threads=1),
        )
        for _ in range(ROUNDS)
    ]
    ratios = sorted(2 * one / two for one, two in rounds)
    keep(
        "cells",
        recipe=words.recipe,
        one_of_two_threads_ms=f"{1e3 * statistics.median(one for one, _ in rounds):.1f}",
        two_of_one_thread_ms=f"{1e3 * statistics.median(two for _, two in rounds):.1f}",
        work_ratio=f"{statistics.median(ratios):.2f}",
        range=f"{ratios[0]:.2f}-{ratios[-1]:.2f}",
        **machine(torch.device("cpu"), words.steps),
    )


if __name__ == "__main__":
    main()

"""The five stages, one file each: DVC's units of work, run as `python -m pipeline.stages.NAME`."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pipeline.stages.interpreter  # noqa: F401  first: it may put another python in our place

# isort: split
from pipeline.params import load_recipe
from pipeline.system.events import tell
from pipeline.system.exits import CANCELLED, fail, machine_error
from pipeline.system.launch import launch, ranks_here
from pipeline.system.process import end_with_parent, keep_freed_memory
from vdvae.config import UserError

if TYPE_CHECKING:
    from pipeline.params import Recipe
    from pipeline.shards import Manifest

_PARENT = os.getppid()  # before the stage's own imports, in whose seconds it may be killed

# Read by OpenMP when torch is imported. Where something else wants a core, threads that spin while
# they wait for each other make training many times slower; less spinning halves that for free.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def main(stage: Callable[[str], None], *, in_ranks: bool = False, computes: bool = False) -> None:
    """Runs a stage for the recipe named on the command line, in several ranks where it may.

    The user's errors, and a machine that cannot take what is written (full disk, no permission),
    end in one sentence on stderr and exit code 2; our own bugs keep their traceback.

    Args:
        stage: takes the recipe's name.
        in_ranks: whether it knows what to do in one of several.
        computes: whether it works on tensors, batch after batch.
    """
    if len(sys.argv) != 2:
        sys.exit(f"usage: python -m {stage.__module__} RECIPE")
    end_with_parent(_PARENT)
    if computes:
        keep_freed_memory()
    # Unwinds, so that MLflow's run is KILLED; training has an answer of its own.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(CANCELLED))
    name = sys.argv[1]
    with _end_told():
        try:
            ranks = ranks_here(load_recipe(name)) if in_ranks else 1
            if ranks > 1:
                sys.exit(launch(f"pipeline.stages.{stage.__name__}", name, ranks))
            stage(name)
        except UserError as error:
            fail(error)
        except OSError as error:
            sentence = machine_error(error)
            if sentence is None:
                raise
            fail(sentence)


@contextlib.contextmanager
def _end_told() -> Iterator[None]:
    """Tells the exit code to whoever listens; of several ranks the launcher alone does."""
    code = 1
    try:
        yield
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        raise
    finally:
        if "RANK" not in os.environ:
            tell("end", code=code)


def check_manifest(recipe: Recipe, manifest: Manifest) -> Manifest:
    """The manifest, where it is of the same images that the recipe's model is made for.

    Raises:
        UserError: naming the first fact that differs.
    """
    data = recipe.data
    for fact, wanted, found in (
        ("shape", (data.image_size, data.image_size, data.channels), tuple(manifest.shape)),
        ("num_levels", data.num_levels, manifest.num_levels),
    ):
        if wanted != found:
            raise UserError(
                f"data/manifests/{recipe.name}.json: {fact} is {found}, params.yaml says {wanted}; "
                f"run 'dvc repro shard@{recipe.name}'"
            )
    return manifest

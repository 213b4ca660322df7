"""`vdvae study`: the cells of a study that are missing, then its table, figure and verdict."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.commands.output import print_table
from pipeline.commands.plan import probe_seconds
from pipeline.params import read_params
from pipeline.studies.cells import missing
from pipeline.studies.declaration import cells_of, load_study
from pipeline.studies.results import run_study
from pipeline.system.launch import ranks_here


def study(name: str, mini: bool, jobs: int, dry_run: bool) -> None:
    """Runs a study and prints its table.

    Args:
        name: in `studies` of params.yaml.
        mini: its short version.
        jobs: cells at once.
        dry_run: only list the cells, and which are there.

    Raises:
        UserError: a declaration that does not do, uncommitted changes, or cells that failed.
    """
    if dry_run:
        cells = cells_of(load_study(name), mini)
        todo = {cell.experiment for cell in missing(cells)}
        rows = [
            (cell.variant, cell.seed, "to run" if cell.experiment in todo else "done",
             cell.experiment)
            for cell in cells
        ]  # fmt: skip
        print_table(("variant", "seed", "state", "experiment"), rows)
        print(f"{len(cells)} cells of {name}, {len(todo)} to run")
        return
    folder = run_study(name, mini, jobs, lambda line: print(line, flush=True))
    print((folder / "table.md").read_text(), end="")
    print(f"{folder}; 'vdvae report' shows it")
    if not mini and name not in read_params()["active_studies"]:
        print(f"to let DVC keep it: add {name} to active_studies in params.yaml")


def plan_study(name: str, mini: bool, probe: bool) -> Iterator[tuple[str, str]]:
    """What a study's cells will cost here, as (label, text); nothing is written.

    Args:
        name: in `studies` of params.yaml.
        mini: its short version.
        probe: time ten steps of each variant.

    Raises:
        UserError: a declaration that does not do.
    """
    import torch

    from vdvae.summary import summarise
    from vdvae.training import device_of

    cells = cells_of(load_study(name), mini)
    todo = {cell.experiment for cell in missing(cells)}
    yield "cells", f"{len(cells)}, of which {len(todo)} are to be trained"
    hours, size = 0.0, 0
    for variant in dict.fromkeys(cell.variant for cell in cells):
        of_variant = [cell for cell in cells if cell.variant == variant]
        recipe, count = of_variant[0].recipe, sum(c.experiment in todo for c in of_variant)
        found = summarise(recipe.model)
        size += 4 * found.parameters * count
        text = f"{count} to train, {found.parameters:,} parameters, {recipe.train.steps:,} steps"
        if probe and count:
            share = recipe.train.batch_size // ranks_here(recipe)
            try:
                seconds = probe_seconds(recipe, device_of(recipe.train), share)
            except torch.OutOfMemoryError:
                text += ", a step of which does not fit into the memory"
            else:
                each = seconds * recipe.train.steps / 3600
                hours += each * count
                text += f", {each:.2f} h each at {seconds:.3f} s a step"
        yield variant, text
    if probe:
        yield (
            "hours of training",
            f"{hours:.1f} h, one cell after the other; validation not counted",
        )
    yield "disk, results", f"{size / 2**20:.1f} MiB for the models, and figures of every image"

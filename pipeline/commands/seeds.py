"""`vdvae seeds`: the study of one recipe's seeds, and how far the trainings differ: mean ± spread.

Each seed is a cell, run as those of a study are, with the stages of `vdvae run`.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from shutil import copyfile
from typing import Any

from pipeline.commands.output import print_table
from pipeline.dvc import cache_folder
from pipeline.flows.overrides import Overrides, apply
from pipeline.params import PARAMS, Places, load_recipe
from pipeline.studies.cells import run_cells
from pipeline.studies.declaration import Cell, code_of_cells, experiment_name
from pipeline.studies.results import SPLITS, read_cell
from pipeline.studies.statistics import spread
from vdvae.config import UserError
from vdvae.files import atomic_write_json

FIGURES = ("bits_per_dim", "rate_bits_per_dim", "distortion_bits_per_dim")


def parse_seeds(text: str) -> list[int]:
    """Two or more different seeds, `0,1,2`.

    Raises:
        UserError: where the words are something else.
    """
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdigit() and len(word) <= 10 for word in words):
        raise UserError(f"--seeds: {text!r} is no list of seeds; write whole numbers, as in 0,1,2")
    seeds = [int(word) for word in words]
    if len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds: {text!r} has a seed twice; write each once, as in 0,1,2")
    if len(seeds) < 2:
        raise UserError(
            f"--seeds: {text!r} is one seed, which has no spread; write two or more, as in 0,1,2"
        )
    return seeds


def run_seeds(
    recipe: str,
    seeds: Sequence[int],
    settings: dict[str, Any],
    jobs: int,
    tell: Callable[[str], None],
) -> None:
    """Makes the runs that are not there yet, prints the table, writes results/<recipe>/seeds.json.

    Args:
        recipe: its name in params.yaml.
        seeds: of the trainings, at least two.
        settings: fields of `Overrides` but the seed. Without `register`, the recipe's own seed
            alone becomes a version: a paired test over several tries is passed by luck more often.
        jobs: runs at once.
        tell: gets a sentence for each run that begins or ends.

    Raises:
        UserError: bad settings, uncommitted changes, or runs that failed or do not belong together.
    """
    cells = _cells(recipe, seeds, settings)
    run_cells(cells, jobs, f"seeds of {recipe}", tell)
    places, cache = Places.from_env(), cache_folder()
    rows = [_row(cell, read_cell(cell, cache, places)) for cell in cells]
    data = {row["manifest_digest"] for row in rows}
    if len(data) > 1:
        raise UserError(
            f"{recipe}: the seeds' data differ (manifests {', '.join(sorted(data))}); remove their "
            f"experiments with 'dvc exp remove', then run the same command again"
        )
    result = {
        "recipe": recipe,
        "settings": settings,
        "manifest_digest": rows[0]["manifest_digest"],
        "seeds": rows,
        **{
            split: {"n": len(rows)} | {f: spread([row[split][f] for row in rows]) for f in FIGURES}
            for split in SPLITS
        },
    }
    path = places.results(recipe) / "seeds.json"
    atomic_write_json(path, result)
    _show(result)
    print(f"{path}; 'vdvae report' shows it")


def _cells(recipe: str, seeds: Sequence[int], settings: dict[str, Any]) -> list[Cell]:
    own, code = load_recipe(recipe).train.seed, code_of_cells()
    os.environ.setdefault("VDVAE_DATA_ROOTS", "/,s3://")  # as `vdvae run` has it
    cells = []
    for seed in seeds:
        overrides = Overrides(**({"register": seed == own} | settings | {"seed": seed}))
        with tempfile.TemporaryDirectory() as folder:
            changed = apply(overrides, recipe, Path(copyfile(PARAMS, f"{folder}/{PARAMS}")))
        cells.append(
            Cell(
                variant=recipe,
                seed=seed,
                recipe=changed,
                settings={},
                overrides=overrides,
                experiment=experiment_name(changed, overrides, code),
            )
        )
    return cells


def _row(cell: Cell, found: dict[str, Any]) -> dict[str, Any]:
    """What seeds.json says of a seed."""
    conditions = found["conditions"]
    return {
        "seed": cell.seed,
        "experiment": cell.experiment,
        "mlflow_run_id": found["mlflow_run_id"],
        "commit": conditions["git_revision"],
        "manifest_digest": conditions["manifest_digest"],
        "weights_sha256": conditions["weights_sha256"],
        "training_precision": cell.recipe.train.precision,
        "evaluation_precision": conditions["precision"],
        **{split: found[split] for split in SPLITS},
    }


def _show(result: dict[str, Any]) -> None:
    heads = ("seed", "split", "bits/dim ± error", "rate", "distortion", "MLflow run", "experiment")
    rows = [
        (
            row["seed"],
            split,
            f"{row[split]['bits_per_dim']:.4f} ± {row[split]['bits_per_dim_se']:.4f}",
            f"{row[split]['rate_bits_per_dim']:.4f}",
            f"{row[split]['distortion_bits_per_dim']:.4f}",
            row["mlflow_run_id"] or "unknown to MLflow",
            row["experiment"],
        )
        for row in result["seeds"]
        for split in SPLITS
    ]
    print_table(heads, rows)
    for split in SPLITS:
        found = result[split]
        named = zip(("", "rate ", "distortion "), FIGURES, strict=True)
        print(
            f"{split}, mean ± spread over n = {found['n']} seeds, bits/dim: "
            + ", ".join(
                f"{word}{found[key]['mean']:.4f} ± {found[key]['stdev']:.4f}" for word, key in named
            )
        )
    print(
        "error: standard error over images, of one model; spread: sample standard deviation over "
        "seeds, of models scored on the same images. Neither holds the other."
    )

"""`vdvae seeds`: one run a seed, and how far the trainings differ: mean ± spread.

A seed's run is the one of `vdvae run`, whose DVC experiment gets a name that follows from recipe,
commit and settings. What is there already is not run again, so the same command goes on.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

from pipeline import tracking
from pipeline.commands.output import print_table
from pipeline.dvc import cache_folder
from pipeline.flows import experiment
from pipeline.flows.overrides import Overrides
from pipeline.params import Places, load_recipe
from pipeline.system.process import end_with_parent
from pipeline.yaml_files import parse_yaml
from vdvae.config import UserError
from vdvae.files import atomic_write_json

SPLITS = ("validation", "test")
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


def run_seeds(recipe: str, seeds: list[int], settings: dict[str, Any]) -> None:
    """Makes the runs that are not there yet, prints the table, writes results/<recipe>/seeds.json.

    Args:
        recipe: its name in params.yaml.
        seeds: of the trainings, at least two.
        settings: fields of `Overrides` but the seed. Without `register`, the recipe's own seed
            alone becomes a version: a paired test over several tries is passed by luck more often.

    Raises:
        UserError: bad settings, no commit, or experiments that do not belong together.
    """
    own = load_recipe(recipe).train.seed
    chosen = [
        Overrides(**({"register": seed == own} | settings | {"seed": seed})) for seed in seeds
    ]
    commit = experiment.head()  # read once: a commit made meanwhile is another recipe
    places, cache = Places.from_env(), cache_folder()
    rows = []
    for overrides in chosen:
        name = _name(recipe, commit, overrides)
        if experiment.find(name, commit) is None:
            _run(recipe, overrides, name)
        found = experiment.find(name, commit)
        if found is None:
            raise UserError(
                f"experiment {name}: is not at commit {commit[:7]}, which the checkout was at; "
                f"run the same command again, and commit nothing meanwhile"
            )
        rows.append(_row(recipe, overrides.seed, name, found, places, cache))
    data = {row["manifest_digest"] for row in rows}
    if len(data) > 1:
        raise UserError(
            f"{recipe}: the seeds' data differ (manifests {', '.join(sorted(data))}); remove their "
            f"experiments with 'dvc exp remove', then run the same command again"
        )
    result = {
        "recipe": recipe,
        "commit": commit,
        "settings": settings,
        "manifest_digest": rows[0]["manifest_digest"],
        "seeds": rows,
        **{split: _spread([row[split] for row in rows]) for split in SPLITS},
    }
    path = places.results(recipe) / "seeds.json"
    atomic_write_json(path, result)
    _show(result)
    print(f"{path}; 'vdvae report' shows it")


def _run(recipe: str, overrides: Overrides, name: str) -> None:
    """One run in a process of its own: what a kill leaves of it then carries this run's mark."""
    words = [recipe, json.dumps(overrides.model_dump()), name]
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.commands.seeds", *words],
        preexec_fn=partial(end_with_parent, os.getpid()),
    )
    if done.returncode:
        raise SystemExit(done.returncode)


def _name(recipe: str, commit: str, overrides: Overrides) -> str:
    # Experiments of two commits may not share a name: `dvc exp apply` could not tell them apart.
    key = json.dumps([commit, overrides.model_dump()], sort_keys=True).encode()
    digest = hashlib.sha256(key).hexdigest()[:8]
    return f"{recipe}-{overrides.preset}-seed{overrides.seed}-{digest}"


def _row(
    recipe: str, seed: int, name: str, revision: str, places: Places, cache: Path
) -> dict[str, Any]:
    """What an experiment says of its run."""
    folder = f"results/{recipe}"
    metrics = experiment.read_json(revision, f"{folder}/metrics.json")
    conditions = experiment.read_json(revision, f"{folder}/conditions.json")
    settings = parse_yaml(experiment.read(revision, "params.yaml"), f"params.yaml of {revision}")
    run_file = experiment.cached(revision, f"{folder}/run.json", cache)
    run = tracking.find_run(places, run_file)
    return {
        "seed": seed,
        "experiment": name,
        "mlflow_run_id": run[1] if run else None,
        "manifest_digest": conditions["manifest_digest"],
        "weights_sha256": conditions["weights_sha256"],
        "training_precision": settings["recipes"][recipe]["train"]["precision"],
        "evaluation_precision": conditions["precision"],
        **{split: metrics[split] for split in SPLITS},
    }


def _spread(figures: list[dict[str, float]]) -> dict[str, Any]:
    """Mean and sample standard deviation over seeds of each figure, in bits/dim."""
    spread: dict[str, Any] = {"n": len(figures)}
    for key in FIGURES:
        values = [figure[key] for figure in figures]
        spread[key] = {"mean": statistics.mean(values), "stdev": statistics.stdev(values)}
    return spread


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


if __name__ == "__main__":
    from pipeline.flows import run_recipe as flows
    from pipeline.system.exits import as_a_command

    with as_a_command():
        flows.main(sys.argv[1], Overrides(**json.loads(sys.argv[2])), sys.argv[3])

"""The results of a study: read from its cells, compared, judged, and written as files."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline import tracking
from pipeline.dvc import cache_folder
from pipeline.flows import experiment
from pipeline.params import Places
from pipeline.registry.versions import read_per_image
from pipeline.shards import Manifest
from pipeline.studies.cells import run_cells
from pipeline.studies.declaration import (
    Cell,
    Study,
    cells_of,
    load_study,
    results_name,
    variants_of,
)
from pipeline.studies.shown import SHOWN
from pipeline.studies.statistics import difference, overall, spread
from pipeline.system.machine import processor
from vdvae.config import UserError
from vdvae.files import atomic_write, atomic_write_json, read_json

SPLITS = ("validation", "test")
# Of a cell, not in the table.
_LARGE = ("recipe", "revision", "manifest", "scores", "rates", "curves", "conditions")


def run_study(name: str, mini: bool, jobs: int, tell: Callable[[str], None]) -> Path:
    """Runs the cells that are missing, then writes table.json, table.md, figure and conditions.

    Args:
        name: in `studies` of params.yaml.
        mini: its short version, with a folder of its own.
        jobs: cells at once.
        tell: gets a sentence for each cell that begins or ends.

    Returns:
        The folder of the results.

    Raises:
        UserError: a declaration that does not do, uncommitted changes, or cells that failed.
    """
    study = load_study(name)
    cells = cells_of(study, mini)
    run_cells(cells, jobs, f"study {name}", tell)
    places, cache = Places.from_env(), cache_folder()
    rows = [read_cell(cell, cache, places) for cell in cells]
    folder = write_study(study, name, mini, rows, places)
    runs: dict[str, str] = {}  # of MLflow; equal variants share one
    for row in rows:
        if run_id := row["mlflow_run_id"]:
            text = f"{row['variant']}, seed {row['seed']}"
            runs[run_id] = f"{runs[run_id]}; {text}" if run_id in runs else text
    files = sorted(folder.iterdir())
    tracking.log_study(places, results_name(name, mini), runs, files)
    return folder


def read_cell(cell: Cell, cache: Path, places: Places) -> dict[str, Any]:
    """What a cell's experiment says of it; `scores`, `rates` and `curves` are for the comparison.

    Raises:
        UserError: it has no experiment, or the cache lacks one of its files.
    """
    revision = experiment.find(cell.experiment)
    if revision is None:
        raise UserError(
            f"experiment {cell.experiment}: is not there; run the same command again, and commit "
            f"nothing meanwhile"
        )
    folder = f"results/{cell.recipe.name}"
    conditions = experiment.read_json(revision, f"{folder}/conditions.json")
    metrics = experiment.read_json(revision, f"{folder}/metrics.json")
    files = {
        file: experiment.cached(revision, f"{folder}/{file}", cache)
        for file in ("per_image.csv", "rates.json", "curves.csv", "run.json")
    }
    curves = tracking.read_curves(files["curves.csv"])
    train, steps = cell.recipe.train, int(curves[-1]["step"])
    if steps > train.steps or (steps < train.steps and not train.patience):
        raise UserError(
            f"experiment {cell.experiment}: has {steps} steps, not {train.steps}; remove it with "
            f"'dvc exp remove {cell.experiment}', then run the same command again"
        )
    listed = str(places.manifest(cell.recipe.name))
    manifest = experiment.cached(revision, listed, cache)
    run = tracking.find_run(places, files["run.json"])
    return {
        "recipe": cell.recipe,
        "revision": revision,
        "manifest": manifest,
        "variant": cell.variant,
        "seed": cell.seed,
        "experiment": cell.experiment,
        "mlflow_run_id": run[1] if run else None,
        "steps": steps,
        "skipped": int(curves[-1].get("train/skipped", 0)),
        "minutes": round(_training_seconds(train.batch_size, curves) / 60, 1),
        "conditions": {**conditions, "data": _data(Manifest.load(manifest))},
        **{split: metrics[split] for split in SPLITS},
        "scores": read_per_image(files["per_image.csv"], "test"),
        "rates": read_json(files["rates.json"], "evaluate again")["test"],
        "curves": curves,
    }


def write_study(
    study: Study, name: str, mini: bool, rows: Sequence[dict[str, Any]], places: Places
) -> Path:
    """Compares, judges, and writes the study's files, table.json last; returns their folder.

    Raises:
        UserError: the cells were not measured on the same data in the same way, or what a picture
            is drawn from is not there.
    """
    folder = places.results_root / "studies" / results_name(name, mini)
    conditions = _shared([row["conditions"] for row in rows])
    of_variant = {
        variant: [row for row in rows if row["variant"] == variant]
        for variant in variants_of(study)
    }
    shown = SHOWN[study.shows]
    comparisons = []
    for pair in study.compare:
        better, worse = ([row["scores"] for row in of_variant[variant]] for variant in pair)
        found = difference(better, worse, study.level)
        facts = {"better": pair[0], "worse": pair[1], **asdict(found), "verdict": found.verdict}
        comparisons.append(facts)
    table = {
        "study": name,
        "mini": mini,
        "claim": study.claim,
        "paper": study.paper,
        "recipe": (study.mini.recipe if mini else "") or study.recipe,
        "verdict": overall([found["verdict"] for found in comparisons]) if comparisons else None,
        "level": study.level,
        "comparisons": comparisons,
        "variants": {
            variant: {
                "seeds": len(of_seeds),
                **{s: spread([row[s]["bits_per_dim"] for row in of_seeds]) for s in SPLITS},
                "shown": shown.columns(of_seeds),
            }
            for variant, of_seeds in of_variant.items()
        },
        "cells": [{key: row[key] for key in row if key not in _LARGE} for row in rows],
    }
    chart = shown.chart(name, of_variant)
    atomic_write(folder / "table.md", markdown(table))
    atomic_write(folder / "figure.svg", chart.standalone())
    atomic_write(folder / "figure.png", chart.png())
    shown.draw(folder, of_variant, places)
    atomic_write_json(folder / "conditions.json", conditions)
    atomic_write_json(folder / "table.json", table)
    return folder


def _shared(conditions: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What holds of every cell's figures, with the commits that they were measured at.

    Raises:
        UserError: they differ in something else, so that nothing can be compared.
    """
    own = ("git_revision", "git_dirty", "weights_sha256", "device", "manifest_digest")
    common = [{key: each[key] for key in each if key not in own} for each in conditions]
    for key in common[0]:
        values = sorted({str(each.get(key)) for each in common})
        if len(values) > 1:
            raise UserError(
                f"the cells' {key} differ ({', '.join(values)}): compare like with like"
            )
    return {
        **common[0],
        "split": "test",
        "manifest_digests": sorted({each["manifest_digest"] for each in conditions}),
        "git_revisions": sorted({str(each.get("git_revision")) for each in conditions}),
        "devices": sorted({each["device"] for each in conditions}),
        "written_on": processor(),
    }


def _training_seconds(batch_size: int, curves: Sequence[dict[str, float]]) -> float:
    """What the steps took, without validation, pictures and the pauses of an interrupted run."""
    starts = [0.0, *(point["step"] for point in curves)]
    return sum(
        (point["step"] - start) * batch_size / point["train/images_per_second"]
        for start, point in zip(starts, curves, strict=False)
    )


def _data(manifest: Manifest) -> str:
    """A digest of images, splits and levels: recipes with the same of it are compared."""
    counts = {name: split.images for name, split in manifest.splits.items()}
    facts = [manifest.source.fingerprint, manifest.shape, manifest.num_levels, counts]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def markdown(table: dict[str, Any]) -> str:
    """The table for people: every variant, every comparison, the verdict."""
    short = " (the short version)" if table["mini"] else ""
    heads = ["variant", "seeds", "validation", "test", "skipped updates", "minutes a cell"]
    # A variant may have a column of its own.
    further = dict.fromkeys(head for each in table["variants"].values() for head in each["shown"])
    heads += further
    lines = [
        f"# {table['study']}{short}", "", f"Claim: {table['claim']}", "",
        f"The paper: {table['paper']}", "",
        f"Recipe {table['recipe']}. Bits/dim on test, mean ± standard deviation over seeds:", "",
        f"| {' | '.join(heads)} |",
        f"|{len(heads) * '---|'}",
    ]  # fmt: skip
    for variant, figures in table["variants"].items():
        cells = [cell for cell in table["cells"] if cell["variant"] == variant]
        skipped = ", ".join(str(cell["skipped"]) for cell in cells)
        minutes = statistics.mean(cell["minutes"] for cell in cells)
        shown = [_plus_minus(figures[split]["mean"], figures[split]["stdev"]) for split in SPLITS]
        row = [variant, figures["seeds"], *shown, skipped, f"{minutes:.1f}"]
        columns = [figures["shown"].get(head) for head in further]
        row += [f"{statistics.fmean(by_seed):.3g}" if by_seed else "" for by_seed in columns]
        lines.append(f"| {' | '.join(map(str, row))} |")
    if table["comparisons"]:
        percent = f"{100 * table['level']:g}%"
        lines += [
            "",
            f"Differences on test, paired by image and seed; {percent} intervals over both:",
            "",
            "| claimed better | than | bits/dim less | interval | verdict |",
            "|---|---|---|---|---|",
        ]
        lines += [
            f"| {c['better']} | {c['worse']} | {c['mean']:+.4f} | {c['low']:+.4f} to "
            f"{c['high']:+.4f} | {c['verdict']} |"
            for c in table["comparisons"]
        ]
        lines += ["", f"**{table['verdict'].capitalize()}** at {percent}, on these data."]
    return "\n".join(lines) + "\n"


def _plus_minus(mean: float, stdev: float | None) -> str:
    return f"{mean:.4f}" + (f" ± {stdev:.4f}" if stdev is not None else "")

"""`vdvae models list`, `show` and `score`: what the registry holds, and bits/dim of a folder."""

from __future__ import annotations

import csv
import io
import sys
from pathlib import Path
from typing import Any

from pipeline.commands.output import labelled, print_json, print_table
from pipeline.registry import use
from vdvae.files import atomic_write

_DIFFERENT = 1  # exit code of `show --verify` that found something
_SPLITS = ("validation", "test")


def list_versions(as_json: bool = False) -> None:
    """Prints every version with its aliases and figures."""
    found = use.versions()
    if as_json:
        print_json(
            [
                {
                    "name": version.name,
                    "version": version.number,
                    "aliases": version.aliases,
                    "bits_per_dim": {split: _as_json(version.figure(split)) for split in _SPLITS},
                    "registered": version.created,
                }
                for version in found
            ]
        )
    elif not found:
        print("no models are registered; make one with 'vdvae run RECIPE'")
    else:
        print_table(
            ("model", "aliases", "validation, bits/dim", "test, bits/dim", "registered"),
            [
                (
                    f"{version.name}/{version.number}",
                    ", ".join(version.aliases),
                    *(_figure(version.figure(split)) for split in _SPLITS),
                    version.created,
                )
                for version in found
            ],
        )


def show(reference: str, verify: bool = False, as_json: bool = False) -> None:
    """Prints figures, and where a version comes from; exits with 1 where bytes are not its own."""
    facts = use.describe(reference)
    found = use.verify(reference) if verify else None
    if as_json:
        print_json(facts | ({"verified": vars(found)} if found else {}))
    else:
        print("\n".join(_lines(facts)))
        if found:
            for note in found.notes:
                print(f"note: {note}")
            for difference in found.differences:
                print(f"differs: {difference}")
            differences = f"{len(found.differences) or 'no'} differences"
            print(f"verified {', '.join(found.checked)}: {differences}")
    if found and found.differences:
        sys.exit(_DIFFERENT)


def _as_json(found: tuple[float, float] | None) -> dict[str, float] | None:
    return {"mean": found[0], "se": found[1]} if found else None


def _figure(found: tuple[float, float] | None) -> str:
    return f"{found[0]:.4f} ± {found[1]:.4f}" if found else "none"


def _lines(facts: dict[str, Any]) -> list[str]:
    manifest, source = facts["manifest"], facts["data_source"]
    rows = [
        ("aliases", ", ".join(facts["aliases"]) or "none"),
        *(
            (f"{split}, bits/dim", _figure((figure["mean"], figure["se"])))
            for split, figure in facts["bits_per_dim"].items()
        ),
        ("levels, likelihood", f"{facts['num_levels']}, {facts['likelihood']}"),
        ("registered", facts["created"]),
        ("decision", facts["decision"] or "none"),
        ("weights sha256", facts["weights_sha256"]),
        ("files", facts["source"]),
        ("MLflow run", "{id} ({name}, {status})".format(**facts["mlflow_run"])),
        ("dvc.lock", ", ".join(facts["dvc_lock"]) or "none"),
        ("manifest", manifest["digest"]),
        *(
            (f"  {name}", f"{split['images']} images in {len(split['shards'])} shards")
            for name, split in manifest["splits"].items()
        ),
        ("source", f"{source['name']}, fingerprint {source['fingerprint']}"),
        ("  terms", source["terms"]),
        (
            "git revision",
            f"{facts['git_revision'] or 'unknown'}"
            f"{', with uncommitted changes' * facts['git_dirty']}",
        ),
        ("environment", facts["environment"] or "unknown"),
        ("Prefect run", facts["prefect_flow_run"] or "none"),
    ]
    return [
        f"{facts['name']} version {facts['version']}",
        *labelled(rows),
        "moves of its aliases",
        *(f"  {move}" for move in facts["moves"]),
        "shards, sha256",
        *(
            f"  {name}  {sha256}"
            for split in manifest["splits"].values()
            for name, sha256 in split["shards"].items()
        ),
    ]


def score(reference: str, folder: Path, output: Path | None = None) -> None:
    """Prints, or writes to a file, bits/dim of every image of a folder, as CSV."""
    scores = use.score(reference, folder)
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["image", "bits_per_dim", "rate_nats", "distortion_nats"])
    columns = (scores.bits_per_dim_B, scores.rate_nats_B, scores.distortion_nats_B)
    for key, *values in zip(scores.keys, *columns, strict=True):
        table.writerow([key, *(repr(float(value)) for value in values)])
    if output is None:
        print(text.getvalue(), end="")
        return
    atomic_write(output, text.getvalue())
    figures = scores.summary()
    print(
        f"{figures['images']} images, {figures['bits_per_dim']:.4f} ± "
        f"{figures['bits_per_dim_se']:.4f} bits/dim: {output}"
    )

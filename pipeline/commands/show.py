"""`vdvae show`: the figures of a recipe, and where to look further."""

from __future__ import annotations

import math
import shlex
from pathlib import Path
from typing import Any

from pipeline.commands.output import labelled, print_json
from pipeline.params import Places, load_recipe
from pipeline.registry.receipt import registration, remedy
from vdvae.config import UserError
from vdvae.files import MOST_JSON_BYTES, open_regular, parse_json, read_csv, read_json, sha256_of


def show(recipe: str, as_json: bool = False) -> None:
    """Prints what results/<recipe> holds.

    Raises:
        UserError: there is nothing yet, or what is there is damaged.
    """
    load_recipe(recipe)
    places = Places.from_env()
    try:
        found = _facts(recipe, places)
        lines = labelled(_rows(found))
    except UserError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError) as error:  # a figure that is none
        raise UserError(
            f"results/{recipe}: what is there is damaged ({error}); run 'dvc checkout', or "
            f"'dvc repro -f -s evaluate@{recipe}' and the same of register"
        ) from None
    if as_json:
        print_json(found)
        return
    print(
        "\n".join(["", recipe, *lines]),
        f"\n\nlook further, after '. .venv/bin/activate':\n"
        f"  dvc metrics show\n"
        f"  mlflow ui --backend-store-uri {shlex.quote(places.tracking_uri)} --host 127.0.0.1\n"
        f"  prefect server start --host 127.0.0.1    and, in another shell,\n"
        f"  PREFECT_API_URL=http://127.0.0.1:4200/api vdvae run {recipe}",
        sep="",
    )


def _facts(recipe: str, places: Places) -> dict[str, Any]:
    results, weights = places.results(recipe), places.weights(recipe)
    metrics = _read(results / "metrics.json", recipe)
    conditions = _read(results / "conditions.json", recipe)
    registered = registration(places, recipe)
    current = conditions.get("weights_sha256") == sha256_of(weights)
    curves = read_csv(results / "curves.csv", f"run 'dvc checkout' or 'dvc repro train@{recipe}'")
    speeds = sorted(float(row["images_per_second"]) for row in curves)
    return {
        "recipe": recipe,
        "figures_are_of_this_model": current,
        **{split: metrics[split] for split in ("validation", "test")},
        "parameters": _parameters(weights),
        "images_per_second": speeds[len(speeds) // 2],
        "registered": registered,
        "samples": str((results / "samples.png").absolute()),
        "reconstructions": str((results / "reconstructions.png").absolute()),
    }


def _rows(found: dict[str, Any]) -> list[tuple[str, object]]:
    rows: list[tuple[str, object]] = []
    if not found["figures_are_of_this_model"]:
        again = f"run 'dvc repro evaluate@{found['recipe']}'"
        rows.append(("note", f"these figures are not of the model that lies here now; {again}"))
    for split in ("validation", "test"):
        figures = found[split]
        rows += [
            (
                f"{split}, bits/dim",
                f"{figures['bits_per_dim']:.4f} ± {figures['bits_per_dim_se']:.4f}"
                f"  over {figures['images']} images",
            ),
            ("  rate", f"{figures['rate_bits_per_dim']:.4f}"),
            ("  distortion", f"{figures['distortion_bits_per_dim']:.4f}"),
        ]
    rows += [
        ("parameters", f"{found['parameters']:,}"),
        ("images/s in training", f"{found['images_per_second']:.0f} (median of intervals)"),
    ]
    if registered := found["registered"]:
        alias = registered["alias"] or "no alias: another version is better on validation"
        rows += [
            ("MLflow run", registered["mlflow_run_id"]),
            ("registered", f"{registered['name']} version {registered['version']} ({alias})"),
        ]
    else:
        rows.append(("registered", f"not registered; {remedy(found['recipe'])}"))
    return [*rows, *((key, found[key]) for key in ("samples", "reconstructions"))]


def _read(path: Path, recipe: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = read_json(path, f"run 'dvc repro -f -s evaluate@{recipe}'")
    except FileNotFoundError:
        raise UserError(f"{path}: not found; run 'dvc repro evaluate@{recipe}'") from None
    return found


def _parameters(weights: Path) -> int:
    # The header of a safetensors file: its length, then JSON with every array's shape.
    again = "copy the model again"
    with open_regular(weights, again) as file:
        length = min(int.from_bytes(file.read(8), "little"), MOST_JSON_BYTES)
        header = parse_json(file.read(length), str(weights), again)
    return sum(math.prod(array["shape"]) for key, array in header.items() if key != "__metadata__")

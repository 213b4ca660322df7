"""The record that `register` leaves beside the results, and whether it is of the model there."""

from __future__ import annotations

from typing import Any

from pipeline.params import Places
from vdvae.config import UserError
from vdvae.files import read_json, sha256_of

KEYS = ("name", "version", "alias", "mlflow_run_id", "weights_sha256")


def registration(places: Places, recipe: str) -> dict[str, Any] | None:
    """Where the model in results/<recipe>/model is registered, by KEYS; None where it is not.

    Neither git nor DVC keeps the record: `git checkout`, `dvc checkout` and `dvc exp apply` leave
    that of another model behind.

    Raises:
        UserError: the record is damaged.
    """
    path, weights = places.results(recipe) / "registered.json", places.weights(recipe)
    try:
        record = read_json(path, remedy(recipe))
        ours = weights.exists() and sha256_of(weights) == record["weights_sha256"]
        return {key: record[key] for key in KEYS} if ours else None
    except FileNotFoundError:
        return None
    except (ValueError, LookupError, TypeError):
        raise UserError(f"{path}: is damaged; remove it, then {remedy(recipe)}") from None


def remedy(recipe: str) -> str:
    """What registers the model that is there; where the registry has it, it is only found again."""
    return f"run 'dvc repro -f -s register@{recipe}'"

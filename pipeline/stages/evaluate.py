"""The stage `evaluate`: the likelihood of every image of validation and test, exactly once.

On several ranks: torchrun --nproc-per-node N -m pipeline.stages.evaluate RECIPE
"""

from __future__ import annotations

import csv
import io
from typing import TYPE_CHECKING, Any

from pipeline.git import revision_tags
from pipeline.params import Places, Recipe, load_recipe
from pipeline.shards import Manifest, ShardReader
from pipeline.stages import check_manifest, main
from pipeline.stages.scoring import scores_of, tell
from pipeline.storage import open_store
from pipeline.tracking import BufferedRun
from vdvae.files import atomic_write, atomic_write_json, sha256_of

if TYPE_CHECKING:
    from torch import Tensor

    from vdvae.evaluate import Scores
    from vdvae.models import ImageModel

    Batch = tuple[list[str], Tensor]  # names of images, and the images

SPLITS = ("validation", "test")


def evaluate(name: str) -> None:
    """Measures a recipe's model; see `measure`."""
    measure(load_recipe(name), Places.from_env())


def measure(recipe: Recipe, places: Places) -> None:
    """Writes per_image.csv, rates.json, conditions.json and, last, metrics.json; logs all of it."""
    name = recipe.name
    manifest = check_manifest(recipe, Manifest.load(places.manifest(name)))
    store = open_store(places.store_url)

    import vdvae
    from pipeline import tracking
    from vdvae.distributed import ranks
    from vdvae.precision import exact_float32
    from vdvae.training import device_of

    exact_float32()
    settings, results = recipe.evaluate, places.results(name)
    device = device_of(recipe.train)
    with ranks(device) as group:
        model = vdvae.load(places.model(name)).to(device)

        def score(split: str) -> Scores | None:
            reader = ShardReader(manifest, store, split)
            return scores_of(group, model, reader, settings, settings.passes, settings.iwae)

        if not group.is_main:
            for split in SPLITS:
                score(split)
            return
        opened = tracking.open_run(name, places, results / "run.json", recipe.flat(), {}, manifest)
        with BufferedRun(opened, places.runs) as run:
            scores: dict[str, Scores] = {}
            for split in SPLITS:
                of_split = score(split)
                assert of_split is not None  # on rank 0
                scores[split] = of_split
                tell(split, of_split, recipe.model.likelihood)
            metrics: dict[str, Any] = {split: part.summary() for split, part in scores.items()}
            conditions = {
                **revision_tags(),
                "manifest_digest": manifest.digest,
                "weights_sha256": sha256_of(places.model(name) / "model.safetensors"),
                "likelihood": recipe.model.likelihood,
                "num_levels": recipe.model.num_levels,
                "precision": "fp32",
                "device": device.type,
                "seed": settings.seed,
                "posterior_samples": settings.passes,
                "importance_samples": settings.iwae,
            }
            atomic_write(results / "per_image.csv", _per_image(scores))
            atomic_write_json(results / "rates.json", _rates(model, scores))
            atomic_write_json(results / "conditions.json", conditions)
            atomic_write_json(results / "metrics.json", metrics)
            run.log_metrics(tracking.flat_metrics(metrics))
            for file in ("per_image.csv", "rates.json", "conditions.json", "metrics.json"):
                run.log_artifact(results / file)


def _per_image(scores: dict[str, Scores]) -> str:
    rows = io.StringIO()
    table = csv.writer(rows, lineterminator="\n")
    with_iwae = any(part.iwae for part in scores.values())
    table.writerow(
        ["split", "key", "bits_per_dim", "rate_nats", "distortion_nats"] + ["iwae_nats"] * with_iwae
    )
    for split, part in scores.items():
        columns = [part.bits_per_dim_B, part.rate_nats_B, part.distortion_nats_B]
        if part.iwae_nats_B is not None:
            columns.append(part.iwae_nats_B)
        for key, *values in zip(part.keys, *columns, strict=True):
            table.writerow([split, key, *(repr(float(value)) for value in values)])
    return rows.getvalue()


def _rates(model: ImageModel, scores: dict[str, Scores]) -> dict[str, Any]:
    """The rate of each stochastic layer, top first, and of each resolution, in bits/dim."""
    layers = model.latent_resolutions
    rates_by_split = {}
    for split, score in scores.items():
        rates = score.rate_bits_per_dim_L().tolist()
        by_resolution = {
            str(resolution): sum(
                rate for layer, rate in zip(layers, rates, strict=True) if layer == resolution
            )
            for resolution in sorted({*layers})
        }
        rates_by_split[split] = {"rate_bits_per_dim_by_resolution": by_resolution} | {
            "rate_bits_per_dim_by_layer": [
                {"resolution": layer, "rate_bits_per_dim": rate}
                for layer, rate in zip(layers, rates, strict=True)
            ]
        }
    return rates_by_split


if __name__ == "__main__":
    main(evaluate, in_ranks=True, computes=True)

"""The flow that scores a champion once more: the same images and draws, the same figures."""

from __future__ import annotations

import tempfile
from pathlib import Path

from prefect import flow, get_run_logger
from prefect.artifacts import (
    create_table_artifact,
)
from prefect.states import Failed, State

from pipeline.flows import experiment
from pipeline.flows.engine import PARENT, in_engine
from pipeline.params import Places, load_recipe
from pipeline.system import process
from vdvae.config import UserError

_TOLERANCE = 1e-4  # bits/dim, on identical images and draws


@flow(name="evaluate-champion", flow_run_name="{recipe}-champion")
def evaluate_champion(recipe: str) -> State[None] | None:
    """Scores the champion of a recipe once more on its test images, with the same draws.

    Fails where any image's figure is not the one that was recorded when the model was registered.

    Args:
        recipe: its name in params.yaml; the model is vdvae-<recipe>.
    """
    try:
        if in_engine():
            process.end_with_parent(PARENT)
            experiment.share_places(experiment.origin_of_clone())
        return _rescore(recipe)
    except UserError as error:
        return Failed(message=str(error))


def _rescore(recipe_name: str) -> State[None] | None:
    logger = get_run_logger()
    recipe, places = load_recipe(recipe_name), Places.from_env()

    import vdvae
    from pipeline.registry.versions import fetch_champion, read_per_image
    from pipeline.shards import Manifest, ShardReader
    from pipeline.storage import open_store
    from vdvae.evaluate import evaluate
    from vdvae.precision import exact_float32

    with tempfile.TemporaryDirectory() as folder:
        champion = fetch_champion(recipe_name, recipe.register.alias, places, Path(folder))
        version = champion.version
        logger.info("%s", version)
        recorded = read_per_image(champion.per_image, "test")
        manifest = Manifest.load(champion.manifest)
        model = vdvae.load(champion.model)
    exact_float32()
    reader = ShardReader(manifest, open_store(places.store_url), "test")
    batches = reader.scan(recipe.evaluate.batch_size)
    images = manifest.splits["test"].images
    scores = evaluate(model, batches, version.seed, images, passes=version.passes)
    found = dict(zip(scores.keys, scores.bits_per_dim_B.tolist(), strict=True))
    if found.keys() != recorded.keys():
        return Failed(
            message=f"{version}: {len(recorded)} figures are "
            f"recorded, of other images than the {len(found)} of its manifest"
        )
    worst = max(found, key=lambda key: abs(found[key] - recorded[key]))
    difference = abs(found[worst] - recorded[worst])
    rows = [
        {
            "model": version.name,
            "version": version.number,
            "images": len(found),
            "bits_per_dim": sum(found.values()) / len(found),
            "recorded": sum(recorded.values()) / len(recorded),
            "greatest_difference": difference,
            "image": worst,
        }
    ]
    create_table_artifact(rows, f"{recipe_name}-champion", "test, bits/dim")
    if not difference <= _TOLERANCE:
        return Failed(
            message=f"{version}: test image {worst} has "
            f"{found[worst]:.6f} bits/dim, recorded were {recorded[worst]:.6f}; more than "
            f"{_TOLERANCE:g} apart: the model, the images or the arithmetic have changed"
        )
    logger.info("%s test images, greatest difference %.1e bits/dim", len(found), difference)
    return None

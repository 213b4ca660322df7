"""The stage `sample`: pictures that show what the model has learnt."""

from __future__ import annotations

from pipeline.params import Places, load_recipe
from pipeline.pictures import draw_ladder, draw_samples, save_grid
from pipeline.shards import Manifest, ShardReader
from pipeline.stages import check_manifest, main
from pipeline.storage import open_store
from pipeline.tracking import BufferedRun


def sample(name: str) -> None:
    """Writes samples.png and reconstructions.png and logs both to the recipe's MLflow run."""
    recipe = load_recipe(name)
    places = Places.from_env()
    manifest = check_manifest(recipe, Manifest.load(places.manifest(name)))
    store = open_store(places.store_url)

    import vdvae
    from pipeline import tracking
    from vdvae.precision import exact_float32
    from vdvae.training import device_of

    exact_float32()
    settings = recipe.sample
    device = device_of(recipe.train)
    model = vdvae.load(places.model(name)).to(device)
    results = places.results(name)
    opened = tracking.open_run(name, places, results / "run.json", recipe.flat(), {}, manifest)
    with BufferedRun(opened, places.runs) as run:
        drawn = draw_samples(model, settings.n, settings.temperature, settings.seed)
        save_grid(results / "samples.png", drawn)
        reader = ShardReader(manifest, store, "validation")
        _, originals = next(reader.scan(settings.reconstructions))
        rows, columns = draw_ladder(model, originals, settings.seed)
        save_grid(results / "reconstructions.png", rows, columns)
        for picture in ("samples.png", "reconstructions.png"):
            run.log_artifact(results / picture, "pictures")
    print(f"{settings.n} samples at temperature {settings.temperature:g}: {results}/samples.png")


if __name__ == "__main__":
    main(sample, computes=True)

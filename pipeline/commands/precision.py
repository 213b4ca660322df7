"""What a lower precision does to the figures: the same images and draws in each arithmetic."""

from __future__ import annotations

import time
from collections.abc import Sequence

from pipeline.git import revision_tags
from pipeline.params import Places, load_recipe
from pipeline.shards import Manifest, ShardReader
from pipeline.storage import open_store
from pipeline.system.progress import counted
from vdvae.files import atomic_write_json, sha256_of


def audit_precision(recipe_name: str, precisions: Sequence[str], split: str = "test") -> None:
    """Prints and writes to results/<recipe>/precision.json how far each is from float32.

    The shift is the mean over images of the difference in bits/dim, with its standard error: the
    images and the draws of the posterior are the same, so it is known much better than the figure.

    Raises:
        UserError: an unknown precision, one that the device does not have, or no model.
    """
    import vdvae
    from vdvae.evaluate import Scores, evaluate, standard_error
    from vdvae.precision import arithmetic, check_precision
    from vdvae.training import device_of

    recipe, places = load_recipe(recipe_name), Places.from_env()
    device = device_of(recipe.train)
    for precision in precisions:  # before the reference takes its time
        check_precision(precision, device)
    manifest = Manifest.load(places.manifest(recipe_name))
    folder = places.model(recipe_name)
    model = vdvae.load(folder).to(device)
    store, settings = open_store(places.store_url), recipe.evaluate
    images = manifest.splits[split].images
    found: dict[str, Scores] = {}
    rows = {}
    for precision in dict.fromkeys(("fp32", *precisions)):
        with arithmetic(precision, device):
            reader = ShardReader(manifest, store, split)
            batches = counted(reader.scan(settings.batch_size), f"scoring in {precision}", images)
            began = time.perf_counter()
            scores = evaluate(model, batches, settings.seed, images, passes=settings.passes)
            seconds = time.perf_counter() - began
        found[precision] = scores
        shift_B = scores.bits_per_dim_B - found["fp32"].bits_per_dim_B
        figures = scores.summary()
        rows[precision] = {
            **figures,
            "shift_bits_per_dim": float(shift_B.mean()),
            "shift_bits_per_dim_se": standard_error(shift_B),
            "greatest_shift_bits_per_dim": float(abs(shift_B).max()),
            "images_per_second": images / seconds,
        }
        row = rows[precision]
        print(
            f"{precision}: {figures['bits_per_dim']:.5f} ± {figures['bits_per_dim_se']:.5f} "
            f"bits/dim ({figures['nats_per_dim']:.5f} nats/dim)  shift "
            f"{row['shift_bits_per_dim']:+.6f} ± {row['shift_bits_per_dim_se']:.6f} bits/dim, at "
            f"most {row['greatest_shift_bits_per_dim']:.6f}  {images / seconds:.0f} img/s",
            flush=True,
        )
    record = {
        **revision_tags(),
        "split": split,
        "device": device.type,
        "seed": settings.seed,
        "posterior_samples": settings.passes,
        "manifest_digest": manifest.digest,
        "weights_sha256": sha256_of(folder / "model.safetensors"),
        "precisions": rows,
    }
    atomic_write_json(places.results(recipe_name) / "precision.json", record)

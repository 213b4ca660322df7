"""Stage 1: images from their source into shards in the store, and the manifest that lists them."""

from __future__ import annotations

import time

import numpy as np

from pipeline.params import Places, load_recipe
from pipeline.pictures import save_grid, small
from pipeline.shards import SPLITS, Manifest, write_shards
from pipeline.shards.decode import Decoder
from pipeline.shards.jobs import open_workers
from pipeline.sources import open_source
from pipeline.stages import main
from pipeline.storage import Store, open_store
from pipeline.system.progress import Bar

_INTERVAL_S = 5.0
CONTACTS = 64  # images of each split on its contact sheet


def shard(recipe_name: str) -> None:
    """Shards one recipe's data, draws contact sheets, writes data/manifests/<recipe>.json last."""
    recipe, places = load_recipe(recipe_name), Places.from_env()
    source = open_source(recipe.name, recipe.data)
    began = time.monotonic()
    bar = Bar("sharding", "images", _INTERVAL_S)

    def on_progress(images: int) -> None:
        speed = images / (time.monotonic() - began)
        bar.show(images, line=f"{images} images  {speed:.0f} img/s")

    path = places.manifest(recipe.name)
    store = open_store(places.store_url)
    with open_workers() as workers, bar:
        manifest = write_shards(
            recipe.name,
            recipe.data,
            source,
            store,
            path,
            on_progress,
            workers=workers,
            runs=places.runs,
            before_manifest=lambda manifest: draw_contacts(manifest, store, places),
        )
    for what, note in manifest.source.notes.items():
        print(f"{what}: {note}")
    duplicates = manifest.duplicates
    assert duplicates is not None  # just counted
    for kind, counts in (("within", duplicates.within), ("across", duplicates.across)):
        if any(counts.values()):
            found = ", ".join(f"{count} in {where}" for where, count in counts.items() if count)
            print(f"duplicates {kind}: {found}")
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    print(
        "  ".join(f"{name} {split.images}" for name, split in manifest.splits.items())
        + f"  shards {len(shards)}  {sum(shard.bytes for shard in shards) / 2**20:.1f} MiB"
        + (f"  left out {manifest.left_out}" if manifest.left_out else "")
        + f"  {time.monotonic() - began:.1f} s  {path}"
    )


def draw_contacts(manifest: Manifest, store: Store, places: Places) -> None:
    """Writes results/<recipe>/contact_<split>.png: each split's first images, as stored."""
    decoder = Decoder.of(manifest, store)
    for split in SPLITS:
        parts: list[np.ndarray] = []
        left = CONTACTS
        for shard in manifest.splits[split].shards:  # read back as training will
            x_NCHW = decoder.decode(shard).x_NCHW[:left]
            parts.append(small(np.ascontiguousarray(x_NCHW.transpose(0, 2, 3, 1))))
            left -= len(parts[-1])
            if not left:
                break
        sheet = places.results(manifest.recipe) / f"contact_{split}.png"
        save_grid(sheet, np.concatenate(parts))


if __name__ == "__main__":
    main(shard)

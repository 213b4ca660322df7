"""The authors' checkpoints: fetched, held to their hash, measured and registered (Table 2).

A published file is a pickled state dict. It is read with PyTorch's restricted unpickler, which
builds tensors and runs nothing; what else it holds is refused.
"""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline import registry
from pipeline.fetch import download, hold
from pipeline.params import Places, Recipe, load_recipe
from pipeline.shards import Manifest, ShardReader
from pipeline.stages.evaluate import SPLITS, measure, tell
from pipeline.storage import open_store
from vdvae.config import Likelihood, UserError
from vdvae.files import atomic_write_json, read_json

FOLDER = Path("data/raw/published")
SUMS = Path("data/published.json")  # sha256 by file name, of the first fetch; for git to keep
RESULTS = Path("results/published")
_ROOT = "https://openaipublic.blob.core.windows.net/very-deep-vaes-assets"
_SEEDS = (900000, 1050000, 650000, 1050000)  # iterations of the four CIFAR-10 runs
ADDRESSES = {
    "cifar10": tuple(
        f"{_ROOT}/vdvae-assets-2/cifar10-seed{seed}-iter-{iterations}-model-ema.th"
        for seed, iterations in enumerate(_SEEDS)
    ),
    "imagenet32": (f"{_ROOT}/vdvae-assets/imagenet32-iter-1700000-model-ema.th",),
    "imagenet64": (f"{_ROOT}/vdvae-assets-2/imagenet64-iter-1600000-model-ema.th",),
    "ffhq256": (f"{_ROOT}/vdvae-assets/ffhq256-iter-1700000-model-ema.th",),
    "ffhq1024": (f"{_ROOT}/vdvae-assets/ffhq1024-iter-1700000-model-ema.th",),
}


def import_published(
    recipe_name: str, *, file: Path | None = None, url: str | None = None, seed: int = 0
) -> registry.Registered:
    """Makes a published checkpoint a version of `vdvae-<recipe>` with the alias `published`.

    Its figures are those of the published arithmetic on this recipe's images, and of the
    normalised likelihood beside it. Doing it again goes on where it was.

    Args:
        recipe_name: whose model it is; its shards must exist.
        file: the checkpoint on this machine; by default it is fetched.
        url: to fetch it from; by default the published address.
        seed: which of the four CIFAR-10 models, 0 to 3.

    Raises:
        UserError: it cannot be had, is not what it was, or is not of this model.
    """
    recipe, places = load_recipe(recipe_name), Places.from_env()
    manifest = Manifest.load(places.manifest(recipe_name))
    if file is None:
        url = url or _address(recipe_name, seed)
        file = FOLDER / url.rpartition("/")[2]
        download(url, file, "give --file or --url")
    elif not file.is_file():
        raise UserError(f"{file}: there is no such file; leave --file out to fetch it")
    sha256 = hold(file, SUMS)
    weights = read_checkpoint(file)

    from vdvae.checkpoint import save
    from vdvae.published import load_published

    arithmetic: Likelihood = "published_5bit" if recipe.model.num_levels == 32 else "published"
    published = replace(recipe, model=replace(recipe.model, likelihood=arithmetic))
    model = load_published(published.model, weights)
    there = replace(places, results_root=RESULTS)
    results = there.results(recipe_name)
    save(model, there.model(recipe_name))
    measure(published, there)
    normalised = load_published(replace(recipe.model, likelihood="normalised"), weights)
    metrics = read_json(results / "metrics.json", "run the same command again")
    metrics |= _normalised(recipe, normalised, manifest, places)
    atomic_write_json(results / "metrics.json", metrics)
    origin = {"file": file.name, "sha256": sha256}
    return registry.register(published, there, origin=origin)


def _normalised(
    recipe: Recipe, model: Any, manifest: Manifest, places: Places
) -> dict[str, dict[str, float | int]]:
    """The figures of the same weights with probabilities that sum to 1."""
    from vdvae.evaluate import evaluate
    from vdvae.precision import exact_float32
    from vdvae.training import device_of

    exact_float32()
    model = model.to(device_of(recipe.train))
    store, settings = open_store(places.store_url), recipe.evaluate
    found = {}
    for split in SPLITS:
        batches = ShardReader(manifest, store, split).scan(settings.batch_size)
        images = manifest.splits[split].images
        scores = evaluate(model, batches, settings.seed, images, passes=settings.passes)
        tell(f"{split}, normalised", scores, model.config.likelihood)
        found[f"{split}_normalised"] = scores.summary()
    return found


def _address(recipe: str, seed: int) -> str:
    if recipe not in ADDRESSES:
        raise UserError(f"{recipe}: has no published checkpoint; {', '.join(ADDRESSES)} have")
    known = ADDRESSES[recipe]
    if not 0 <= seed < len(known):
        raise UserError(
            f"seed: {recipe} was published with seeds 0 to {len(known) - 1}, not {seed}"
        )
    return known[seed]


def read_checkpoint(file: Path) -> Mapping[str, Any]:
    """The tensors of a checkpoint by their published names; nothing in it is run.

    Raises:
        UserError: it is no state dict of tensors, is damaged, or holds code.
    """
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the pickle's protocol
            weights = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # PyTorch's own words advise to switch the protection off.
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        asks = f" (it asks for {found[1]})" if found else ""
        raise UserError(
            f"{file}: holds more than tensors and was refused, nothing of it was run{asks}; use a "
            f"checkpoint of weights alone"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, zipfile.BadZipFile) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{file}: is damaged ({reason}); remove it and fetch it again") from None
    tensors = isinstance(weights, Mapping) and all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in weights.items()
    )
    if not tensors or not weights:
        raise UserError(f"{file}: is no mapping of names to tensors; use a published state dict")
    return weights

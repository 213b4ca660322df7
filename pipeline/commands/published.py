"""The authors' checkpoints: fetched, held to their hash, measured and registered (Table 2).

A published file is a pickled state dict. It is read with PyTorch's restricted unpickler, which
builds tensors and runs nothing; what else it holds is refused.
"""

from __future__ import annotations

import io
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.params import Places, Recipe, load_recipe
from pipeline.registry import register as registry
from pipeline.shards import Manifest, ShardReader
from pipeline.sources.fetch import download, held
from pipeline.stages.evaluate import SPLITS, measure
from pipeline.stages.scoring import tell
from pipeline.storage import open_store
from vdvae.config import Likelihood, ModelConfig, UserError
from vdvae.files import atomic_write_json, read_json, read_regular

FOLDER = Path("data/raw/published")
SUMS = Path("data/published.json")  # sha256 by file name, of the first fetch; for git to keep
RESULTS = Path("results/published")
_MOST_BYTES = 2**31  # of a checkpoint; the largest published one has 0.5e9
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
    config = recipe.model
    if not isinstance(config, ModelConfig):
        raise UserError(f"{recipe_name}: is no VDVAE, as the published checkpoints are")
    manifest = Manifest.load(places.manifest(recipe_name))
    if file is None:
        url = url or _address(recipe_name, seed)
        file = FOLDER / url.rpartition("/")[2]
        download(url, file, "give --file or --url")
    elif not file.exists():
        raise UserError(f"{file}: there is no such file; leave --file out to fetch it")
    elif file.stat().st_size > _MOST_BYTES:  # before it is read for its hash
        raise UserError(f"{file}: has more than {_MOST_BYTES:,} bytes; name a checkpoint")

    from vdvae.checkpoint import save
    from vdvae.published import load_published

    arithmetic: Likelihood = "published_5bit" if recipe.model.num_levels == 32 else "published"
    as_published = replace(config, likelihood=arithmetic)
    published = replace(recipe, model=as_published)
    with held(file, SUMS) as sha256:
        weights = read_checkpoint(file)
        model = load_published(as_published, weights)
    there = replace(places, results_root=RESULTS)
    results = there.results(recipe_name)
    save(model, there.model(recipe_name))
    measure(published, there)
    normalised = load_published(replace(config, likelihood="normalised"), weights)
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
        UserError: it is no regular file, is too large, is no state dict of tensors, is damaged, or
            holds code.
    """
    import torch

    remedy = "remove it and fetch it again"
    data = read_regular(file, _MOST_BYTES, remedy)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the pickle's protocol
            _check_unpacked(data)
            weights = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # PyTorch's own words advise to switch the protection off.
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        asks = f" (it asks for {found[1]})" if found else ""
        raise UserError(
            f"{file}: holds more than tensors and was refused, nothing of it was run{asks}; use a "
            f"checkpoint of weights alone"
        ) from None
    except Exception as error:  # a damaged pickle makes PyTorch stumble over anything
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"{file}: is damaged ({reason}); {remedy}") from None
    tensors = isinstance(weights, Mapping) and all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in weights.items()
    )
    if not tensors or not weights:
        raise UserError(f"{file}: is no mapping of names to tensors; use a published state dict")
    for name, value in weights.items():
        plain = value.device.type == "cpu" and value.layout == torch.strided and not value.is_nested
        if value.dtype != torch.float32 or not plain:
            raise UserError(
                f"{file}: {name[:100]} is {value.dtype}, {value.layout}, on {value.device}; only "
                f"plain torch.float32 is read: convert it yourself, under a name that says so"
            )
    return weights


def _check_unpacked(data: bytes) -> None:
    """Raises ValueError for an archive that would unpack into more than a checkpoint may have."""
    if zipfile.is_zipfile(io.BytesIO(data)):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if sum(part.file_size for part in archive.infolist()) > _MOST_BYTES:
                raise ValueError(f"it unpacks into more than {_MOST_BYTES:,} bytes")

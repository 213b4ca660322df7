"""Registered models, found by name and used: from Python here, in the shell as `vdvae models`.

A `reference` is `NAME@ALIAS`, `NAME/VERSION`, either after `models:/`, or a name alone, which means
its champion. The registry is the one that MLFLOW_TRACKING_URI names, or the project's own.

Every function raises UserError, in one sentence: no such version, MLflow fails, the version's bytes
are not those that were registered, or an input is not what the model takes.

Shapes: N images, B a batch of them, H W, C image channels, Z latent channels.
"""

from __future__ import annotations

import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Tensor

import vdvae
from pipeline import tracking
from pipeline.dvc import LOCK
from pipeline.params import PARAMS, Places
from pipeline.pictures import to_NHWC
from pipeline.registry import aliases
from pipeline.registry.lineage import check_files, check_lock, check_shards
from pipeline.registry.versions import (
    Version,
    client_of,
    download,
    fetch,
    fetch_files,
    find,
    find_all,
)
from pipeline.shards import Manifest
from pipeline.sources.decode import FORMATS, OddImages, decode
from pipeline.sources.folder import NOT_READ, READ
from pipeline.sources.raw import read_image
from pipeline.sources.source import on_levels
from pipeline.storage import one_line, open_store
from pipeline.system.progress import counted
from pipeline.tracking.run import COPY, LOCK_COPY
from pipeline.yaml_files import read_yaml
from vdvae.checkpoint import CONFIG, WEIGHTS
from vdvae.config import AnyModelConfig, UserError
from vdvae.evaluate import Scores, evaluate
from vdvae.files import atomic_path, sha256_of, target_of
from vdvae.models import ImageModel, with_latents
from vdvae.precision import exact_float32
from vdvae.sampling import draw, images_a_batch, reconstruction_ladder
from vdvae.sampling import interpolate as way_between

_MOST_RECONSTRUCTED = 64


def versions() -> list[Version]:
    """Every version of every model in the registry, by name and number."""
    with client_of(Places.from_env()) as client:
        return find_all(client)


def get(reference: str) -> Version:
    """What the registry holds about one version."""
    places = Places.from_env()
    with client_of(places) as client:
        return find(client, reference, places)


def load(reference: str) -> ImageModel:
    """The model, on the CPU, in evaluation mode; its bytes are those that were registered."""
    return _load(reference)[1]


def describe(reference: str) -> dict[str, Any]:
    """A version's figures and where it comes from, as plain JSON types.

    Version -> MLflow run -> entries of dvc.lock -> manifest -> shards and source -> git revision
    -> Prefect run; and every move of the model's aliases.
    """
    places = Places.from_env()
    with client_of(places) as client, tempfile.TemporaryDirectory() as folder:
        version = find(client, reference, places)
        copies = (f"{COPY}/{version.recipe}.json", LOCK_COPY)
        manifest_path, lock = fetch_files(client, version, copies, Path(folder))
        manifest = Manifest.load(manifest_path)
        run = client.get_run(version.run_id)
        moves = aliases.history(client, version.name)
        splits = {split: version.figure(split) for split in ("validation", "test")}
        return {
            "name": version.name,
            "version": version.number,
            "aliases": list(version.aliases),
            "created": version.created,
            "bits_per_dim": {
                split: {"mean": found[0], "se": found[1]}
                for split, found in splits.items()
                if found
            },
            "num_levels": version.tags.get("num_levels"),
            "likelihood": version.tags.get("likelihood"),
            "decision": version.tags.get("alias_decision"),
            "weights_sha256": version.tags.get("weights_sha256"),
            "source": version.source,
            "mlflow_run": {
                "id": version.run_id,
                "name": run.info.run_name,
                "status": run.info.status,
            },
            "dvc_lock": list(read_yaml(lock) or {}),
            "manifest": {
                "digest": manifest.digest,
                "splits": {
                    name: {
                        "images": split.images,
                        "shards": {shard.name: shard.sha256 for shard in split.shards},
                    }
                    for name, split in manifest.splits.items()
                },
            },
            "data_source": {
                "name": manifest.source.name,
                "terms": manifest.source.terms,
                "fingerprint": manifest.source.fingerprint,
            },
            "git_revision": version.tags.get("git_revision"),
            "git_dirty": version.tags.get("git_dirty") == "true",
            "environment": version.tags.get("environment"),
            "prefect_flow_run": version.tags.get("prefect_flow_run"),
            "moves": [str(move) + f", {move.when}, by {move.who}" for move in moves],
        }


@dataclass
class Verification:
    """What the bytes themselves say about a version."""

    differences: list[str] = field(default_factory=list)  # a sentence each
    notes: list[str] = field(default_factory=list)  # what could not be compared, and why
    checked: list[str] = field(default_factory=list)


def verify(reference: str) -> Verification:
    """Hashes the real bytes: the version's files, the store's shards, and the checkout's lineage.

    The manifest and dvc.lock of the current folder are compared with the version's own copies;
    where the folder is no checkout, or has gone on to another training, a note says so.
    """
    places, found = Places.from_env(), Verification()
    with client_of(places) as client:
        version = find(client, reference, places)
    with tempfile.TemporaryDirectory() as folder:
        root = download(version, places, Path(folder))
        sums = version.tags.get("files_sha256", "")
        found.differences += [f"{version}: {what}" for what in check_files(root, sums)]
        found.checked.append(f"{sum(path.is_file() for path in root.rglob('*'))} files")
        _verify_shards(version, root, places, found)
        _verify_checkout(version, root, places, found)
    return found


def _verify_shards(version: Version, root: Path, places: Places, found: Verification) -> None:
    # The version's own copy, or else the checkout's: whichever is what was registered.
    for path in (root / COPY / f"{version.recipe}.json", places.manifest(version.recipe)):
        try:
            manifest = Manifest.load(path)
        except UserError:
            continue
        if manifest.digest == version.tags.get("manifest_digest"):
            found.differences += check_shards(manifest, open_store(places.store_url))
            shards = sum(len(split.shards) for split in manifest.splits.values())
            found.checked.append(f"{shards} shards")
            return
    found.differences.append(
        f"no manifest has the digest that was registered, {version.tags.get('manifest_digest')}; "
        f"the shards cannot be checked"
    )


def _verify_checkout(version: Version, root: Path, places: Places, found: Verification) -> None:
    recipe, copy = version.recipe, root / COPY / f"{version.recipe}.json"
    if not PARAMS.exists():
        found.notes.append(
            f"{Path.cwd()} is no checkout of the project; no manifest or {LOCK} is compared"
        )
        return
    try:
        recorded = read_yaml(root / LOCK_COPY) or {}
        lock = list(check_lock(recorded, recipe))
    except (OSError, ValueError, AttributeError):
        return  # the version's own copy is damaged, which has been said
    weights, run_file = places.model(recipe) / WEIGHTS, places.results(recipe) / "run.json"
    ours = weights.exists() and sha256_of(weights) == version.tags.get("weights_sha256")
    run = tracking.find_run(places, run_file) if run_file.exists() else None
    trained = [what for what in lock if what.startswith(f"{LOCK}: train@{recipe}")]
    if trained and not (ours and run and run[1] == version.run_id):
        found.notes.append(
            f"this checkout is of another training, so its {LOCK} and manifest are not compared "
            f"({trained[0]})"
        )
        return
    found.differences += lock
    if weights.exists() and not ours:
        found.differences.append(f"{weights}: is not the model that was registered")
    manifest = places.manifest(recipe)
    if not manifest.exists():
        found.differences.append(f"{manifest}: is missing; run 'dvc checkout {manifest}'")
    elif manifest.read_bytes() != copy.read_bytes():
        found.differences.append(f"{manifest}: has changed")
    found.checked.append(f"{manifest}, {len(recorded)} entries of {LOCK}")


def sample(reference: str, n: int = 16, temperature: float = 1.0, seed: int = 0) -> np.ndarray:
    """Draws images, uint8 N H W C; the same ones that the version's `predict` draws.

    Args:
        reference: of the model.
        n: how many, 1 to 4096.
        temperature: scale of the prior's standard deviation, 0 to 2.
        seed: the same gives the same images.
    """
    return to_NHWC(draw(_load(reference)[1], n, temperature, seed))


def score(reference: str, folder: Path) -> Scores:
    """The likelihood of every image of a folder; `bits_per_dim_B` of the result, by `keys`.

    The draws of the posterior are evaluate's, so that an image of the test split gets its figure.
    Keys are the files' names, relative to the folder. Colour becomes grey or grey colour where the
    model wants it; sizes must be the model's.
    """
    version, model = _load(reference)
    paths = _images(folder, model.config)
    return evaluate(
        model,
        counted(_batches(paths, folder, model.config), "scoring", len(paths)),
        version.seed,
        len(paths),
        passes=version.passes,
    )


def encode(reference: str, folder: Path, output: Path) -> int:
    """Writes the latents of every image of a folder as an .npz; the number of images.

    It has `keys` [N], the files' names, and for each stochastic layer, top first, an array
    `layer_<number>_<resolution>x<resolution>` [N,Z,H,W], float32: the means of the posteriors, each
    given the means above it. Memory holds one batch; the disk beside `output` all of it twice.
    """
    model = with_latents(_load(reference)[1])
    paths = _images(folder, model.config)
    keys: list[str] = []
    with (
        atomic_path(output) as temporary,
        tempfile.TemporaryDirectory(dir=target_of(output).parent, prefix=".latents.") as parts,
    ):
        names = [
            f"layer_{number:03d}_{shape[1]}x{shape[2]}"
            for number, shape in enumerate(model.config.latent_shapes)
        ]
        arrays = [
            open_memmap(f"{parts}/{name}.npy", "w+", np.float32, (len(paths), *shape))
            for name, shape in zip(names, model.config.latent_shapes, strict=True)
        ]
        for batch, x_BCHW in _batches(paths, folder, model.config):
            latents = model.encode(x_BCHW.to(model.decoder.gain.device), mean=True)
            for array, z_BZHW in zip(arrays, latents, strict=True):
                array[len(keys) : len(keys) + len(batch)] = z_BZHW.float().cpu().numpy()
            keys += batch
        for array in arrays:
            array.flush()
        np.save(f"{parts}/keys.npy", np.array(keys))
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
            for name in ("keys", *names):
                archive.write(f"{parts}/{name}.npy", f"{name}.npy")
    return len(keys)


def reconstruct(
    reference: str, folder: Path, n: int = 8, seed: int = 0
) -> tuple[list[np.ndarray], np.ndarray]:
    """The ladder of reconstructions of a folder's first images, and the images, uint8 N H W C.

    A rung of the ladder holds the images as the latents up to one resolution determine them
    (Child 2021, Fig. 4), lowest first.

    Args:
        reference: of the model.
        folder: of images of the model's size.
        n: how many images, by name, 1 to 64.
        seed: of all draws.
    """
    if not 1 <= n <= _MOST_RECONSTRUCTED:
        raise UserError(f"n: {n} is out of bounds; use 1 to {_MOST_RECONSTRUCTED} images")
    _, model = _load(reference)
    paths = _images(folder, model.config)[:n]
    ladder: list[list[np.ndarray]] = []
    originals = []
    for _, x_BCHW in _batches(paths, folder, model.config):
        rungs = reconstruction_ladder(model, x_BCHW, seed)
        ladder.append([to_NHWC(rung_BCHW) for rung_BCHW in rungs.values()])
        originals.append(to_NHWC(x_BCHW))
    return [np.concatenate(parts) for parts in zip(*ladder, strict=True)], np.concatenate(originals)


def interpolate(
    reference: str, first: Path, last: Path, steps: int = 8, seed: int = 0
) -> np.ndarray:
    """Images on the way between two, uint8 N H W C; how: `vdvae.sampling.interpolate`.

    Args:
        reference: of the model.
        first: an image of the model's size.
        last: another one.
        steps: how many images, the reconstructions of both ends among them.
        seed: of all draws.
    """
    _, model = _load(reference)
    ends = _checked([first, last], model.config)
    x_CHW, y_CHW = (_read(path, model.config) for path in ends)
    return to_NHWC(way_between(model, x_CHW, y_CHW, steps, seed))


def export(reference: str, folder: Path) -> Version:
    """Makes a folder with the weights, their config and the model card, at once or not at all.

    `vdvae.load(folder)` opens it, without MLflow.
    """
    places = Places.from_env()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder}: is there already; name a new folder")
    folder.absolute().parent.mkdir(parents=True, exist_ok=True)
    with (
        client_of(places) as client,
        tempfile.TemporaryDirectory() as temporary,
        tempfile.TemporaryDirectory(
            dir=folder.absolute().parent, prefix=f".{folder.name[:40]}."
        ) as new,
    ):
        version = find(client, reference, places)
        model = fetch(version, places, Path(temporary))
        (card,) = fetch_files(client, version, ("model_card.md",), Path(temporary))
        made = Path(new) / "model"
        made.mkdir()
        for path in (model / WEIGHTS, model / CONFIG, card):
            with atomic_path(made / path.name) as target:
                shutil.copyfile(path, target)
        made.rename(folder)
    return version


def _load(reference: str) -> tuple[Version, ImageModel]:
    places = Places.from_env()
    with client_of(places) as client, tempfile.TemporaryDirectory() as folder:
        version = find(client, reference, places)
        model = vdvae.load(fetch(version, places, Path(folder)))
    exact_float32()
    return version, model.to("cuda" if torch.cuda.is_available() else "cpu")


def _images(folder: Path, config: AnyModelConfig) -> list[Path]:
    """The image files below a folder by name, every one of which the model can read."""
    if not folder.is_dir():
        raise UserError(f"{folder}: is no folder; name one of {', '.join(FORMATS)} images")
    paths = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in (*READ, *NOT_READ)
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    if not paths:
        raise UserError(f"{folder}: has no images ({', '.join(READ)}); name another folder")
    return _checked(paths, config)


def _checked(paths: list[Path], config: AnyModelConfig) -> list[Path]:
    # All are looked at first: the model takes long, and half a result is none.
    sentences = []
    for path in paths:
        try:
            _read(path, config)
        except UserError as error:
            sentences.append(str(error))
    if sentences:
        raise OddImages(sentences)
    return paths


def _read(path: Path, config: AnyModelConfig) -> Tensor:
    name, size = one_line(str(path)), config.image_size
    picture = decode(read_image(path, name), name, config.image_channels)
    if picture.size != (size, size):
        raise UserError(
            f"{name}: is {picture.width}x{picture.height}, this model reads {size}x{size}; "
            f"crop or resize it"
        )
    image_HWC = np.asarray(picture).reshape(size, size, config.image_channels)
    return torch.from_numpy(on_levels(image_HWC, config.num_levels).transpose(2, 0, 1).copy())


def _batches(
    paths: Sequence[Path], folder: Path, config: AnyModelConfig
) -> Iterator[tuple[list[str], Tensor]]:
    size = images_a_batch(config)
    for start in range(0, len(paths), size):
        batch = paths[start : start + size]
        keys = [one_line(path.relative_to(folder).as_posix()) for path in batch]
        yield keys, torch.stack([_read(path, config) for path in batch])

"""`vdvae plan`: what a recipe will cost on the machine at hand, before anything runs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from pipeline.dvc import STAGES, pending
from pipeline.params import Places, Recipe, load_recipe
from pipeline.shards import Manifest
from pipeline.system import machine
from pipeline.system.launch import ranks_here
from pipeline.system.process import keep_freed_memory
from vdvae.config import TrainConfig, UserError

if TYPE_CHECKING:
    import torch

    from vdvae.summary import Summary

_STEPS, _UNCOUNTED = 10, 2  # of the probe; the first ones allocate and choose algorithms
_WORK_SPACE = 1.2  # what a step holds beside the estimate: the convolutions' own

Lines = Iterator[tuple[str, str]]


def plan(name: str, probe: bool = True) -> Lines:
    """What `name` needs, as (label, text); nothing is written. The probe comes last but one.

    Raises:
        UserError: for a recipe that is not there or not well formed.
    """
    from vdvae.summary import summarise

    recipe, places = load_recipe(name), Places.from_env()
    train = recipe.train
    found = summarise(recipe.model, train.checkpoint_activations_from, train.precision)
    images = train.steps * train.batch_size
    yield "parameters", f"{found.parameters:,}"
    yield "forward", f"{found.forward_flop / 1e9:,.2f} GFLOP an image"
    yield (
        "training",
        f"{train.batch_size * found.training_flop / 1e12:,.3f} TFLOP a step of "
        f"{train.batch_size} images",
    )
    yield (
        "whole run",
        f"{images * found.training_flop / 1e15:,.3f} PFLOP: {train.steps:,} steps, {images:,} "
        f"images",
    )
    ranks = ranks_here(recipe)
    images_at_once = at_once(recipe, ranks)
    needed = training_bytes(train, found, images_at_once, ranks)
    yield (
        "memory, training",
        f"about {_bytes(needed)} on each of {ranks} "
        f"device{'s' if ranks > 1 else ''}, {images_at_once} images at once in {train.precision}, "
        f"and the convolutions' work space",
    )
    yield (
        "memory, evaluation",
        f"about {_bytes(evaluation_bytes(recipe, found))} at {recipe.evaluate.batch_size} images",
    )
    yield from _disk(recipe, places, found)
    yield (
        "hours of training",
        _hours(recipe, found, ranks) if probe else "not measured (--no-probe)",
    )
    yield from _stages(name)


def at_once(recipe: Recipe, ranks: int) -> int:
    """Images whose activations a rank keeps together."""
    return max(1, recipe.train.batch_size // (ranks * recipe.train.accumulation))


def training_bytes(train: TrainConfig, found: Summary, images: int, ranks: int = 1) -> int:
    """An estimate of what a rank holds in a training step of so many images at once."""
    best = 4 * found.parameters if train.validate_every else 0  # a copy of the best weights
    keeps_gradients = ranks > 1 or train.accumulation > 1
    return found.training_bytes(images, keeps_gradients) + best


def evaluation_bytes(recipe: Recipe, found: Summary) -> int:
    """An estimate of what scoring a batch holds: weights, the encoder's activations of every
    resolution, and the likelihood's terms of every pixel and mixture, in float32."""
    model = recipe.model
    activations = sum(row.width * row.resolution**2 for row in found.rows)
    block = 4 * model.width * model.image_size**2  # input, both halves of a block, its output
    likelihood = 10 * model.mixtures * model.dims
    return 4 * (found.parameters + recipe.evaluate.batch_size * (activations + block + likelihood))


def _disk(recipe: Recipe, places: Places, found: Summary) -> Lines:
    path = recipe.data.path
    if path.startswith("s3://"):
        raw = "not told: it lies in S3"
    elif not path:
        raw = "none"
    elif not Path(path).exists():
        raw = f"not known: {path} is not there yet"
    else:
        files = [Path(path)] if Path(path).is_file() else Path(path).rglob("*")
        raw = (
            f"{_bytes(sum(file.stat().st_size for file in files if file.is_file()))}, there already"
        )
    yield "disk, raw images", raw
    manifest = places.manifest(recipe.name)
    if manifest.exists():
        splits = Manifest.load(manifest).splits.values()
        size = sum(shard.bytes for split in splits for shard in split.shards)
        count = sum(split.images for split in splits)
        yield "disk, shards", f"{_bytes(size)} for {count:,} images, by {manifest}"
    else:
        each = recipe.model.dims
        yield "disk, shards", f"at most about {_bytes(1000 * each)} for each 1,000 images"
    model = 4 * found.parameters
    copies = 5 if recipe.train.validate_every else 4  # weights, two moments, average, best
    keep = recipe.train.keep_checkpoints
    kept = keep + 1  # the new one is whole before the oldest goes
    yield (
        "disk, checkpoints",
        f"{_bytes(kept * copies * model)}: {keep} of {_bytes(copies * model)}, and one "
        f"while it is written",
    )
    yield "disk, results", f"{_bytes(model)} for the model, and pictures"
    yield "disk, MLflow", f"{_bytes(model)} for each registered version, and pictures"


def _hours(recipe: Recipe, found: Summary, ranks: int) -> str:
    """Hours by a probe of ten steps, or in words why there is none."""
    import torch

    from vdvae.training import check_machine, device_of

    try:
        device = device_of(recipe.train)
        check_machine(recipe.train, device)
    except UserError as error:
        return f"not measured: {error}"
    free = (
        torch.cuda.mem_get_info(device)[0]
        if device.type == "cuda"
        else psutil.virtual_memory().available
    )
    images_at_once = at_once(recipe, ranks)
    needed = _WORK_SPACE * training_bytes(recipe.train, found, images_at_once, ranks)
    if needed > free:
        return (
            f"not measured: a step of {images_at_once} images at once needs about "
            f"{_bytes(needed)} and this machine's {device.type} has {_bytes(free)} free; "
            f"raise train.accumulation, set train.checkpoint_activations_from, or run it where "
            f"there is more"
        )
    try:
        seconds = probe_seconds(recipe, device, recipe.train.batch_size // ranks)
    except torch.OutOfMemoryError:
        return f"not measured: a step did not fit into the {_bytes(free)} that were free"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else machine.processor()
    how = "" if device.type == "cuda" else f", {torch.get_num_threads()} threads"
    how += f", one of {ranks} ranks, what they say to each other not counted" if ranks > 1 else ""
    return (
        f"{recipe.train.steps * seconds / 3600:,.2f} h at {seconds:.3f} s a step, "
        f"{recipe.train.batch_size / seconds:,.1f} img/s; validation and pictures not counted "
        f"(median of {_STEPS - _UNCOUNTED} steps with random images, {name}{how})"
    )


def probe_seconds(recipe: Recipe, device: torch.device, images: int) -> float:
    """The median time of a rank's training step with the true model and so many random images."""
    import dataclasses

    import torch

    from vdvae.precision import exact_float32
    from vdvae.training import start, update

    exact_float32()
    keep_freed_memory()
    model = recipe.model
    # Random images have gradients of any norm; a skipped step would seem quicker than it is.
    config = dataclasses.replace(recipe.train, skip_threshold=1e30)
    state = start(model, config, device)
    generator = torch.Generator().manual_seed(0)
    shape = (images, model.image_channels, model.image_size, model.image_size)
    x_BCHW = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8).to(device)
    times = []
    for _ in range(_STEPS):
        began = time.monotonic()
        noise_BN = torch.randn(images, model.num_latents, generator=generator)
        update(state, config, x_BCHW, noise_BN.to(device))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.monotonic() - began)
    return statistics.median(times[_UNCOUNTED:])


def _stages(recipe: str) -> Lines:
    try:
        reasons = pending(recipe)
    except UserError as error:
        yield "reused or rerun", f"cannot be told: {error}"
        return
    rerun_before = False
    for stage in STAGES:
        if stage in reasons:
            text = f"rerun, or taken from DVC's cache: {reasons[stage]}"
        elif rerun_before:
            text = "reused, if the stages before it give what they gave"
        else:
            text = "reused"
        rerun_before = rerun_before or stage in reasons
        yield stage, text


def _bytes(size: float) -> str:
    return f"{size / 2**30:,.2f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"

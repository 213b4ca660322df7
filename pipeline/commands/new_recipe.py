"""`vdvae recipe new`: a recipe for somebody's own images, made from their size and number."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.mergevalue import MergeValue

from pipeline.commands.plan import training_bytes
from pipeline.params import (
    PARAMS,
    RECIPE,
    SHARED_WITH_MODEL,
    DataConfig,
    EvaluateConfig,
    Places,
    Recipe,
    RegisterConfig,
    SampleConfig,
    read_document,
    read_params,
    write_document,
)
from pipeline.shards import Manifest, odd_list_of, refuse_or_skip
from pipeline.shards.writer import mean_std
from pipeline.sources.decode import OddImage
from pipeline.sources.folder import READ, Folder, file_of
from pipeline.storage import shown_url
from vdvae.config import ModelConfig, TrainConfig, UserError, shown
from vdvae.files import path_of

_READ_AT_MOST = 1000  # images that are looked at for mean and standard deviation
_LARGEST_POOL = 16  # more in one step leaves nothing of an image (the paper: 4)
_ROOM = 0.7  # of the memory; the convolutions' work space and the rest of the machine need theirs
_BATCHES = (32, 16, 8)
_TINY_BATCHES = (4, 2, 1)
_CPU_WIDTH, _CPU_STEPS = 64, 10_000  # a start that a CPU ends in hours or days, not in years
_EPOCHS = 200


@dataclass(frozen=True)
class _Scale:
    """One size of model: those of the paper are the last, the others shrink it."""

    images: int  # from so many images on
    width: int
    depth: int  # stochastic layers at the resolution that has most
    learning_rate: float


_SCALES = (
    _Scale(0, 32, 2, 1e-3),
    _Scale(1_000, 64, 4, 5e-4),
    _Scale(5_000, 128, 8, 4e-4),
    _Scale(20_000, 256, 14, 3e-4),
    _Scale(50_000, 384, 22, 2e-4),
)


@dataclass(frozen=True)
class Made:
    """A recipe that was written, and what a person is to know of it."""

    recipe: Recipe
    images: int
    normalised_by: str
    active: tuple[str, ...]

    def __str__(self) -> str:
        name, model, train = self.recipe.name, self.recipe.model, self.recipe.train
        assert isinstance(model, ModelConfig)
        if name in self.active:
            run = f"dvc repro register@{name}"
        else:
            run = f"dvc exp run -S 'active=[{','.join([*self.active, name])}]'"
        return (
            f"params.yaml: recipes.{name}: {self.images:,} images, {model.image_channels} "
            f"channels, mean and standard deviation of {self.normalised_by}\n"
            f"  encoder {model.encoder}\n"
            f"  decoder {model.decoder}\n"
            f"  width {model.width}, {train.steps:,} steps of {train.batch_size} images\n"
            f"next:\n"
            f"  vdvae plan {name}\n"
            f"  {run}"
        )


def new_recipe(
    name: str,
    data: str,
    size: int,
    *,
    channels: int | None = None,
    levels: int = 256,
    memory_gib: float | None = None,
    batch_size: int | None = None,
    unreadable: str = "refuse",
    activate: bool = False,
    path: Path = PARAMS,
) -> Made:
    """Appends a recipe to params.yaml, whose comments and order stay.

    Args:
        name: the new recipe's.
        data: a folder, or s3://bucket/prefix, of images of any sizes.
        size: pixels a side that they are cropped to.
        channels: 1 or 3; None: 1 where all images that are looked at are grey.
        levels: grey levels.
        memory_gib: what training may hold; None: this machine's GPU memory, or its RAM.
        batch_size: images a step; None: what fits, 32 at most.
        unreadable: what to do about files that are no images, `refuse` or `skip`.
        activate: whether the recipe joins `active`.

    Raises:
        UserError: naming what does not do; params.yaml stays as it is then.
    """
    params = read_params(path)
    if not re.fullmatch(RECIPE, name):
        raise UserError(
            f"NAME: {shown(name)} is no name of a recipe; use 1 to 60 of the letters A-Z "
            f"a-z, digits, '_' and '-'"
        )
    if name in params["recipes"]:
        raise UserError(
            f"{path}: recipes.{name}: is there already; choose another name, or edit it there"
        )
    if memory_gib is not None and not 0 < memory_gib < float("inf"):
        raise UserError(f"--memory: {memory_gib} GiB hold nothing; give more than 0")
    pools = pools_of(size)
    facts = {
        "source": "folder",
        "path": _place(data),
        "image_size": size,
        "resize": "crop",
        "unreadable": unreadable,
    }
    config = DataConfig.from_dict({**facts, "channels": channels or 3, "num_levels": levels})
    images, mean, std, grey, normalised_by = _look(name, config)
    share = 0.1 if images >= 100 else 0.2  # so that no split of a small folder is left empty
    config = DataConfig.from_dict(
        {
            **facts,
            "channels": channels or (1 if grey else 3),
            "num_levels": levels,
            "validation": share,
            "test": share,
        }
    )
    model, train = _fit(config, pools, images, mean, std, memory_gib, batch_size)
    recipe = Recipe(
        name=name,
        data=config,
        model=model,
        train=train,
        evaluate=EvaluateConfig(batch_size=max(train.batch_size, 64 if size <= 64 else 8)),
        sample=SampleConfig(n=16),
        register=RegisterConfig(),
    )

    document = read_document(path)
    document["recipes"][name] = _sections(recipe, document.get("defaults", {}))
    # A blank line and a comment in front, as the file's other recipes have them.
    document["recipes"].yaml_set_comment_before_after_key(
        name,
        before=f"\nMade by 'vdvae recipe new' for {images:,} images; normalised by {normalised_by}",
        indent=2,
    )
    if activate:
        document["active"].append(name)
    write_document(document, path)
    return Made(recipe, images, normalised_by, tuple(map(str, document["active"])))


def pools_of(size: int) -> tuple[int, ...]:
    """Pooling factors from an image's resolution to 1: small ones first, 4 to 1 at once.

    Raises:
        UserError: for a size that small factors do not lead down from.
    """
    if not 2 <= size <= 4096:
        raise UserError(f"--size: {size} is not from 2 to 4096 pixels a side")
    factors = _prime_factors(size)
    if factors[-1] > _LARGEST_POOL:
        near = [n for n in range(2, 4097) if _prime_factors(n)[-1] <= 3]
        below = max((n for n in near if n < size), default=2)
        above = min((n for n in near if n > size), default=4096)
        raise UserError(
            f"--size: {size} pixels can only be pooled by {factors[-1]} at once, which leaves "
            f"nothing of an image; take {below} or {above}"
        )
    if factors[-2:] == [2, 2]:
        factors[-2:] = [4]  # as in the published models
    return tuple(factors)


def _prime_factors(number: int) -> list[int]:
    factors, factor = [], 2
    while number > 1:
        while number % factor == 0:
            factors.append(factor)
            number //= factor
        factor += 1
    return factors


def blocks(size: int, pools: tuple[int, ...], depth: int) -> tuple[str, str]:
    """Block strings of encoder and decoder, with blocks at every resolution down to 1.

    The numbers of blocks follow the published models: most at 32x32, in proportion to the
    resolution below it and to its inverse above, half as many in the encoder.
    """
    most = min(size, 32)

    def count(resolution: int, depth: float) -> int:
        return max(1, round(depth * min(resolution / most, most / resolution)))

    encoder: list[str] = []
    decoder: list[str] = []
    resolution = size
    for pool in pools:
        lower = resolution // pool
        encoder += [f"{resolution}x{count(resolution, depth / 2)}", f"{resolution}d{pool}"]
        more = count(resolution, depth) - 1
        decoder[:0] = [f"{resolution}m{lower}"] + ([f"{resolution}x{more}"] if more else [])
        resolution = lower
    return ",".join([*encoder, "1x1"]), ",".join(["1x1", *decoder])


def widths(size: int, pools: tuple[int, ...], width: int) -> tuple[int, str]:
    """The width at the image's resolution, and the pairs of `model.widths`.

    Above 256 pixels they fall with the resolution, as in the published model of 1024.
    """
    if size <= 256:
        return width, ""
    at: dict[int, int] = {}
    resolution = size
    for pool in pools:
        at[resolution] = width if resolution <= 128 else max(8, width * 32 // resolution)
        resolution //= pool
    at[1] = width
    return at[size], ",".join(f"{r}:{w}" for r, w in at.items() if r != size)


def _fit(
    data: DataConfig,
    pools: tuple[int, ...],
    images: int,
    mean: float,
    std: float,
    memory_gib: float | None,
    batch_size: int | None,
) -> tuple[ModelConfig, TrainConfig]:
    """The largest model that the images support and the memory holds at a useful batch."""
    import torch

    from vdvae.summary import summarise

    cuda = torch.cuda.is_available()
    memory = memory_gib and memory_gib * 2**30
    if memory is None:
        memory = torch.cuda.mem_get_info()[1] if cuda else psutil.virtual_memory().total
    slow = not cuda and memory_gib is None
    scales = [
        scale
        for scale in reversed(_SCALES)
        if scale.images <= images and not (slow and scale.width > _CPU_WIDTH)
    ]
    needed = 0
    for scale in scales:
        encoder, decoder = blocks(data.image_size, pools, scale.depth)
        width, pairs = widths(data.image_size, pools, scale.width)
        model = ModelConfig(
            image_size=data.image_size,
            image_channels=data.channels,
            num_levels=data.num_levels,
            encoder=encoder,
            decoder=decoder,
            width=width,
            widths=pairs,
            shift=round(-mean, 4),
            scale=float(f"{1 / std:.6g}"),
        )
        found = summarise(model)
        batches = _BATCHES + (_TINY_BATCHES if scale is scales[-1] else ())
        batches = tuple(batch for batch in batches if batch <= max(images // 4, 1))
        for batch in batches if batch_size is None else (batch_size,):
            train = _training(scale, batch, images, slow)
            needed = training_bytes(train, found, batch)
            if needed <= _ROOM * memory:
                return model, train
    raise UserError(
        f"--memory: the smallest model for {data.image_size}x{data.image_size} needs about "
        f"{needed / 2**30 / _ROOM:.1f} GiB and there are {memory / 2**30:.1f}; "
        f"take a smaller --size{' or --batch' if batch_size else ''}"
    )


def _training(scale: _Scale, batch: int, images: int, slow: bool) -> TrainConfig:
    steps = min(max(_EPOCHS * images // batch, 2000), _CPU_STEPS if slow else 200_000)
    steps = round(steps, -3)
    return TrainConfig(
        steps=steps,
        batch_size=batch,
        learning_rate=scale.learning_rate,
        ema_decay=0.999 if steps < 50_000 else 0.9999,
        log_every=100,
        validate_every=500 if steps <= 20_000 else 2000,
        checkpoint_every=250 if steps <= 20_000 else 1000,
    )


def _place(data: str) -> str:
    if data.startswith("s3://"):
        return data
    folder = Path(os.path.realpath(path_of(data)))
    if not folder.is_dir():
        raise UserError(
            f"--data: {shown_url(data)} is no folder on this machine; give a folder of images or "
            f"s3://bucket/prefix"
        )
    here = Path.cwd().resolve()
    return str(folder.relative_to(here) if folder.is_relative_to(here) else folder)


def _look(name: str, data: DataConfig) -> tuple[int, float, float, bool, str]:
    """Images in all; mean and standard deviation in 0..255; all grey or not; what they are of."""
    source, places = Folder(name, data), Places.from_env()
    listed, odd = source.listed(Counter())
    files = [file_of(entry) for entry in listed]
    if not files and not odd:
        raise UserError(
            f"--data: {shown_url(data.path)} has no images ({', '.join(READ)}); put some there, "
            f"or give another folder"
        )
    every = -(-len(files) // _READ_AT_MOST) or 1
    histogram = np.zeros(256, np.int64)
    looked_at, grey = 0, True
    for found in source.load(files[::every], Counter()):
        if isinstance(found, OddImage):
            odd.append(found)
            continue
        image_HWC = found.image_HWC
        looked_at += 1
        histogram += np.bincount(image_HWC.ravel(), minlength=256)
        grey = grey and bool((image_HWC == image_HWC[..., :1]).all())
    refuse_or_skip(name, data.unreadable, odd, odd_list_of(places.runs, name), "--unreadable skip")
    if not looked_at:
        raise UserError(
            f"--data: {shown_url(data.path)} has no images that can be read; give another folder"
        )
    manifest = places.manifest(name)
    if manifest.exists():
        known = Manifest.load(manifest)
        if tuple(known.shape[:2]) == (data.image_size,) * 2 and known.num_levels == data.num_levels:
            return len(files), known.mean, max(known.std, 1.0), grey, f"the manifest {manifest}"
    mean, std = mean_std(histogram)
    what = "all of them" if looked_at == len(files) else f"{looked_at:,} of them"
    return len(files), mean, max(std, 1.0), grey, what


def _sections(recipe: Recipe, defaults: Mapping[str, Any]) -> CommentedMap:
    """A recipe as params.yaml shows one: it merges the defaults, and says what is its own."""
    sections = CommentedMap()
    for name in ("data", "model", "train", "evaluate", "sample", "register"):
        values = getattr(recipe, name).to_dict()
        if name == "model":
            values = {k: v for k, v in values.items() if k not in SHARED_WITH_MODEL}
        shared = defaults.get(name)
        if isinstance(shared, CommentedMap) and shared.anchor.value:
            values = {k: v for k, v in values.items() if k not in shared or shared[k] != v}
            sections[name] = CommentedMap(values)
            merge = MergeValue()
            merge.append(shared)
            merge.merge_pos = 0
            sections[name].add_yaml_merge(merge)
        else:
            sections[name] = CommentedMap(values)
    return sections

"""What a study shows beside bits/dim: its figure, and further columns of its table."""

from __future__ import annotations

import itertools
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.dvc import dvc
from pipeline.params import Places, Recipe
from pipeline.report.charts import Chart, Line
from pipeline.shards import Manifest, ShardReader
from pipeline.storage import open_store

if TYPE_CHECKING:
    from torch import Tensor

_DEAD_NATS = 0.1  # per image; a layer below carries nothing
_IMAGES = 8  # of reconstructions
_BATCH = 32  # images that features at the start are measured with

Rows = list[dict[str, Any]]  # of one variant's cells (`results.read_cell`), seed by seed
Columns = dict[str, list[float]]  # by heading, a number a seed


@dataclass(frozen=True)
class Shown:
    """One way to show a study, by `shows` of its declaration."""

    chart: Callable[[str, dict[str, Rows]], Chart]  # of the study's name and the variants' rows
    columns: Callable[[Rows], Columns] = lambda _: {}
    # Writes further pictures into the folder of the results.
    draw: Callable[[Path, dict[str, Rows], Places], None] = lambda *_: None


def _bits(name: str, of_variant: dict[str, Rows]) -> Chart:
    """Each seed's bits/dim by variant; the bars are standard errors over images."""
    lines = []
    for of_seed in zip(*of_variant.values(), strict=True):
        figures = [row["test"] for row in of_seed]
        lines.append(
            Line(
                name=f"seed {of_seed[0]['seed']}",
                points=[(x, figure["bits_per_dim"]) for x, figure in enumerate(figures)],
                errors=[figure["bits_per_dim_se"] for figure in figures],
            )
        )
    return Chart(
        title=name, y_label="bits/dim on test", x_label="", lines=lines, x_ticks=[*of_variant],
        legend=True,
    )  # fmt: skip


def _by_layer(row: dict[str, Any]) -> list[float]:
    """The rate of each stochastic layer, top first, in bits/dim."""
    return [layer["rate_bits_per_dim"] for layer in row["rates"]["rate_bits_per_dim_by_layer"]]


def _cumulative_rates(name: str, of_variant: dict[str, Rows]) -> Chart:
    """The cumulative rate by layer, mean over seeds (Fig. 5)."""
    lines = []
    for variant, rows in of_variant.items():
        means = [fmean(of_seeds) for of_seeds in zip(*map(_by_layer, rows), strict=True)]
        lines.append(Line(name=variant, points=[*enumerate([0.0, *itertools.accumulate(means)])]))
    return Chart(
        title=name, y_label="cumulative rate, bits/dim on test",
        x_label="stochastic layers from the top", lines=lines, legend=True,
    )  # fmt: skip


def _dead_layers(rows: Rows) -> Columns:
    recipe: Recipe = rows[0]["recipe"]
    bits = _DEAD_NATS / math.log(2) / recipe.model.dims
    dead = [float(sum(rate < bits for rate in _by_layer(row))) for row in rows]
    return {f"layers under {_DEAD_NATS} nats an image, of {len(_by_layer(rows[0]))}": dead}


def _shares(row: dict[str, Any]) -> dict[int, tuple[float, float]]:
    """By resolution, lowest first, the shares of all latent variables and of the whole rate."""
    layers = [layer["resolution"] for layer in row["rates"]["rate_bits_per_dim_by_layer"]]
    latents = sum(size**2 for size in layers)
    rates = row["rates"]["rate_bits_per_dim_by_resolution"]
    return {
        size: (layers.count(size) * size**2 / latents, rates[str(size)] / sum(rates.values()))
        for size in sorted({*layers})
    }


def _resolutions(name: str, of_variant: dict[str, Rows]) -> Chart:
    """The share of latent variables and of the rate at each resolution (Fig. 4), a seed a line."""
    rows = [row for of_seeds in of_variant.values() for row in of_seeds]
    shares = [_shares(row) for row in rows]
    lines = [Line(name="latents", points=[*enumerate(part for part, _ in shares[0].values())])]
    for row, of_row in zip(rows, shares, strict=True):
        points = [*enumerate(part for _, part in of_row.values())]
        lines.append(Line(name=f"rate, seed {row['seed']}", points=points))
    return Chart(
        title=name, y_label="share of the whole", x_label="resolution", lines=lines,
        x_ticks=[f"{size}x{size}" for size in shares[0]], legend=True,
    )  # fmt: skip


def _share_columns(rows: Rows) -> Columns:
    shares = [_shares(row) for row in rows]
    return {
        f"share of {what} at {size}x{size}": [of_row[size][place] for of_row in shares]
        for place, what in enumerate(("latents", "rate"))
        for size in shares[0]
    }


def _gradients(name: str, of_variant: dict[str, Rows]) -> Chart:
    """The greatest gradient norm of each interval, of the first seed (Fig. 6)."""
    lines = [
        Line(
            name=variant,
            points=[(p["step"], p["train/gradient_norm"]) for p in rows[0]["curves"]],
            thin=max,
        )
        for variant, rows in of_variant.items()
    ]
    return Chart(title=name, y_label="gradient norm, log scale", log=True, lines=lines, legend=True)


def _gradient_columns(rows: Rows) -> Columns:
    """Percentiles over the intervals of each one's greatest norm, where that is finite; features
    before training."""
    norms = [np.array([point["train/gradient_norm"] for point in row["curves"]]) for row in rows]
    finite = [of_seed[np.isfinite(of_seed)] for of_seed in norms]
    columns = {
        f"gradient norm, {words}": [float(np.percentile(of_seed, share)) for of_seed in finite]
        for words, share in (("median", 50), ("99%", 99), ("greatest", 100))
    }
    beyond = [float(len(all_of_it) - len(f)) for all_of_it, f in zip(norms, finite, strict=True)]
    if any(beyond):
        columns["intervals with a norm that is not finite"] = beyond
    at_start = [_features_at_start(row["recipe"]) for row in rows]
    return columns | {"features at the output before training, RMS": at_start}


def _features_at_start(recipe: Recipe) -> float:
    """Root mean square of what enters the output layer before training, for random images."""
    import torch

    from vdvae.model import VDVAE
    from vdvae.training import start

    model = start(recipe.model, recipe.train, torch.device("cpu")).model
    generator = torch.Generator().manual_seed(0)
    shape = (_BATCH, recipe.model.image_channels, *[recipe.model.image_size] * 2)
    x_BCHW = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    seen: list[Tensor] = []  # gain and bias, 1 and 0 at the start, leave the features as they are
    output = model.decoder.output if isinstance(model, VDVAE) else model.output
    output.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(x_BCHW, generator)
    return float(seen[0].square().mean().sqrt())


def _draw_reconstructions(folder: Path, of_variant: dict[str, Rows], places: Places) -> None:
    """Images from the latents up to each resolution (Fig. 4), of the first variant's first seed."""
    import vdvae
    from pipeline.pictures import draw_ladder, save_grid

    row = next(iter(of_variant.values()))[0]
    recipe: Recipe = row["recipe"]
    manifest = Manifest.load(row["manifest"])
    with tempfile.TemporaryDirectory() as scratch:
        model = f"{scratch}/model"
        dvc("get", ".", str(places.model(recipe.name)), "--rev", row["revision"], "-o", model)
        reader = ShardReader(manifest, open_store(places.store_url), "validation")
        _, originals = next(reader.scan(_IMAGES))
        images, columns = draw_ladder(vdvae.load(Path(model)), originals, recipe.sample.seed)
    save_grid(folder / "reconstructions.png", images, columns)


SHOWN = {
    "bits": Shown(_bits),
    "rates": Shown(_cumulative_rates, _dead_layers),
    "resolutions": Shown(_resolutions, _share_columns, _draw_reconstructions),
    "gradients": Shown(_gradients, _gradient_columns),
}

"""The figures of a recipe: curves of its training, and what is drawn with its model.

Shapes: B batch, C image channels, H W, L stochastic layers.
"""

from __future__ import annotations

import base64
import itertools
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import tracking
from pipeline.params import Places, Recipe
from pipeline.pictures import data_uri, save_grid, to_NHWC
from pipeline.report.charts import Chart, Line
from pipeline.shards import Manifest, ShardReader
from pipeline.storage import open_store
from vdvae.files import read_regular

if TYPE_CHECKING:
    import torch

    from vdvae.models import ImageModel

TEMPERATURES = (1.0, 0.85, 0.6)  # of the paper's Figs. 7 to 9
_SETTLED = 0.05  # of the steps, after which curves stay inside their frame
_PICTURE_BYTES = 700_000  # most of one picture; a larger one is shown at half its size
_DRAWING_BYTES = 1_000_000  # most of an SVG
_MOST_SAMPLES = 36
_SILENT_NATS = 0.01  # an image: a layer that carries less carries nothing

Facts = dict[str, Any]


def picture(path: Path) -> str | None:
    """A picture's `data:` address, of bounded size; None where it is not there."""
    return data_uri(path, _PICTURE_BYTES) if path.exists() else None


def svg_uri(path: Path) -> str | None:
    """A drawing's `data:` address, in which nothing of it is run; None where it is not there."""
    try:
        content = read_regular(path, _DRAWING_BYTES, "make it again")
    except FileNotFoundError:
        return None
    return "data:image/svg+xml;base64," + base64.b64encode(content).decode()


def training_figures(path: Path, settings: Facts) -> list[Facts]:
    """The curves of a training, each `{"svg", "title", "caption", "names"}`; none without a file.

    Args:
        path: of curves.csv.
        settings: of the training, as `section.key`.
    """
    points = tracking.read_curves(path) if path.exists() else []
    if not points:
        return []
    return [
        {
            "svg": svg,
            "title": chart.title,
            "caption": caption,
            "names": [line.name for line in chart.lines],
        }
        for chart, caption in _training_charts(points, settings)
        if (svg := chart.svg())
    ]


def _training_charts(
    points: list[dict[str, float]], settings: Facts
) -> Iterator[tuple[Chart, str]]:
    def line(name: str, key: str, **options: Any) -> Line:
        pairs = [(at["step"], at[f"train/{key}"]) for at in points if f"train/{key}" in at]
        return Line(name=name, points=pairs, **options)

    validation = line("validation", "validation_bits_per_dim")
    best = min(validation.points, key=lambda point: point[1], default=None)
    kept = f" The dot is the model that was kept, of step {best[0]:,.0f}." if best else ""
    yield (
        Chart(
            title="Negative ELBO",
            y_label="bits/dim",
            lines=[line("training", "bits_per_dim"), validation],
            settle=_SETTLED,
            mark=(f"{best[1]:.4f}", best) if best else None,
        ),
        f"Means over each interval in training; validation with the averaged weights.{kept}",
    )
    yield (
        Chart(
            title="Rate and distortion",
            y_label="bits/dim",
            lines=[
                line("rate", "rate_bits_per_dim"),
                line("distortion", "distortion_bits_per_dim"),
            ],
            settle=_SETTLED,
        ),
        "The two terms of the bound: what the latents cost, and what they leave.",
    )
    clip, threshold = settings["train.gradient_clip"], settings["train.skip_threshold"]
    skipped, steps = points[-1].get("train/skipped", 0), points[-1]["step"]
    norms = line("gradient norm", "gradient_norm", thin=max)
    without = sum(not math.isfinite(norm) for _, norm in norms.points)
    yield (
        Chart(
            title="Gradient norm",
            y_label="nats/dim, log scale",
            lines=[norms],
            log=True,
            levels=[(f"skip threshold {threshold:g}", threshold), (f"clip {clip:g}", clip)],
        ),
        f"The greatest of each interval, before clipping. Updates above the threshold are "
        f"skipped: {skipped:,.0f} of {steps:,.0f}."
        + (f" Not drawn: {without} that are not finite." if without else ""),
    )
    resolutions = {int(key.rpartition("_")[2]) for at in points for key in at if "/res_" in key}
    yield (
        Chart(
            title="Rate by resolution",
            y_label="bits/dim",
            lines=[
                line(f"{size}x{size}", f"rate_bits_per_dim/res_{size}")
                for size in sorted(resolutions)
            ],
        ),
        "What the layers of each resolution carry in training.",
    )
    yield (
        Chart(
            title="Learning rate",
            y_label="learning rate",
            lines=[line("learning rate", "learning_rate")],
        ),
        "Linear warm-up, then constant.",
    )
    yield (
        Chart(title="Speed", y_label="images/s", lines=[line("speed", "images_per_second")]),
        "In training, interval by interval; whatever else the machine did is in it.",
    )


def open_model(recipe: Recipe, places: Places) -> ImageModel:
    """The finished model of a recipe, on the device that it was trained on, in exact float32.

    Raises:
        UserError: it is missing or damaged, or the machine has no such device.
    """
    import vdvae
    from vdvae.precision import exact_float32
    from vdvae.training import device_of

    exact_float32()
    return vdvae.load(places.model(recipe.name)).to(device_of(recipe.train))


def draw_samples(model: ImageModel, seed: int) -> list[tuple[str, str | None]]:
    """A grid at each temperature: how it was drawn, and its `data:` address."""
    from vdvae.sampling import draw

    count = min(_affordable_images(model), _MOST_SAMPLES)
    samples = []
    with tempfile.TemporaryDirectory() as folder:
        for temperature in TEMPERATURES:
            # The same noise at each temperature: the grids differ by its scale alone.
            x_BCHW = draw(model, count, temperature, seed)
            grid = Path(folder) / f"{temperature}.png"
            save_grid(grid, to_NHWC(x_BCHW))
            samples.append((sample_title(temperature, seed), picture(grid)))
    return samples


def score_layers(model: ImageModel, manifest: Manifest, store_url: str, seed: int) -> Facts:
    """Which layer and which resolution carries how much, over the first validation images.

    Args:
        seed: of the posterior's draws.

    Raises:
        UserError: the images are missing or damaged.
    """
    reader = ShardReader(manifest, open_store(store_url), "validation")
    _, x_BCHW = next(reader.scan(_affordable_images(model)))
    return _information(model, x_BCHW, seed)


def _affordable_images(model: ImageModel) -> int:
    """How many images cost about the same whatever their size: on a CPU 256 of 8x8, 16 of 32x32."""
    pixels = 2**20 if next(model.parameters()).is_cuda else 2**14
    return max(4, min(256, pixels // model.config.image_size**2))


def sample_title(temperature: float, seed: int) -> str:
    """How a grid of samples was drawn."""
    return f"Temperature {temperature:g}, seed {seed}"


def _information(model: ImageModel, x_BCHW: torch.Tensor, seed: int) -> Facts:
    """Rate by layer (Fig. 5), and by resolution beside the share of latents (Fig. 4)."""
    from vdvae.evaluate import score
    from vdvae.model import bits_per_dim

    kl_nats_L = score(model, x_BCHW, seed).kl_nats_BL.mean(axis=0).tolist()
    config = model.config
    bits_L = [float(bits_per_dim(kl_nats, config.dims)) for kl_nats in kl_nats_L]
    total = [0.0, *itertools.accumulate(bits_L)]
    resolution_L = [height for _, height, _ in config.latent_shapes]
    latents_L = [math.prod(shape) for shape in config.latent_shapes]
    bands: list[tuple[str, float, float]] = []
    for size, group in itertools.groupby(enumerate(resolution_L), key=lambda item: item[1]):
        layers = [layer for layer, _ in group]
        bands.append((f"{size}x{size}", layers[0], layers[-1] + 1))
    rows = []
    for size in sorted(set(resolution_L)):
        layers = [layer for layer, at in enumerate(resolution_L) if at == size]
        upto = [layer for layer, at in enumerate(resolution_L) if at <= size]
        rate = sum(bits_L[layer] for layer in layers)
        rows.append(
            {
                "resolution": f"{size}x{size}",
                "layers": len(layers),
                "latents_share": sum(latents_L[layer] for layer in upto) / config.num_latents,
                "rate": rate,
                "rate_share": rate / (total[-1] or 1),
            }
        )
    chart = Chart(
        title="Cumulative rate by layer",
        x_label="stochastic layers from the top",
        y_label="bits/dim",
        lines=[Line(name="cumulative rate", points=list(enumerate(total)))],
        bands=bands,
    )
    return {
        "svg": chart.svg(),
        "rows": rows,
        "rate": total[-1],
        "images": len(x_BCHW),
        "silent": sum(kl_nats < _SILENT_NATS for kl_nats in kl_nats_L),
        "layers": len(kl_nats_L),
    }

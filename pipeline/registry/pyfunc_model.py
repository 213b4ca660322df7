"""The registered model as MLflow loads it ("models from code": this file travels, no pickle).

It runs where there is only MLflow, PyTorch and what they bring: the vdvae package, weights and
config lie beside this file in the model's folder. Nothing of the pipeline may be imported here.

Shapes: N images, B a batch of them, H W, C image channels.
"""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import torch
from mlflow.pyfunc.model import PythonModel, PythonModelContext

import vdvae
from vdvae.evaluate import score
from vdvae.precision import exact_float32
from vdvae.sampling import draw, images_a_batch

MOST_PASSES = 10_000


class Images(PythonModel):
    """Scores and samples images; `mode` of the parameters says which.

    - "score": a table with one row an image and its `bits_per_dim`, the figure of `evaluate`.
      `seed` drives the posterior's draws, each image's its own, and the figure is the mean over
      `passes` of them; the defaults are evaluate's.
    - "sample": `n` images, uint8 N H W C, at `temperature`; the input is an empty array of
      shape (0, H, W, C). The same seed gives the same images.
    """

    def load_context(self, context: PythonModelContext) -> None:
        """Reads the weights, to the GPU where there is one."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = vdvae.load(context.artifacts["model"]).to(device)
        config = self.model.config
        self.shape_HWC = (config.image_size, config.image_size, config.image_channels)
        self.batch = images_a_batch(config)

    def predict(
        self,
        context: PythonModelContext,
        model_input: np.ndarray,
        params: dict[str, Any] | None = None,
    ) -> pd.DataFrame | np.ndarray:
        """See the class.

        Raises:
            ValueError: for images of another shape or type, or a parameter out of bounds.
        """
        given = params or {}
        mode, seed = given.get("mode", "score"), _whole(given, "seed", 0)
        if np.ma.is_masked(model_input):
            raise ValueError("images: some values are masked; give every pixel a value")
        images = np.asarray(model_input)
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != self.shape_HWC:
            raise ValueError(
                f"images: {images.dtype} of shape {images.shape}; "
                f"this model takes uint8 of shape (N, {', '.join(map(str, self.shape_HWC))})"
            )
        if not 0 <= seed < 2**31:
            raise ValueError(f"seed: {seed} is out of bounds; use 0 to {2**31 - 1}")
        exact_float32()  # whatever else this process does, figures are evaluate's
        if mode == "score":
            passes = _whole(given, "passes", 1)
            if not 1 <= passes <= MOST_PASSES:
                raise ValueError(f"passes: {passes} is out of bounds; use 1 to {MOST_PASSES}")
            return self.score(images, seed, passes)
        if mode == "sample":
            temperature = given.get("temperature", 1.0)
            if isinstance(temperature, bool) or not isinstance(temperature, Real):
                raise ValueError(f"temperature: {repr(temperature)[:40]} is not a number")
            return self.sample(images, _whole(given, "n", 16), float(temperature), seed)
        raise ValueError(f"mode: {repr(mode)[:40]} is unknown; use 'score' or 'sample'")

    def score(self, images_NHWC: np.ndarray, seed: int, passes: int) -> pd.DataFrame:
        """Bits/dim of each image, float64."""
        x_NCHW = torch.from_numpy(images_NHWC.transpose(0, 3, 1, 2).copy())
        bits = [
            score(self.model, x_BCHW, seed, passes=passes).bits_per_dim_B
            for x_BCHW in x_NCHW.split(self.batch)
            if len(x_BCHW)
        ]
        return pd.DataFrame({"bits_per_dim": np.concatenate([*bits, np.zeros(0)])})

    def sample(self, images_NHWC: np.ndarray, n: int, temperature: float, seed: int) -> np.ndarray:
        """n drawn images, uint8 N H W C."""
        if len(images_NHWC):
            raise ValueError(
                f"images: {len(images_NHWC)} given, but sampling reads none; "
                f"pass images[:0], or mode='score' to score them"
            )
        return draw(self.model, n, temperature, seed).numpy().transpose(0, 2, 3, 1).copy()


def _whole(params: dict[str, Any], name: str, default: int) -> int:
    value = params.get(name, default)
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ValueError(f"{name}: {repr(value)[:40]} is not a whole number")
    return int(value)


mlflow.models.set_model(Images())

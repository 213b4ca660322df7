"""The two kinds of models, as one: what trains, scores and samples works with either."""

from __future__ import annotations

from vdvae.autoregressive import PixelCNN
from vdvae.config import AnyModelConfig, PixelCNNConfig, UserError
from vdvae.model import VDVAE

ImageModel = VDVAE | PixelCNN


def build(config: AnyModelConfig) -> ImageModel:
    """A new model of the config's kind."""
    return PixelCNN(config) if isinstance(config, PixelCNNConfig) else VDVAE(config)


def with_latents(model: ImageModel) -> VDVAE:
    """The model, where it has latents.

    Raises:
        UserError: it is autoregressive.
    """
    if not isinstance(model, VDVAE):
        raise UserError("an autoregressive model (model.kind pixelcnn) has no latents; use a VDVAE")
    return model

"""The very deep VAE of Child 2021: hierarchical VAE, mixture of logistics, training, likelihoods.

Needs nothing but torch, numpy and safetensors.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from vdvae.config import ModelConfig, TrainConfig, UserError

if TYPE_CHECKING:
    from vdvae.checkpoint import load, save
    from vdvae.model import VDVAE, Elbo, bits_per_dim

__version__ = "0.1.0"
__all__ = [
    "VDVAE",
    "Elbo",
    "ModelConfig",
    "TrainConfig",
    "UserError",
    "bits_per_dim",
    "load",
    "save",
]

# Importing torch takes more than a second; commands that only read settings do without it.
_LAZY = {
    "VDVAE": "model",
    "Elbo": "model",
    "bits_per_dim": "model",
    "load": "checkpoint",
    "save": "checkpoint",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'vdvae' has no attribute {name!r}")
    return getattr(import_module(f"vdvae.{_LAZY[name]}"), name)

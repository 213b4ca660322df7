"""Converts the authors' checkpoints: the same arrays under other names, the same arithmetic.

The published names are those of the golden files; nothing published is executed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vdvae.checkpoint import check_values
from vdvae.config import ModelConfig, UserError
from vdvae.model import VDVAE

# Ours <-> theirs, applied in order to a parameter's name.
_RENAMES = (
    (r"^encoder\.input\.", "encoder.in_conv."),
    (r"^encoder\.blocks\.", "encoder.enc_blocks."),
    (r"^decoder\.blocks\.", "decoder.dec_blocks."),
    (r"^decoder\.bias_maps\.", "decoder.bias_xs."),
    (r"^decoder\.output\.", "decoder.out_net.out_conv."),
    (r"\.posterior\.", ".enc."),
    (r"\.residual\.", ".resnet."),
    (r"\.project\.", ".z_proj."),
    (r"\.conv([1-4])\.", r".c\1."),
)

_LIKELIHOODS = {
    "cifar10": ("published", 256),
    "imagenet32": ("published", 256),
    "imagenet64": ("published", 256),
    "ffhq_256": ("published_5bit", 32),
    "ffhq_1024": ("published", 256),
}

_FIELDS = {
    "width": "width",
    "zdim": "latent_channels",
    "image_size": "image_size",
    "enc_blocks": "encoder",
    "dec_blocks": "decoder",
    "custom_width_str": "widths",
    "bottleneck_multiple": "bottleneck",
    "no_bias_above": "no_bias_above",
    "num_mixtures": "mixtures",
}


_MOST_LISTED = 20  # names that do not fit


def published_name(name: str) -> str:
    """The published name of one of our parameters."""
    for pattern, replacement in _RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def published_config(config: Mapping[str, Any], shift: float, scale: float) -> ModelConfig:
    """Our config of a published one.

    Args:
        config: width, zdim, image_size, enc_blocks, dec_blocks, custom_width_str,
            bottleneck_multiple, no_bias_above, num_mixtures, dataset; other keys are ignored.
        shift: encoder input = (pixel + shift) * scale, with pixels in 0..255. The published
            FFHQ-1024 model has its pixels in 0..1: there a shift from -1 to 0 is read that way.
        scale: as above.

    Raises:
        UserError: for a missing key or a dataset that was not published.
    """
    missing = [key for key in (*_FIELDS, "dataset") if key not in config]
    if missing:
        raise UserError(f"published config: {', '.join(missing)} missing; it has {sorted(config)}")
    dataset = config["dataset"]
    if dataset not in _LIKELIHOODS:
        raise UserError(
            f"published config: dataset {dataset!r} is not one of {', '.join(_LIKELIHOODS)}"
        )
    likelihood, num_levels = _LIKELIHOODS[dataset]
    shift, scale = float(shift), float(scale)
    if dataset == "ffhq_1024" and -1 <= shift <= 0:
        shift, scale = shift * 255, scale / 255
    values = {ours: config[theirs] for theirs, ours in _FIELDS.items()}
    return ModelConfig.from_dict(
        {
            **values,
            "num_levels": num_levels,
            "likelihood": likelihood,
            "shift": shift,
            "scale": scale,
        },
        where="published config",
    )


def from_published(
    config: Mapping[str, Any], weights: Mapping[str, Any], *, shift: float, scale: float
) -> VDVAE:
    """A model with published weights and the published arithmetic.

    Args:
        config: see `published_config`.
        weights: arrays or tensors by published parameter name, with or without `module.` before it.
        shift: see `published_config`.
        scale: see `published_config`.

    Raises:
        UserError: listing every missing, extra or misshapen name.
    """
    return load_published(published_config(config, shift, scale), weights)


def load_published(config: ModelConfig, weights: Mapping[str, Any]) -> VDVAE:
    """A model of our config with published weights.

    Args:
        config: of the model; its likelihood says which arithmetic.
        weights: arrays or tensors by published parameter name, with or without `module.` before it.

    Raises:
        UserError: listing missing, extra or misshapen names, or naming weights that are not float32
            or not finite.
    """
    model = VDVAE(config)
    given = {name.removeprefix("module."): value for name, value in weights.items()}
    ours = {published_name(name): parameter for name, parameter in model.named_parameters()}
    faults = [f"{name} is missing" for name in ours if name not in given]
    faults += [f"{name} is not in the model" for name in given if name not in ours]
    faults += [
        f"{name} has shape {tuple(given[name].shape)}, the model {tuple(parameter.shape)}"
        for name, parameter in ours.items()
        if name in given and tuple(given[name].shape) != tuple(parameter.shape)
    ]
    if faults:
        listed = [fault[:200] for fault in faults[:_MOST_LISTED]]
        listed += [f"and {len(faults) - len(listed)} more"] * (len(faults) > len(listed))
        raise UserError(f"published weights do not fit the config: {'; '.join(listed)}")
    tensors = {name: torch.as_tensor(given[name]) for name in ours}
    check_values(tensors, "published weights", "fetch them again")
    with torch.no_grad():
        for name, parameter in ours.items():
            parameter.copy_(tensors[name])
    return model.eval()


def to_published(model: VDVAE) -> dict[str, Tensor]:
    """The model's weights under their published names, bit for bit.

    Raises:
        UserError: for a model with parameters that the published ones do not have.
    """
    if model.config.unpool != "nearest":
        raise UserError(
            f"model.unpool: {model.config.unpool!r} has no published names; only 'nearest' has"
        )
    return {
        published_name(name): parameter.detach().clone()
        for name, parameter in model.named_parameters()
    }

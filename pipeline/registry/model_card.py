"""The model card: what somebody should know before they use a version, as Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.shards import Manifest
from vdvae.config import AnyModelConfig, PixelCNNConfig

# Child 2021, appendix A.6 (broader impact), and what the figures themselves leave open.
_LIMITS = """\
- The model reproduces the data it was trained on, their gaps and their prejudices too. Research
  data sets were not collected to represent anybody; look at samples before you show them to people
  or decide anything by them.
- Samples can be taken for photographs or originals of real things. Say that they are made, and do
  not pass them off as evidence; the same ease can serve to deceive, or replace people's paid work.
- A low figure says that images like the validation images are likely under the model, not that
  samples look right, nor that an image with a high figure is unusual: simple images score low
  whatever they show.
- The figures are upper bounds on the negative log-likelihood, of one draw of the posterior an
  image, on these splits at this size and number of levels. They compare with others' only where
  all of that agrees."""


def model_card(
    *,
    name: str,
    config: AnyModelConfig,
    parameters: int,
    manifest: Manifest,
    metrics: Mapping[str, Mapping[str, float]],
    conditions: Mapping[str, Any],
    tags: Mapping[str, str],
    settings: Mapping[str, Any],
    origin: Mapping[str, str] | None = None,
) -> str:
    """The card of a version.

    Args:
        name: of the registered model, `vdvae-<recipe>`.
        config: of the model.
        parameters: how many it has.
        manifest: of the images that it learnt from and was measured on.
        metrics: results/<recipe>/metrics.json.
        conditions: results/<recipe>/conditions.json.
        tags: of the version: hashes, revision, environment.
        settings: of the recipe, as `Recipe.flat` gives them.
        origin: of weights that were not trained here: `file` and `sha256` of the checkpoint.
    """
    recipe = manifest.recipe
    height, width, channels = manifest.shape
    splits = ", ".join(f"{split} {found.images:,}" for split, found in manifest.splits.items())
    left_out = f" Files left out as no images: {manifest.left_out}." if manifest.left_out else ""
    figures = "\n".join(
        f"| {split} | {found['bits_per_dim']:.4f} ± {found['bits_per_dim_se']:.4f} "
        f"| {found['rate_bits_per_dim']:.4f} | {found['distortion_bits_per_dim']:.4f} "
        f"| {found['nats_per_dim']:.4f} | {found['images']:,} |"
        for split, found in metrics.items()
    )
    normalised = (
        "normalised: probabilities over all values sum to 1"
        if config.likelihood == "normalised"
        else f"`{config.likelihood}`, which is not normalised: its figures compare with the "
        f"published ones alone"
    )
    revision = tags.get("git_revision", "unknown")
    dirty = ", with uncommitted changes" if tags.get("git_dirty") == "true" else ""
    training = ", ".join(
        f"{key} {settings[f'train.{key}']}"
        for key in ("steps", "batch_size", "learning_rate", "ema_decay", "seed", "precision")
    )
    if origin:
        made = (
            f"The authors' published weights, from `{origin['file']}` (sha256 "
            f"`{origin['sha256']}`); they were trained on the published splits, with the published "
            f"code."
        )
        command = f"vdvae published import {recipe}"
    else:
        made = f"Trained with {training}."
        command = f"dvc repro register@{recipe}"
    return f"""\
# {name}

A very deep VAE (Child 2021) of images of {height}x{width} pixels and {channels} \
channel{"s" if channels > 1 else ""}: it draws them, gives their likelihood and codes them as \
latents.

## Data

{manifest.source.name}: {splits} images on {config.num_levels} levels. Validation chose the \
champion; test decided nothing.{left_out}

Terms, as the source gives them: {manifest.source.terms}. They may bind the model and its samples \
too.

Fingerprint of the source `{manifest.source.fingerprint}`, of the manifest `{manifest.digest}`.

## Figures

| split | bits/dim ± standard error | rate | distortion | nats/dim | images |
|---|---|---|---|---|---|
{figures}

Every image once, from the averaged weights, in {conditions.get("precision", "fp32")} on \
{conditions.get("device", "an unknown device")}, with \
{conditions.get("posterior_samples", 1)} draw of the posterior an image (seed \
{conditions["seed"]}). The likelihood is {normalised}.

## Model

{parameters:,} parameters, {_architecture(config)}
{made} Weights sha256 `{tags["weights_sha256"]}`.

## To make it again

Git revision `{revision}`{dirty}; {tags["environment"]}. With the data at \
`recipes.{recipe}.data.path` of params.yaml and `{recipe}` in its `active`:

    git checkout {revision}
    make setup
    .venv/bin/{command}

Settings other than that revision's stand in the parameters of the MLflow run.

## Limits

{_LIMITS}
"""


def _architecture(config: AnyModelConfig) -> str:
    if isinstance(config, PixelCNNConfig):
        return (
            f"an autoregressive model (PixelCNN) of {config.layers} gated blocks, width "
            f"{config.width}. A sample takes one network evaluation a pixel."
        )
    return (
        f"{len(config.latent_shapes)} stochastic layers, {config.num_latents:,} latents an image, "
        f"width {config.width}.\nEncoder `{config.encoder}`, decoder `{config.decoder}`."
    )

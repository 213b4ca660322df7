"""`vdvae describe` and `vdvae info`: a recipe's model before it is made, and a model's folder."""

from __future__ import annotations

import json
from pathlib import Path

from pipeline.commands.output import print_table

_HEADS = ("resolution", "encoder", "decoder", "width", "latents", "share", "parameters", "GFLOP")


def describe(name: str, batch: int | None = None) -> None:
    """Prints what each resolution of a recipe's model has, and what a training step holds.

    Args:
        name: the recipe's.
        batch: images at once; None: the recipe's own.
    """
    from pipeline.commands.plan import at_once, training_bytes
    from pipeline.params import load_recipe
    from pipeline.system.launch import ranks_here
    from vdvae.summary import summarise

    recipe = load_recipe(name)
    train, ranks = recipe.train, ranks_here(recipe)
    batch = batch or at_once(recipe, ranks)
    found = summarise(recipe.model, train.checkpoint_activations_from, train.precision)
    print_table(
        _HEADS,
        [
            (
                row.resolution,
                row.encoder_blocks,
                row.decoder_blocks,
                row.width,
                f"{row.latents:,}",
                f"{100 * row.latent_share:.4f}%",
                f"{row.parameters:,}",
                f"{row.forward_flop / 1e9:.2f}",
            )
            for row in found.rows
        ],
        numbers=True,
    )
    print(
        f"{recipe.name}: {found.parameters:,} parameters, {found.encoder_blocks} encoder blocks, "
        f"{found.decoder_blocks} stochastic layers, {found.latents:,} latents an image; share: of "
        f"the latents up to that resolution\n"
        f"GFLOP an image: bound {found.forward_flop / 1e9:.1f}, training step "
        f"{found.training_flop / 1e9:.1f}, sample {found.sampling_flop / 1e9:.1f}\n"
        f"a training step of {batch} images at once in {train.precision} holds about "
        f"{training_bytes(recipe.train, found, batch, ranks) / 2**30:.1f} GiB (weights, gradients, "
        f"moments, averages, activations), a model {4 * found.parameters / 2**20:.0f} MiB"
    )


def info(folder: Path) -> None:
    """Prints what a model's folder holds; needs the model library alone."""
    import vdvae

    model = vdvae.load(folder)
    config = model.config
    print(f"{len(config.latent_shapes)} stochastic layers, {config.num_latents} latents an image")
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    print(json.dumps(config.to_dict(), indent=2))

"""The words of `vdvae models`: registered models, listed, shown, used, their aliases moved."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.words import Folder, Json, group, option, output, word
from vdvae.files import path_of

models = group("Registered models: list, show, use, move aliases.")

Reference = Annotated[
    str,
    typer.Argument(
        metavar="NAME", help="NAME@ALIAS, NAME/VERSION or models:/…; a name alone: its champion."
    ),
]
Picture = Annotated[Path, output("The PNG to write.")]
Image = Annotated[Path, typer.Argument(parser=path_of, metavar="IMAGE")]
Seed = Annotated[int, option("Of all draws.")]


@word(models, "list", "vdvae models list", "vdvae models list --json")
def _list(as_json: Json = False) -> None:
    """Every version with its aliases and figures."""
    from pipeline.commands.models import list_versions

    list_versions(as_json)


@word(models, "show", "vdvae models show vdvae-digits", "vdvae models show vdvae-digits/3 --verify")
def _show(
    reference: Reference,
    verify: Annotated[
        bool, option("Hash the real bytes; exit code 1 where any differ.", "--verify")
    ] = False,
    as_json: Json = False,
) -> None:
    """Figures, and where a version comes from."""
    from pipeline.commands.models import show

    show(reference, verify, as_json)


@word(models, "sample", "vdvae models sample vdvae-digits --temperature 0.85 -o grid.png")
def _sample(
    reference: Reference,
    output: Picture,
    n: Annotated[int, option("How many.")] = 16,
    temperature: Annotated[float, option("Of the prior, 0 to 2.")] = 1.0,
    seed: Seed = 0,
) -> None:
    """Draw images."""
    from pipeline.pictures import save_grid
    from pipeline.registry import use

    images = use.sample(reference, n, temperature, seed)
    save_grid(output, images)
    print(f"{len(images)} samples at temperature {temperature:g}: {output}")


@word(models, "score", "vdvae models score vdvae-digits images/ -o scores.csv")
def _score(
    reference: Reference,
    folder: Folder,
    output: Annotated[Path | None, output("A file instead of the terminal.")] = None,
) -> None:
    """Bits/dim of every image of a folder, as CSV."""
    from pipeline.commands.models import score

    score(reference, folder, output)


@word(models, "encode", "vdvae models encode vdvae-digits images/ -o latents.npz")
def _encode(
    reference: Reference, folder: Folder, output: Annotated[Path, output("The .npz to write.")]
) -> None:
    """The latents of every image of a folder, by layer, as .npz."""
    from pipeline.registry import use

    images = use.encode(reference, folder, output)
    print(f"latents of {images} images: {output}")


@word(models, "reconstruct", "vdvae models reconstruct vdvae-digits images/ --n 4 -o ladder.png")
def _reconstruct(
    reference: Reference,
    folder: Folder,
    output: Picture,
    n: Annotated[int, option("First images of it.")] = 8,
    seed: Seed = 0,
) -> None:
    """Images from their latents up to each resolution."""
    from pipeline.pictures import save_ladder
    from pipeline.registry import use

    ladder, images = use.reconstruct(reference, folder, n, seed)
    save_ladder(output, ladder, images)
    print(f"{len(images)} images, each after {len(ladder)} reconstructions: {output}")


@word(models, "interpolate", "vdvae models interpolate vdvae-digits a.png b.png -o way.png")
def _interpolate(
    reference: Reference,
    first: Image,
    last: Image,
    output: Picture,
    steps: Annotated[int, option("Images, both ends too.")] = 8,
    seed: Seed = 0,
) -> None:
    """Images on the way from one to another."""
    from pipeline.pictures import save_grid
    from pipeline.registry import use

    images = use.interpolate(reference, first, last, steps, seed)
    save_grid(output, images, columns=len(images))
    print(f"{len(images)} images from {first} to {last}: {output}")


@word(models, "export", "vdvae models export vdvae-digits model/")
def _export(reference: Reference, folder: Folder) -> None:
    """A folder that vdvae.load opens without MLflow."""
    from pipeline.registry import use

    print(f"{use.export(reference, folder)}: {folder}, which vdvae.load opens")


@word(
    models,
    "serve",
    "vdvae models serve vdvae-digits --port 5001",
    "VDVAE_SERVE_TOKEN=$(openssl rand -hex 32) vdvae models serve vdvae-digits --host 0.0.0.0",
)
def _serve(
    reference: Reference,
    host: Annotated[str, option("An IP address.")] = "127.0.0.1",
    port: int = 5001,
    token_env: Annotated[
        str | None,
        typer.Option(
            metavar="VARIABLE",
            help="The environment variable that holds the token which requests must bring "
            "(VDVAE_SERVE_TOKEN where it is set).",
        ),
    ] = None,
    timeout: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            help="That a connection may take to send a request's headers, or say nothing.",
        ),
    ] = 5,
) -> None:
    """Answer requests over HTTP, with a page of samples."""
    from pipeline.registry.serve import serve

    serve(reference, host, port, token_env, timeout)


@word(models, "rollback", "vdvae models rollback vdvae-digits")
def _rollback(reference: Reference) -> None:
    """Give the alias back to the version that had it before."""
    from pipeline.params import Places
    from pipeline.registry.register import rollback

    print(rollback(reference, Places.from_env()))


@word(models, "promote", "vdvae models promote vdvae-digits/3 --alias champion")
def _promote(reference: Reference, alias: str = "champion") -> None:
    """Give an alias to a version that you chose, without a comparison."""
    from pipeline.params import Places
    from pipeline.registry.register import promote

    print(promote(reference, alias, Places.from_env()))

"""The words of `vdvae models`: what `pipeline.registry.use` does, from the shell.

At the start this imports nothing but the standard library.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.registry import serve
from vdvae.config import UserError
from vdvae.files import atomic_write, path_of, shown_path, target_of

_DIFFERENT = 1  # exit code of `show --verify` that found something


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the words to the parser of `vdvae models`."""
    commands = parser.add_subparsers(dest="action", required=True, metavar="COMMAND")

    def command(name: str, text: str, reference: bool = True) -> argparse.ArgumentParser:
        words = commands.add_parser(name, help=text, description=text)
        if reference:
            words.add_argument(
                "reference",
                metavar="NAME",
                help="NAME@ALIAS, NAME/VERSION or models:/…; a name alone: its champion",
            )
        return words

    def picture(words: argparse.ArgumentParser) -> None:
        words.add_argument("--seed", type=int, default=0, help="of all draws (default 0)")
        words.add_argument("-o", "--output", type=path_of, required=True, help="the PNG to write")

    command("list", "every version with its aliases and figures", reference=False)
    show = command("show", "figures, and where a version comes from")
    show.add_argument(
        "--verify", action="store_true", help="hash the real bytes; exit code 1 where any differ"
    )
    sample = command("sample", "draw images")
    sample.add_argument("--n", type=int, default=16, help="how many (default 16)")
    sample.add_argument(
        "--temperature", type=float, default=1.0, help="of the prior, 0 to 2 (default 1)"
    )
    picture(sample)
    score = command("score", "bits/dim of every image of a folder, as CSV")
    score.add_argument("folder", type=path_of)
    score.add_argument("-o", "--output", type=path_of, help="a file instead of the terminal")
    encode = command("encode", "the latents of every image of a folder, by layer, as .npz")
    encode.add_argument("folder", type=path_of)
    encode.add_argument("-o", "--output", type=path_of, required=True, help="the .npz to write")
    reconstruct = command("reconstruct", "images from their latents up to each resolution")
    reconstruct.add_argument("folder", type=path_of)
    reconstruct.add_argument("--n", type=int, default=8, help="first images of it (default 8)")
    picture(reconstruct)
    way = command("interpolate", "images on the way from one to another")
    way.add_argument("first", type=path_of)
    way.add_argument("last", type=path_of)
    way.add_argument("--steps", type=int, default=8, help="images, both ends too (default 8)")
    picture(way)
    export = command("export", "a folder that vdvae.load opens without MLflow")
    export.add_argument("folder", type=path_of)
    serve.add_arguments(command("serve", "answer requests over HTTP, with a page of samples"))
    command("rollback", "give the alias back to the version that had it before")
    promote = command("promote", "give an alias to a version that you chose, without a comparison")
    promote.add_argument("--alias", default="champion", help="(default champion)")


def run(words: argparse.Namespace) -> None:
    """Runs the command; exits with 2 for the user's errors, 1 where `--verify` found something."""
    actions: dict[str, Callable[[argparse.Namespace], None]] = {
        "list": _list, "show": _show, "sample": _sample, "score": _score, "encode": _encode,
        "reconstruct": _reconstruct, "interpolate": _interpolate, "export": _export,
        "rollback": _rollback, "promote": _promote, "serve": serve.run,
    }  # fmt: skip
    if getattr(words, "output", None):
        _check_output(words.output)  # before the work
    actions[words.action](words)


def _check_output(path: Path) -> None:
    try:
        target_of(path).absolute().parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{shown_path(path)}: cannot be written ({error.strerror}); name another place"
        ) from None


def _list(words: argparse.Namespace) -> None:
    from pipeline.registry import use as models

    found = models.versions()
    if not found:
        print("no models are registered; make one with 'vdvae run RECIPE'")
        return
    rows = [("model", "aliases", "validation, bits/dim", "test, bits/dim", "registered")]
    rows += [
        (
            f"{version.name}/{version.number}",
            ", ".join(version.aliases),
            _figure(version.figure("validation")),
            _figure(version.figure("test")),
            version.created,
        )
        for version in found
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(f"{c:{w}}" for c, w in zip(row, widths, strict=True)).rstrip())


def _figure(found: tuple[float, float] | None) -> str:
    return f"{found[0]:.4f} ± {found[1]:.4f}" if found else "none"


def _show(words: argparse.Namespace) -> None:
    from pipeline.registry import use as models

    facts = models.describe(words.reference)
    print("\n".join(_facts(facts)))
    if not words.verify:
        return
    found = models.verify(words.reference)
    for note in found.notes:
        print(f"note: {note}")
    for difference in found.differences:
        print(f"differs: {difference}")
    print(f"verified {', '.join(found.checked)}: {len(found.differences) or 'no'} differences")
    if found.differences:
        sys.exit(_DIFFERENT)


def _facts(facts: dict[str, Any]) -> list[str]:
    manifest, source = facts["manifest"], facts["data_source"]
    rows = [
        ("aliases", ", ".join(facts["aliases"]) or "none"),
        *(
            (f"{split}, bits/dim", _figure((figure["mean"], figure["se"])))
            for split, figure in facts["bits_per_dim"].items()
        ),
        ("levels, likelihood", f"{facts['num_levels']}, {facts['likelihood']}"),
        ("registered", facts["created"]),
        ("decision", facts["decision"] or "none"),
        ("weights sha256", facts["weights_sha256"]),
        ("files", facts["source"]),
        ("MLflow run", "{id} ({name}, {status})".format(**facts["mlflow_run"])),
        ("dvc.lock", ", ".join(facts["dvc_lock"]) or "none"),
        ("manifest", manifest["digest"]),
        *(
            (f"  {name}", f"{split['images']} images in {len(split['shards'])} shards")
            for name, split in manifest["splits"].items()
        ),
        ("source", f"{source['name']}, fingerprint {source['fingerprint']}"),
        ("  terms", source["terms"]),
        (
            "git revision",
            f"{facts['git_revision'] or 'unknown'}"
            f"{', with uncommitted changes' * facts['git_dirty']}",
        ),
        ("environment", facts["environment"] or "unknown"),
        ("Prefect run", facts["prefect_flow_run"] or "none"),
    ]
    width = max(len(label) for label, _ in rows)
    return [
        f"{facts['name']} version {facts['version']}",
        *(f"  {label:{width}}  {value}" for label, value in rows),
        "moves of its aliases",
        *(f"  {move}" for move in facts["moves"]),
        "shards, sha256",
        *(
            f"  {name}  {sha256}"
            for split in manifest["splits"].values()
            for name, sha256 in split["shards"].items()
        ),
    ]


def _sample(words: argparse.Namespace) -> None:
    from pipeline.pictures import save_grid
    from pipeline.registry import use as models

    images = models.sample(words.reference, words.n, words.temperature, words.seed)
    save_grid(words.output, images)
    print(f"{len(images)} samples at temperature {words.temperature:g}: {words.output}")


def _score(words: argparse.Namespace) -> None:
    from pipeline.registry import use as models

    scores = models.score(words.reference, words.folder)
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["image", "bits_per_dim", "rate_nats", "distortion_nats"])
    columns = (scores.bits_per_dim_B, scores.rate_nats_B, scores.distortion_nats_B)
    for key, *values in zip(scores.keys, *columns, strict=True):
        table.writerow([key, *(repr(float(value)) for value in values)])
    if words.output is None:
        print(text.getvalue(), end="")
        return
    atomic_write(words.output, text.getvalue())
    figures = scores.summary()
    print(
        f"{figures['images']} images, {figures['bits_per_dim']:.4f} ± "
        f"{figures['bits_per_dim_se']:.4f} bits/dim: {words.output}"
    )


def _encode(words: argparse.Namespace) -> None:
    from pipeline.registry import use as models

    images = models.encode(words.reference, words.folder, words.output)
    print(f"latents of {images} images: {words.output}")


def _reconstruct(words: argparse.Namespace) -> None:
    from pipeline.pictures import save_ladder
    from pipeline.registry import use as models

    ladder, images = models.reconstruct(words.reference, words.folder, words.n, words.seed)
    save_ladder(words.output, ladder, images)
    print(f"{len(images)} images, each after {len(ladder)} reconstructions: {words.output}")


def _interpolate(words: argparse.Namespace) -> None:
    from pipeline.pictures import save_grid
    from pipeline.registry import use as models

    images = models.interpolate(words.reference, words.first, words.last, words.steps, words.seed)
    save_grid(words.output, images, columns=len(images))
    print(f"{len(images)} images from {words.first} to {words.last}: {words.output}")


def _export(words: argparse.Namespace) -> None:
    from pipeline.registry import use as models

    version = models.export(words.reference, words.folder)
    print(f"{version}: {words.folder}, which vdvae.load opens")


def _rollback(words: argparse.Namespace) -> None:
    from pipeline.params import Places
    from pipeline.registry.register import rollback

    print(rollback(words.reference, Places.from_env()))


def _promote(words: argparse.Namespace) -> None:
    from pipeline.params import Places
    from pipeline.registry.register import promote

    print(promote(words.reference, words.alias, Places.from_env()))

"""The entry of `vdvae`: one sentence for what the user can mend, also where typer is missing."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from pipeline.system.exits import BAD_INPUT, as_a_command
from vdvae import UserError, __version__
from vdvae.files import path_of

_EXTRA = "this needs more than the model library; run: pip install 'vdvae[pipeline]'"
_USAGE = f"usage: vdvae [--version | info FOLDER]\nother commands: {_EXTRA}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the words and runs the command; exits with 2 for the user's errors."""
    words = [*(sys.argv[1:] if arguments is None else arguments)]
    with as_a_command():
        try:
            _run(words)
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            if package in ("vdvae", "pipeline"):
                raise  # a fault of ours, not a missing extra
            if package != "typer" or not _run_without(words):
                raise UserError(f"{error.name} is not installed: {_EXTRA}") from None


def _run(words: list[str]) -> None:
    import typer

    from pipeline.cli.commands import app

    command, bare = typer.main.get_command(app), not words
    if "_VDVAE_COMPLETE" in os.environ:  # set by the shell, which asks for completions
        command.main(words, "vdvae")
    try:
        # Not by its own main(), which has other ends for a reader that left, and for errors.
        with command.make_context("vdvae", words or ["--help"]) as context:
            command.invoke(context)
    except typer.Exit as end:
        sys.exit(BAD_INPUT if bare else end.exit_code)
    except typer.TyperException as error:
        of = getattr(error, "ctx", None)
        help_of = of.command_path if of else "vdvae"
        sentence = error.format_message().rstrip(".")
        raise UserError(f"{sentence}; see '{help_of} --help'") from None


def _run_without(words: list[str]) -> bool:
    """What works where only the model library is installed; whether it was that."""
    match words:
        case ["--version"]:
            print(f"vdvae {__version__}")
        case ["--help"] | []:
            print(_USAGE)
        case ["info", folder]:
            from pipeline.commands.describe import info

            info(path_of(folder))
        case _:
            return False
    return True

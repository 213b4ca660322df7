"""What the words of `vdvae` have in common: options, examples, plain help where it is piped."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from vdvae.config import UserError
from vdvae.files import path_of, shown_path, target_of

F = TypeVar("F", bound=Callable[..., None])


def option(text: str, *names: str, **more: Any) -> Any:
    """An option with its help; a flag where a name is given for it."""
    return typer.Option(*names, help=text, **more)


Recipe = Annotated[str, typer.Argument(metavar="RECIPE", help="Its name in params.yaml.")]
Json = Annotated[bool, option("As JSON, for a script.", "--json")]
Folder = Annotated[Path, typer.Argument(parser=path_of, metavar="FOLDER")]


def _writable(context: typer.Context, path: Path | None) -> Path | None:
    """A file to write, whose folder is made before the work."""
    if path is not None and not context.resilient_parsing:
        try:
            target_of(path).absolute().parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"{shown_path(path)}: cannot be written ({error.strerror}); name another place"
            ) from None
    return path


def output(what: str) -> Any:
    """The option that names the file to write."""
    more = {"parser": path_of, "callback": _writable, "metavar": "FILE"}
    return option(what, "-o", "--output", **more)


def group(text: str, **more: Any) -> typer.Typer:
    """A command with words of its own; its help is plain text where it is no terminal's."""
    here = sys.stdout.isatty()
    return typer.Typer(
        help=text,
        rich_markup_mode="rich" if here else None,
        context_settings={} if here else {"terminal_width": 100},
        pretty_exceptions_enable=False,
        **more,
    )


def word(app: typer.Typer, name: str, *examples: str) -> Callable[[F], F]:
    """A command of this name, whose help is its docstring and examples."""

    def add(function: F) -> F:
        text = inspect.getdoc(function) or ""
        shown = "".join(f"\n  {example}" for example in examples)
        app.command(name, help=f"{text}\n\n\b\nExamples:{shown}")(function)
        return function

    return add


def with_overrides(*leave_out: str) -> Callable[[F], F]:
    """Gives a function of `**overrides` an option for each field of the form, but some."""
    from pipeline.flows.overrides import Overrides

    def add(function: F) -> F:
        signature = inspect.signature(function, eval_str=True)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        options = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=Annotated[
                    field.annotation | None,  # type: ignore[operator]
                    typer.Option(
                        help=field.description,
                        show_default=False,
                        rich_help_panel="Settings of this run alone, in a clone",
                    ),
                ],
            )
            for name, field in Overrides.model_fields.items()
            if name not in leave_out
        ]
        function.__signature__ = signature.replace(  # type: ignore[attr-defined]
            parameters=[*own, *options]
        )
        return function

    return add


def given(overrides: dict[str, Any]) -> dict[str, Any]:
    """The options that were given."""
    return {name: value for name, value in overrides.items() if value is not None}

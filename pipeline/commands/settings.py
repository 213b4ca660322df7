"""`vdvae settings`: what the environment sets, what is in effect, and what it means."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

from pipeline.commands.output import print_json, print_table
from pipeline.params import Places
from pipeline.settings import Settings, variable, word

_OF_PLACES = {
    "store": "store_url",
    "runs": "runs",
    "cache": "cache",
    "tracking_uri": "tracking_uri",
}


def settings(as_json: bool = False, as_markdown: bool = False) -> None:
    """Prints each setting with its value, its default and its meaning.

    Raises:
        UserError: for a value that is none.
    """
    if as_markdown:
        print("\n".join(markdown()))
        return
    rows = [*in_effect()]
    if as_json:
        print_json(rows)
        return
    print_table(("name", "value", "default", "meaning"), [[*row.values()][:4] for row in rows])
    known = {row["name"] for row in rows}
    for name in sorted(os.environ.keys() - known):
        if name.startswith("VDVAE_"):
            print(f"note: {name}: is set, and no setting of this name is known")


def in_effect() -> Iterator[dict[str, str | bool]]:
    """Name, value, default and meaning of each setting; secrets are masked."""
    found, places = Settings(), Places.from_env()
    for name, field in Settings.model_fields.items():
        given = name in found.model_fields_set
        value = getattr(places, _OF_PLACES[name]) if name in _OF_PLACES else getattr(found, name)
        text = f"{int(value) if isinstance(value, bool) else value}"
        if not given and name not in _OF_PLACES:
            text = word(field, "unset")
        elif word(field, "secret"):
            text = "****"
        yield {
            "name": variable(name),
            "value": re.sub("(?<=//)[^/]*@", "****@", text),  # of an address
            "default": word(field, "unset"),
            "meaning": (field.description or "").replace("`", ""),
            "set": given,
        }


def markdown() -> list[str]:
    """The lines of the table in docs/."""
    return [
        "| variable | default | meaning |",
        "|---|---|---|",
        *(
            f"| `{variable(name)}` | {_code(word(field, 'unset'))} | {field.description} |"
            for name, field in Settings.model_fields.items()
        ),
    ]


def _code(text: str) -> str:
    return f"`{text}`" if "<project>" in text else text  # which Markdown takes for HTML

"""YAML from outside: read within bounds, or refused in one sentence."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from vdvae.config import UserError, shown
from vdvae.files import read_regular

# What a file may hold at most; the project's own params.yaml has some 12,000 bytes and 400 values.
# dvc.lock grows by a few lines with each recipe.
MOST_BYTES = 2**20
MOST_NESTING = 20
MOST_VALUES = 50_000  # with every alias written out
MOST_CHARACTERS = 10_000  # of one value


class _Parser(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """libyaml's, some ten times as fast; numbers as 1e-05, which DVC writes, are YAML 1.2's."""


_Parser.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def read_yaml(path: Path, remedy: str = "mend it there") -> Any:
    """The value of a YAML file, as `parse_yaml` reads it.

    Raises:
        FileNotFoundError: it does not exist.
        UserError: it is no regular file, has more than MOST_BYTES, or is not as it should be.
    """
    return parse_yaml(read_regular(path, MOST_BYTES, remedy), str(path), remedy)


def parse_yaml(text: bytes | str, where: str, remedy: str = "mend it there") -> Any:
    """The value of a YAML text from outside, whatever the text is.

    Args:
        where: the file, for messages.
        remedy: what to do where it is none.

    Raises:
        UserError: it is not YAML, is over a bound, or gives a key twice, of which readers would
            take different ones.
    """
    try:
        if len(text) > MOST_BYTES:
            raise ValueError(f"more than {MOST_BYTES:,} bytes")
        _check(text)
        return yaml.load(text, _Parser)
    except Exception as error:  # its constructors raise KeyError, AttributeError and more
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{where}: not readable as YAML: {reason}; {remedy}") from None


def _check(text: bytes | str) -> None:
    """Holds the bounds over the parser's events, of which none is deep or large itself.

    Raises:
        ValueError: what is over one, and where.
    """
    sizes: dict[str, int] = {}  # of each anchor's value, with its aliases written out
    # A frame for each open list or mapping: [its size, its anchor, its keys or None, its children]
    open_ones: list[list[Any]] = [[0, None, None, 0]]
    for event in yaml.parse(text, _Parser):
        line = f"line {event.start_mark.line + 1}" if event.start_mark else "its end"
        if isinstance(event, yaml.CollectionStartEvent):
            keys: set[str] | None = set() if isinstance(event, yaml.MappingStartEvent) else None
            open_ones.append([1, event.anchor, keys, 0])
            if len(open_ones) > MOST_NESTING + 1:
                raise ValueError(f"{line}: nested more than {MOST_NESTING} deep")
            continue
        if isinstance(event, yaml.CollectionEndEvent):
            size, anchor, _, _ = open_ones.pop()
        elif isinstance(event, yaml.ScalarEvent):
            size, anchor = 1, event.anchor
            if len(event.value) > MOST_CHARACTERS:
                raise ValueError(f"{line}: a value of more than {MOST_CHARACTERS:,} characters")
        elif isinstance(event, yaml.AliasEvent):
            size, anchor = sizes.get(str(event.anchor), 0), None
            if not size:
                raise ValueError(
                    f"{line}: the alias {shown(event.anchor)} names no value before it"
                )
        else:
            continue
        if anchor is not None:
            sizes[anchor] = size
        parent = open_ones[-1]
        is_key = parent[2] is not None and parent[3] % 2 == 0
        if is_key and isinstance(event, yaml.ScalarEvent):
            if event.value in parent[2]:
                raise ValueError(f"{line}: the key {shown(event.value)} is given twice")
            parent[2].add(event.value)
        parent[0] += size
        parent[3] += 1
        if parent[0] > MOST_VALUES:
            raise ValueError(f"{line}: more than {MOST_VALUES:,} values")

"""Tables and JSON: for people on a terminal by rich, elsewhere plain, for grep and scripts."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any


def print_table(
    heads: Sequence[str], rows: Sequence[Sequence[object]], numbers: bool = False
) -> None:
    """Prints rows below their heads: one line a row, whatever its width, where it is no terminal.

    Args:
        heads: of the columns.
        rows: as many cells each.
        numbers: whether columns are flush right.
    """
    if sys.stdout.isatty():
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(box=box.SIMPLE_HEAD)
        for head in heads:
            table.add_column(head, justify="right" if numbers else "left", overflow="fold")
        for row in rows:
            table.add_row(*(Text(str(cell)) for cell in row))  # not read as markup
        Console().print(table)
        return
    lines = [[*map(str, row)] for row in (heads, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    side = ">" if numbers else "<"
    for line in lines:
        print("  ".join(f"{c:{side}{w}}" for c, w in zip(line, widths, strict=True)).rstrip())


def labelled(rows: Sequence[tuple[str, object]]) -> list[str]:
    """Lines of a label and what it stands for."""
    width = max(len(label) for label, _ in rows)
    return [f"  {label:{width}}  {value}" for label, value in rows]


def print_json(value: Any) -> None:
    """Prints what a script reads."""
    print(json.dumps(value, indent=2, ensure_ascii=False, default=str))

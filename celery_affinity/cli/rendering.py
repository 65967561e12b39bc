"""Tables and JSON. With rich installed and a terminal there, tables are rich's."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any

import click

__all__ = ("duration", "lines", "print_json", "print_table", "rich_table", "shown")


def print_json(records: Any) -> None:
    """Print a record, or a list of them, as JSON."""
    click.echo(json.dumps(records, default=_plain, indent=2))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    raise TypeError(f"found {type(value).__name__}, expected a record")


def shown(text: str, width: int = 80) -> str:
    """Foreign text (a tag, a reason) as it may stand on a terminal: one line, no control codes."""
    safe = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return safe if len(safe) <= width else safe[: width - 3] + "..."


def duration(seconds: float) -> str:
    """A time span in the unit that fits."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.0f} h"


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table; columns of numbers are right-aligned."""
    table = rich_table(columns, rows) if sys.stdout.isatty() else None
    if table is not None:
        from rich.console import Console

        Console().print(table)
    else:
        click.echo("\n".join(lines(columns, rows)))


def rich_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> Any | None:
    """A table of rich's, or None if it is not installed."""
    try:
        from rich import box
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        return None
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for at, name in enumerate(columns):
        table.add_column(name, justify="right" if _numeric(rows, at) else "left")
    for row in rows:
        table.add_row(*(Text(_cell(value)) for value in row))
    return table


def lines(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """The same as plain text."""
    cells = [list(columns), *[[_cell(value) for value in row] for row in rows]]
    widths = [max(len(row[at]) for row in cells) for at in range(len(columns))]
    right = [_numeric(rows, at) for at in range(len(columns))]
    return [
        "  ".join(
            cell.rjust(width) if end else cell.ljust(width)
            for cell, width, end in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in cells
    ]


def _cell(value: object) -> str:
    return "-" if value is None else str(value)


def _numeric(rows: Sequence[Sequence[object]], at: int) -> bool:
    return bool(rows) and all(row[at] is None or isinstance(row[at], (int, float)) for row in rows)

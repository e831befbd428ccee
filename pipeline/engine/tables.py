"""Rows of numbers as tables: for programs, for a terminal, for a page."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

Value = str | int | float
Row = dict[str, Value | None]


def make_csv(rows: Sequence[Row], columns: Sequence[str] | None = None) -> str:
    """Every column of every row, or those named, which are then there without any row too; numbers in full."""
    table = io.StringIO()
    columns = list(dict.fromkeys(name for row in rows for name in row)) if columns is None else columns
    writer = csv.DictWriter(table, fieldnames=columns, lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows(rows)
    return table.getvalue()


def make_table(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """Aligned for a terminal; numbers to four digits.

    Example:
        >>> print(make_table([{"sampler": "ddim", "fd": 12.3456}, {"sampler": "heun", "fd": 7.0}], ["sampler", "fd"]))
        sampler     fd
        ddim     12.35
        heun         7
    """
    cells = [list(columns), *([to_text(row.get(name)) for name in columns] for row in rows)]
    left = [all(isinstance(row.get(name), str) for row in rows) for name in columns]
    places = range(len(columns))
    widths = [max(len(line[i]) for line in cells) for i in places]
    lines = ["  ".join(c[i].ljust(widths[i]) if left[i] else c[i].rjust(widths[i]) for i in places) for c in cells]
    return "\n".join(line.rstrip() for line in lines)


def make_markdown(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """The same as a Markdown table."""
    lines = [list(columns), ["---"] * len(columns), *([to_text(row.get(name)) for name in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def to_text(value: Value | None) -> str:
    """A cell for people.

    Example:
        >>> to_text(12.3456), to_text(1800), to_text(None), to_text("ddim"), to_text(0.00012344)
        ('12.35', '1800', '-', 'ddim', '0.0001234')
    """
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)

"""Tables as plain text and as CSV."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> str:
    """Columns as wide as they need to be; those numbered in `left` are flush left, the others flush right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = []
    for row in [header, ["-" * width for width in widths], *rows]:
        cells = [
            cell.ljust(width) if number in left else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def csv_text(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """The same for other programs; None is an empty cell."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([header, *rows])
    return out.getvalue()


def figures_csv(plain: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    """The same of rows that have what `plain` names, and "figures" by name, (value, low, high) each."""
    keys = list(dict.fromkeys(key for row in rows for key in row["figures"]))
    header = [*plain, *(f"{key}{end}" for key in keys for end in ("", " low", " high"))]
    figures = [[value for key in keys for value in row["figures"].get(key, [None] * 3)] for row in rows]
    return csv_text(header, ([row[name] for name in plain] + own for row, own in zip(rows, figures, strict=True)))

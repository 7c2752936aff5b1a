"""Markdown from text of people: escaped, quoted as code, in tables."""

import html
import re
from collections.abc import Sequence


def escaped(text: str) -> str:
    """Text that Markdown and HTML show as it is, on one line; also fit for a cell of a table."""
    line = html.escape(" ".join(text.split()), quote=False)
    return re.sub(r"([\\`*_\[\]|~#!$])", r"\\\1", line).replace("://", "&#58;//")


def code(text: str) -> str:
    """An inline code span, whatever backticks `text` has."""
    line = " ".join(text.split())
    longest = max(map(len, re.findall("`+", line)), default=0)
    space = " " if line.startswith("`") or line.endswith("`") else ""
    return "`" * (longest + 1) + space + line + space + "`" * (longest + 1)


def cell(markdown: str) -> str:
    """Bars that are not escaped yet would end the cell."""
    return re.sub(r"(?<!\\)\|", r"\\|", markdown)


def fenced(language: str, text: str) -> str:
    """A block of code, whatever backticks it has."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def number_text(value: float | None, form: str) -> str:
    """A number in that form; an empty cell where there is none."""
    return "" if value is None else f"{value:{form}}"


def table(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[bool] = (), centred: bool = False
) -> str:
    """Rows of cells that are Markdown already; `right`: which columns are flush right."""
    sides = right or [False] * len(header)
    rule = [":-:" if centred else "--:" if side else "---" for side in sides]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, rule, *rows])

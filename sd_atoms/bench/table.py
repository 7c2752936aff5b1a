"""Plain-text tables."""


def text_table(header: list[str], rows: list[list[str]]) -> str:
    """Columns as wide as they need to be: the first to the left, the others to the right."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = []
    for row in [header, ["-" * width for width in widths], *rows]:
        cells = [
            row[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def ratio_text(ratio: float | None) -> str:
    """1.25 as "1.25×"; a dash where there is nothing to compare with."""
    return "–" if ratio is None else f"{ratio:.2f}×"

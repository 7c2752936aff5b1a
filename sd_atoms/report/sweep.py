"""A sweep as a Markdown table and as curves."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, NullLocator

from sd_atoms.report.markdown import escaped, number_text, table

SCORE_FORMULA = "2 · image · text / (image + text)"
CURVES = {
    "score": f"score = {SCORE_FORMULA}",
    "image": "image: pictures and training pictures",
    "text": "text: pictures and their prompts",
}
COLUMNS = {
    "steps": ("steps", "d"),
    "seconds": ("seconds", ".0f"),
    "last_loss": ("last loss", ".4f"),
    "validation_loss": ("validation loss", ".4f"),
    "image": ("CLIP image", ".4f"),
    "text": ("CLIP text", ".4f"),
    "match": ("match", ".3f"),
    "diversity": ("diversity", ".4f"),
    "trained_numbers": ("trained numbers", ",d"),
    "score": ("score", ".4f"),
}
MEANINGS = {
    "last_loss": "last loss: mean of the last fifth of the steps; lower is better.",
    "validation_loss": "validation loss: of the kept step, or else the last one measured; lower is better.",
    "image": "CLIP image: mean cosine of pictures of the instance prompt and the training pictures; higher is better.",
    "text": "CLIP text: mean cosine of pictures and their prompts; higher is better.",
    "match": "match: share of pictures whose best prompt of all is their own; higher is better.",
    "diversity": "diversity: mean 1 − cosine between pictures of the instance prompt.",
    "trained_numbers": "trained numbers: atoms, embedding rows and text encoder together.",
    "score": f"score: {SCORE_FORMULA}, the harmonic mean of CLIP image and CLIP text; higher is better; the best is "
    "**bold**; there is none where one of them is not above 0.",
}
LEGEND_LETTERS = 48  # of a label
TICK_GAP = 0.13  # between labelled values, as a share of the axis
MARKERS = "osD^vPX*<>"


@dataclass(frozen=True)
class Entry:
    """One point of a sweep. What is None was not measured."""

    name: str
    values: Mapping[str, Any]  # varied field -> value
    steps: int | None = None
    seconds: float | None = None
    last_loss: float | None = None
    validation_loss: float | None = None
    image: float | None = None
    text: float | None = None
    match: float | None = None
    diversity: float | None = None
    trained_numbers: int | None = None
    score: float | None = None
    failure: str | None = None  # why there are no numbers


def harmonic_mean(image: float | None, text: float | None) -> float | None:
    """2·image·text / (image + text) of two positive cosines; None of anything else."""
    if image is None or text is None or min(image, text) <= 0:
        return None
    return round(2 * image * text / (image + text), 4)


def show(value: Any) -> str:
    """A setting as one writes it: 0.003, 1e-05, true, none."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and float(f"{value:g}") == value:
        return f"{value:g}"
    return str(value)


def in_order(entries: Sequence[Entry]) -> list[Entry]:
    """Sorted by the varied fields, the first one first: none, numbers, texts."""
    return sorted(entries, key=lambda entry: [_rank(value) for value in entry.values.values()])


def sweep_markdown(entries: Sequence[Entry], grid: Mapping[str, Sequence[Any]]) -> str:
    """The table, below what its columns mean.

    Args:
        entries: the points so far.
        grid: varied field -> all its values.
    """
    entries = in_order(entries)
    filled = {key for key in COLUMNS if any(getattr(entry, key) is not None for entry in entries)}
    shown = [key for key in COLUMNS if key in filled]
    failed = [entry for entry in entries if entry.failure is not None]
    best = max((entry.score for entry in entries if entry.score is not None), default=None)
    header = [*map(escaped, grid), *(COLUMNS[key][0] for key in shown), *(["why it failed"] if failed else [])]
    numeric = [_is_numeric(values) for values in grid.values()] + [True] * len(shown) + [False] * bool(failed)
    rows = []
    for entry in entries:
        row = [escaped(show(value)) for value in entry.values.values()]
        for key in shown:
            value = getattr(entry, key)
            text = number_text(value, COLUMNS[key][1])
            row.append(f"**{text}**" if key == "score" and value is not None and value == best else text)
        rows.append(row + ([escaped(entry.failure or "")] if failed else []))
    points = math.prod(map(len, grid.values()))
    count = f"{len(entries)} of {points} points" + (f", {len(failed)} of them failed." if failed else ".")
    lines = [f"# Sweep of {escaped(', '.join(grid))}", "", count, ""]
    meanings = [f"- {text}" for key, text in MEANINGS.items() if key in shown]
    return "\n".join([*lines, *meanings, *([""] if meanings else []), table(header, rows, right=numeric)]) + "\n"


def sweep_figure(entries: Sequence[Entry], grid: Mapping[str, Sequence[Any]]) -> Figure | None:
    """The score and its parts over the first field that is varied in numbers; a line per combination of the others.

    None where no number is varied, or nothing was scored. A point with "none" in that field is not on the axis.
    """
    across = next((name for name, values in grid.items() if len(values) > 1 and _is_numeric(values)), None)
    if across is None:
        return None
    entries = [entry for entry in in_order(entries) if entry.values[across] is not None]
    curves = [key for key in CURVES if any(getattr(entry, key) is not None for entry in entries)]
    if not curves:
        return None
    lines: dict[str, list[Entry]] = {}
    for entry in entries:
        if any(getattr(entry, key) is not None for key in curves):
            others = [f"{name}={show(value)}" for name, value in entry.values.items() if name != across]
            lines.setdefault(", ".join(others), []).append(entry)
    places = sorted({entry.values[across] for members in lines.values() for entry in members})

    columns = max(1, min(len(lines), 150 // (6 + max(map(len, lines))), 6))
    legend_rows = math.ceil(len(lines) / columns) if any(lines) else 0
    size = (max(6.5, 4.4 * len(curves)), 3.6 + 0.22 * legend_rows)
    figure = Figure(figsize=size, dpi=130, layout="constrained", facecolor="white")
    panels = figure.subplots(1, len(curves), sharex=True, squeeze=False)[0]
    for axes, key in zip(panels, curves, strict=True):
        for number, (label, members) in enumerate(lines.items()):
            known = [entry for entry in members if getattr(entry, key) is not None]
            axes.plot(
                [entry.values[across] for entry in known],
                [getattr(entry, key) for entry in known],
                color=f"C{number % 10}",
                linestyle=("-", "--", ":")[number // 10 % 3],
                marker=MARKERS[number % len(MARKERS)],
                markersize=5,
                label=_plain(label),
            )
        axes.set_title(CURVES[key], fontsize=10)
        axes.set_xlabel(_plain(across), fontsize=9)
        axes.tick_params(labelsize=8)
        axes.ticklabel_format(axis="y", useOffset=False)
        axes.grid(color="#e3e3e3", linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
        _ticks(axes, places)
    if any(lines):  # there are other fields
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)
    return figure


def _ticks(axes: Axes, places: Sequence[float]) -> None:
    """Labels the values that were tried, as many as have room; a log axis from a factor of 10 on."""
    low, high = places[0], places[-1]
    log = low > 0 and high / low >= 10 * (1 - 1e-9)
    if log:
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_minor_formatter(NullFormatter())
    at = [math.log(place) if log else place for place in places]
    gap, kept = TICK_GAP * (at[-1] - at[0]), [0]
    for number in range(1, len(places)):
        if at[number] - at[kept[-1]] >= gap:
            kept.append(number)
    axes.set_xticks([places[number] for number in kept], [show(places[number]) for number in kept])


def _is_numeric(values: Sequence[Any]) -> bool:
    """Numbers, and perhaps none among them."""
    known = [value for value in values if value is not None]
    return bool(known) and all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in known)


def _rank(value: Any) -> tuple:
    if value is None:
        return (0, 0, "")
    return (1, value, "") if isinstance(value, (int, float)) else (2, 0, str(value))


def _plain(text: str) -> str:
    """A label without mathematics, not too long."""
    short = text if len(text) <= LEGEND_LETTERS else f"{text[: LEGEND_LETTERS - 1]}…"
    return short.replace("$", r"\$")

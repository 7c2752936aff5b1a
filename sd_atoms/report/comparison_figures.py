"""Plots and grids of an experiment."""

from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import Image

from sd_atoms.report.grid import image_grid
from sd_atoms.report.rows import Comparison, Row, picture_of

MARKERS = {"o": "●", "s": "■", "D": "◆", "^": "▲", "v": "▼", "*": "★"}  # of concepts, and what a title calls them
SMOOTHED = 0.05  # of a curve's length


def pareto_figure(comparison: Comparison, rows: Sequence[Row]) -> Figure | None:
    """Fidelity against diversity, text, parameters and seconds; colours are methods, markers are concepts."""
    judge = comparison.fidelity
    panels = [("diversity", f"{judge} diversity", False), ("text", f"{comparison.text} text", False)]
    panels += [("parameters", "parameters", True), ("seconds of training", "seconds", False)]
    rows = [row for row in rows if f"{judge} image" in row.figures]
    panels = [panel for panel in panels if any(_point(row, panel[1]) is not None for row in rows)]
    if not panels:
        return None
    figure = Figure(figsize=(4.3 * len(panels), 4.6), dpi=130, layout="constrained", facecolor="white")
    colours = _colours(comparison)
    all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (label, key, log) in zip(all_axes, panels, strict=True):
        labelled = set()
        for row in rows:
            point = _point(row, key)
            if point is None:
                continue
            (x, x_low, x_high), (y, y_low, y_high) = point, row.figures[f"{judge} image"]
            number = list(comparison.concepts).index(row.concept)
            axes.errorbar(
                [x],
                [y],
                xerr=None if x_low is None else [[x - x_low], [x_high - x]],
                yerr=None if y_low is None else [[y - y_low], [y_high - y]],
                color=colours[row.method],
                marker=list(MARKERS)[number % len(MARKERS)],
                markersize=6,
                linewidth=0.8,
                linestyle="none",
                label=None if row.method in labelled else row.method,
            )
            labelled.add(row.method)
        if log:
            axes.set_xscale("log")
        axes.set_xlabel(label, fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(color="#e3e3e3", linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel(f"fidelity ({judge})", fontsize=9)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(6, len(labels)), fontsize=8, frameon=False)
    signs = list(MARKERS.values())
    concepts = ", ".join(f"{signs[n % len(signs)]} {name}" for n, name in enumerate(comparison.concepts))
    figure.suptitle(f"{comparison.base}: {concepts}", fontsize=10)
    return figure


def curves_figure(comparison: Comparison) -> Figure | None:
    """The training loss of each method, smoothed over a twentieth of its steps, the mean over seeds."""
    concepts = list(dict.fromkeys(run["scores"]["concept"] for run in comparison.runs if run.get("losses")))
    if not concepts:
        return None
    figure = Figure(figsize=(6.0 * len(concepts), 4.4), dpi=130, layout="constrained", facecolor="white")
    for axes, concept in zip(figure.subplots(1, len(concepts), squeeze=False)[0], concepts, strict=True):
        for method, colour in _colours(comparison).items():
            curves = [run["losses"] for run in comparison.of(concept, method) if run.get("losses")]
            if not curves:
                continue
            length = min(map(len, curves))
            losses = np.mean([[loss for _, loss in curve[:length]] for curve in curves], axis=0)
            window = max(1, round(SMOOTHED * length))
            smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
            steps = [step for step, _ in curves[0][:length]][window - 1 :]
            axes.plot(steps, smooth, color=colour, linewidth=1.1, label=method)
        axes.set_title(concept, fontsize=10)
        axes.set_xlabel("step", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(color="#e3e3e3", linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("training loss", fontsize=9)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(6, len(labels)), fontsize=8, frameon=False)
    return figure


def prompt_grid(comparison: Comparison, concept: str, numbers: Sequence[int]) -> Image.Image | None:
    """Rows: prompts; columns: the pretrained base and every method, all by the same noise and the first seed."""
    columns = [(method, runs[0]) for method in comparison.methods if (runs := comparison.of(concept, method))]
    if not columns or not numbers:
        return None
    rows = [[picture_of(run, f"{number:02d}-0") for _, run in columns] for number in numbers]
    labels = [comparison.prompts[number].replace("{}", concept) for number in numbers]
    return image_grid(rows, labels, [method for method, _ in columns], title=f"{concept} on {comparison.base}")


def _colours(comparison: Comparison) -> dict[str, tuple]:
    """A colour for each method."""
    shades = colormaps["tab10" if len(comparison.methods) <= 10 else "tab20"]
    return {method: shades(number % shades.N) for number, method in enumerate(comparison.methods)}


def _point(row: Row, key: str) -> tuple[float, float | None, float | None] | None:
    if key in ("parameters", "seconds"):
        value = getattr(row, key)
        return None if value is None else (value, None, None)
    return row.figures.get(key)

"""Plots and grids of an experiment."""

from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import Image

from sd_atoms.report.grid import image_grid
from sd_atoms.report.rows import Comparison, Row, picture_of

MARKERS = ("o", "s", "^", "D", "v", "*")  # after ten methods the colours come again with the next
SMOOTHED = 0.05  # of a curve's length


def pareto_figure(comparison: Comparison, rows: Sequence[Row]) -> Figure | None:
    """Fidelity against diversity, text, parameters and seconds, the panels of a concept side by side."""
    judge = f"{comparison.fidelity} image"
    panels = [("diversity", f"{comparison.fidelity} diversity"), ("text", f"{comparison.text} text")]
    panels += [("parameters", "parameters"), ("seconds of training", "seconds")]
    rows = [row for row in rows if judge in row.figures]
    panels = [panel for panel in panels if any(_point(row, panel[1]) is not None for row in rows)]
    concepts = [concept for concept in comparison.concepts if any(row.concept == concept for row in rows)]
    if not panels:
        return None
    size = (4.3 * len(panels), 4.0 * len(concepts) + 0.6)
    figure = Figure(figsize=size, dpi=130, layout="constrained", facecolor="white")
    look_of, handles = looks(comparison), {}
    all_axes = figure.subplots(len(concepts), len(panels), sharex="col", sharey="row", squeeze=False)
    for concept, line in zip(concepts, all_axes, strict=True):
        for axes, (label, key) in zip(line, panels, strict=True):
            for row in rows:
                point = _point(row, key)
                if row.concept != concept or point is None:
                    continue
                x, y = point, row.figures[judge]
                colour, marker = look_of[row.method]
                handles[row.method] = axes.errorbar(
                    [x[0]], [y[0]], xerr=_reach(x), yerr=_reach(y), color=colour, marker=marker, markersize=6.5,
                    markeredgecolor="white", markeredgewidth=0.6, linestyle="none", elinewidth=0.7,
                    ecolor=(*colour, 0.5),
                )  # fmt: skip
            if key == "parameters":
                axes.set_xscale("log")
            axes.set_xlabel(label, fontsize=9)
            axes.tick_params(labelsize=8, labelbottom=True)
            axes.grid(color="#e3e3e3", linewidth=0.7)
            axes.spines[["top", "right"]].set_visible(False)
        line[0].set_ylabel(f"{concept}: fidelity ({comparison.fidelity})", fontsize=9)
    named = [method for method in comparison.methods if method in handles]
    figure.legend(
        [handles[method] for method in named], named,
        loc="outside lower center", ncols=min(9, len(named)), fontsize=8, frameon=False,
    )  # fmt: skip
    figure.suptitle(comparison.base, fontsize=10)
    return figure


def curves_figure(comparison: Comparison) -> Figure | None:
    """The training loss of each method, smoothed over a twentieth of its steps, the mean over seeds."""
    concepts = list(dict.fromkeys(run["scores"]["concept"] for run in comparison.runs if run.get("losses")))
    if not concepts:
        return None
    figure = Figure(figsize=(6.0 * len(concepts), 4.4), dpi=130, layout="constrained", facecolor="white")
    for axes, concept in zip(figure.subplots(1, len(concepts), squeeze=False)[0], concepts, strict=True):
        for method, (colour, marker) in looks(comparison).items():
            curves = [run["losses"] for run in comparison.of(concept, method) if run.get("losses")]
            if not curves:
                continue
            length = min(map(len, curves))
            losses = np.mean([[loss for _, loss in curve[:length]] for curve in curves], axis=0)
            window = max(1, round(SMOOTHED * length))
            smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
            steps = [step for step, _ in curves[0][:length]][window - 1 :]
            dashes = ("-", "--", ":", "-.")[MARKERS.index(marker) % 4]
            axes.plot(steps, smooth, color=colour, linewidth=1.1, linestyle=dashes, label=method)
        axes.set_title(concept, fontsize=10)
        axes.set_xlabel("step", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(color="#e3e3e3", linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("training loss", fontsize=9)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(9, len(labels)), fontsize=8, frameon=False)
    return figure


def prompt_grid(comparison: Comparison, concept: str, numbers: Sequence[int]) -> Image.Image | None:
    """Rows: prompts; columns: the pretrained base and every method, all by the same noise and the first seed."""
    columns = [(method, runs[0]) for method in comparison.methods if (runs := comparison.of(concept, method))]
    if not columns or not numbers:
        return None
    rows = [[picture_of(run, f"{number:02d}-0") for _, run in columns] for number in numbers]
    labels = [comparison.prompts[number].replace("{}", concept) for number in numbers]
    return image_grid(rows, labels, [method for method, _ in columns], title=f"{concept} on {comparison.base}")


def looks(comparison: Comparison) -> dict[str, tuple[tuple[float, float, float], str]]:
    """A colour and a marker for each method."""
    colours = colormaps["tab10"].colors
    return {
        method: (colours[number % len(colours)], MARKERS[number // len(colours) % len(MARKERS)])
        for number, method in enumerate(comparison.methods)
    }


def _point(row: Row, key: str) -> tuple[float, float | None, float | None] | None:
    if key in ("parameters", "seconds"):
        value = getattr(row, key)
        return None if value is None else (value, None, None)
    return row.figures.get(key)


def _reach(figure: tuple[float, float | None, float | None]) -> list[list[float]] | None:
    """How far an interval goes below and above its value."""
    value, low, high = figure
    return None if low is None else [[value - low], [high - value]]

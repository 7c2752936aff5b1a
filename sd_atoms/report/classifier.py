"""What trained classifiers show for themselves: the summary of a run, confusion, maps, methods side by side."""

import shlex
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from sd_atoms.report.fonts import lettering
from sd_atoms.report.markdown import escaped, table
from sd_atoms.report.table import csv_text

MOST_COUNTED = 20  # classes whose counts can be read in a matrix
MOST_NAMED = 200  # classes whose names fit beside one
MOST_LETTERS = 24  # of such a name
MOST_PAIRS = 30  # of classes that are confused
NAME_INCHES, LARGE_INCHES, LIST_INCHES = 0.13, 14, 5.2
WORST = 5
TITLE_WIDTH = 28  # letters above a picture of a sheet


def confusion_figure(confusion: Sequence[Sequence[int]], class_names: Sequence[str]) -> tuple[Figure, list[str]]:
    """The matrix as shares of each row (a row is a class, a column what was said), and lines on what is not drawn.

    The counts stand in it where they fit; else small shares are darkened, by their root, and the classes that are
    confused most stand beside it. Names are along the sides of up to MOST_NAMED classes.
    """
    counts = np.array(confusion, dtype=float)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    classes, letters = len(class_names), lettering(class_names, MOST_LETTERS)
    side = max(4, 1.8 + classes * min(0.32, max(NAME_INCHES, 12.2 / classes)))
    side = side if classes <= MOST_NAMED else LARGE_INCHES
    few = classes <= MOST_COUNTED
    with rc_context({"font.family": letters.families}):
        size = (side if few else side + LIST_INCHES, side)
        figure = Figure(figsize=size, dpi=130, layout="compressed", facecolor="white")
        if few:
            axes = figure.subplots()
        else:
            axes, panel = figure.subplots(1, 2, width_ratios=(side, LIST_INCHES))
            _list_confused(panel, counts, letters.drawn)
        axes.imshow(shares, cmap="Blues", norm=PowerNorm(1 if few else 0.5, 0, 1))
        axes.set_xlabel("said")
        axes.set_ylabel("is")
        if classes <= MOST_NAMED:
            axes.set_xticks(range(classes), letters.drawn, rotation=90, fontsize=7)
            axes.set_yticks(range(classes), letters.drawn, fontsize=7)
        for row, column in np.argwhere(counts > 0) if few else ():
            colour = "white" if shares[row, column] > 0.5 else "black"
            text = f"{counts[row, column]:.0f}"
            axes.text(column, row, text, ha="center", va="center", fontsize=6, color=colour)
    return figure, letters.notes


def _confused(counts: np.ndarray) -> list[tuple[float, int, int]]:
    """(images, label, said) of every pair of classes that is confused, the commonest first."""
    wrong = counts - np.diag(np.diag(counts))
    pairs = [(wrong[label, said], label, said) for label, said in np.argwhere(wrong > 0)]
    return sorted(pairs, key=lambda pair: -pair[0])


def _list_confused(axes: Axes, counts: np.ndarray, names: Sequence[str]) -> None:
    """The pairs of classes (is, said) that are confused most, with how many images of the class are."""
    pairs = _confused(counts)[:MOST_PAIRS]
    shares = [f"{count:.0f} of {counts[label].sum():.0f}" for count, label, _ in pairs]
    said = [f"{names[label]} → {names[other]}" for _, label, other in pairs]
    how = dict(va="top", fontsize=10, linespacing=1.5)
    axes.set_axis_off()
    axes.text(0.18, 1, "\n".join(["images", "", *shares]), ha="right", **how)
    axes.text(0.21, 1, "\n".join(["confused most: is → said", "", *(said or ["none"])]), **how)


def cam_sheet(
    names: Sequence[str], columns: Sequence[tuple[str, Sequence[np.ndarray], Sequence[str], np.ndarray]]
) -> tuple[Figure, list[str]]:
    """Images in rows, as the first classifier takes them; beside each what every classifier looks at.

    Args:
        names: the class of each image.
        columns: of each classifier its title, the images (h, w, 3) in [0, 1] as it takes them, what it said of each,
            and maps (N, h, w) in [0, 1].

    Returns:
        the figure, and lines on the names that it has by numbers.
    """
    answers = (name for _, _, said, _ in columns for name in said)
    texts = [*dict.fromkeys([*names, *answers, *(title for title, *_ in columns)])]
    letters = lettering(texts)
    drawn = dict(zip(texts, letters.drawn, strict=True))
    titles = [textwrap.fill(drawn[title], TITLE_WIDTH) for title, *_ in columns]
    most_lines = max(title.count("\n") for title in titles) + 1
    height = 1.85 * len(names) + 0.2 + 0.1 * most_lines
    with rc_context({"font.family": letters.families}):
        figure = Figure(figsize=(1.7 * (len(columns) + 1), height), dpi=130, layout="constrained", facecolor="white")
        grid = figure.subplots(len(names), len(columns) + 1, squeeze=False)
        for axes in grid.flat:
            axes.set_axis_off()
        for row, name in enumerate(names):
            grid[row, 0].imshow(columns[0][1][row])
            grid[row, 0].set_title(drawn[name], fontsize=7)
            for column, (_, images, said, maps) in enumerate(columns, 1):
                axes = grid[row, column]
                axes.imshow(images[row])
                axes.imshow(maps[row], cmap="jet", alpha=0.45, vmin=0, vmax=1)
                right = "" if said[row] == name else f"said {drawn[said[row]]}"
                axes.set_title(f"{titles[column - 1]}\n{right}" if row == 0 else right, fontsize=7)
    return figure, letters.notes


def scores_text(scores: Mapping[str, Any]) -> str:
    """Accuracy, calibration and the classes that are told worst."""
    accuracy = scores["accuracy"]
    interval = "" if accuracy["low"] is None else f" ({accuracy['low']:.1%} to {accuracy['high']:.1%})"
    known = sorted(
        ((share, name) for name, share in scores["by_class"].items() if share is not None), key=lambda pair: pair[0]
    )
    worst = "; ".join(f"{name} {share:.0%}" for share, name in known[:WORST] if share < 1) or "none"
    names = list(scores["by_class"])
    mistaken = _confused(np.array(scores["confusion"]))[:WORST]
    most = "; ".join(f"{names[label]} as {names[said]} ({count:.0f})" for count, label, said in mistaken) or "none"
    return (
        f"{accuracy['value']:.1%} of {accuracy['n']:,} test images right{interval}; by the commonest class alone "
        f"{scores['majority']:.1%}. Calibration error {scores['calibration_error']:.3f}. Worst: {worst}. "
        f"Most often mistaken: {most}."
    )


def summary_text(metrics: Mapping[str, Any], file: Path, confusion: Path, model: str | None) -> str:
    """What came out of a training, and what to do with it; `model` is where its network is, if the file cannot say."""
    training = metrics["training"]
    own = f"{training['trained_numbers']:,} parameters of {training['method']} and " * bool(
        training["trained_numbers"]
    )
    words = ["sd-atoms", "classify", "predict", "--classifier", str(file.parent)]
    words += [] if model is None else ["--model", model]
    lines = [
        f"\nTrained {own}{training['head_numbers']:,} of the head in {training['steps']} steps, "
        f"{training['seconds']:.0f} s; loss {training['first_loss']:.3f} -> {training['last_loss']:.3f}.",
        scores_text(metrics["test"]),
        f"Of the training images {metrics['train']['accuracy']['value']:.1%} are right.",
        f"\n{file} ({file.stat().st_size / 1000:.0f} KB) and {confusion}\n\nTry next:",
        f"  {shlex.join(words)} IMAGE …",
    ]
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class ClassifierRow:
    """A method on a set of images, means over its seeds.

    parameters: trained besides the head's. test, train, gap: (mean, low, high) of the accuracies and of train − test.
    """

    method: str
    seeds: int
    parameters: int
    head: int
    test: tuple[float, float | None, float | None]
    train: tuple[float, float | None, float | None]
    gap: tuple[float, float | None, float | None]
    calibration: float
    seconds: float
    memory_gb: float


def rows_markdown(title: str, rows: Sequence[ClassifierRow], failed: Mapping[str, str]) -> str:
    """The table, and what its columns mean."""
    header = ["method", "seeds", "parameters", "with head", "test", "train", "train − test", "ECE", "seconds", "GB"]
    cells = [
        [
            escaped(row.method), str(row.seeds), f"{row.parameters:,}", f"{row.parameters + row.head:,}",
            *(share_text(figure) for figure in (row.test, row.train, row.gap)), f"{row.calibration:.3f}",
            f"{row.seconds:,.0f}", f"{row.memory_gb:.2f}",
        ]
        for row in rows
    ]  # fmt: skip
    best = max(rows, key=lambda row: row.test[0])
    first = f"{escaped(best.method)} has the highest test accuracy, {share_text(best.test)}"
    if best.test[1] is not None:
        near = [escaped(row.method) for row in rows if row is not best and row.test[0] >= best.test[1]]
        first += f"; its interval takes in {', '.join(near)}" if near else "; its interval takes in no other"
    parts = [f"# {escaped(title)}", f"{first}."]
    parts.append(table(header, cells, right=[False, *[True] * (len(header) - 1)]))
    parts.append(
        "Accuracies in percent; ± is half an interval of 95 %, the wider one of two: over images, and over seeds. "
        "train: of up to 2,000 of the training images. parameters: trained besides the head. ECE: calibration error."
    )
    return "\n\n".join(parts + failures_markdown(failed)) + "\n"


def failures_markdown(failed: Mapping[str, str]) -> list[str]:
    """A paragraph on the runs that failed, or none."""
    lines = "\n".join(f"- {escaped(name)}: {escaped(why)}" for name, why in failed.items())
    return [f"Failed:\n\n{lines}"] if failed else []


def rows_csv(rows: Sequence[ClassifierRow]) -> str:
    """The same for other programs."""
    names = [f"{name}{end}" for name in ("test", "train", "gap") for end in ("", " low", " high")]
    header = ["method", "seeds", "parameters", "head", *names, "calibration", "seconds", "memory_gb"]
    cells = [
        [row.method, row.seeds, row.parameters, row.head, *row.test, *row.train, *row.gap, row.calibration,
         row.seconds, row.memory_gb]
        for row in rows
    ]  # fmt: skip
    return csv_text(header, cells)


def accuracy_figure(title: str, rows: Sequence[ClassifierRow]) -> tuple[Figure, list[str]]:
    """Left, test accuracy against trained parameters (Figure 6); right, train − test against them (Figure 7); and
    lines on the names that are drawn as numbers: the methods count from 0, the title comes last.
    """
    letters = lettering([*(row.method for row in rows), title])
    with rc_context({"font.family": letters.families}):
        figure = Figure(figsize=(9.5, 4.2), dpi=130, layout="constrained", facecolor="white")
        figure.suptitle(letters.drawn[-1], fontsize=10)
        for axes, name, label in zip(
            figure.subplots(1, 2), ("test", "gap"), ("test accuracy", "train − test accuracy"), strict=True
        ):
            for row, method in zip(rows, letters.drawn, strict=False):
                value, low, high = getattr(row, name)
                spread = None if low is None else [[100 * (value - low)], [100 * (high - value)]]
                x = max(1, row.parameters)  # the head alone
                axes.errorbar([x], [100 * value], yerr=spread, marker="o", markersize=5, linewidth=0.8, capsize=2)
                axes.annotate(method, (x, 100 * value), xytext=(5, 4), textcoords="offset points", fontsize=7)
            axes.set_xscale("log")
            axes.set_xlabel("trained parameters besides the head (1: none)", fontsize=9)
            axes.set_ylabel(f"{label}, %", fontsize=9)
            axes.grid(color="#e3e3e3", linewidth=0.7)
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(labelsize=8)
    return figure, letters.notes


def share_text(figure: tuple[float, float | None, float | None]) -> str:
    """A mean in percent with half its interval."""
    value, low, high = figure
    return f"{100 * value:.1f}" + ("" if low is None else f" ± {50 * (high - low):.1f}")

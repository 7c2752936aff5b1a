"""A picture of what an adapter changed: atoms before and after, and the energy of every layer."""

import math
import textwrap
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

LAYERS_SHOWN = 4
MOST_ATOMS = 12  # side by side
MOST_NAMES = 64  # bars that can be named
INK, LINE = "#333333", "#b5b5b5"


class Change(NamedTuple):
    """What an adapter does to one layer.

    layer, block: its name, and that of the block of the network it belongs to.
    share: of the energy |ΔF|² over all layers, 0 to 1. relative: |ΔF|/|F|.
    kernel: sides of its filters. atoms, change: (m, K) each, or None where there is no one set of atoms.
    """

    layer: str
    block: str
    share: float
    relative: float
    kernel: tuple[int, ...]
    atoms: Sequence[Sequence[float]] | None = None
    change: Sequence[Sequence[float]] | None = None


def atoms_figure(changes: Sequence[Change], title: str) -> Figure:
    """Left, where a layer has 2-D atoms: those of the layers with most energy, before, change, after. Right: energy
    per layer.

    Args:
        changes: one entry per layer, from the network's input to its output.
        title: stands above all.

    Raises:
        ValueError: there is no layer.
    """
    if not changes:
        raise ValueError("expected at least one layer")
    pictured = [
        entry
        for entry in changes
        if entry.atoms is not None and len(entry.kernel) == 2 and math.prod(entry.kernel) > 1
    ]
    pictured = sorted(pictured, key=lambda entry: -entry.share)[:LAYERS_SHOWN]
    bars_height = max(4.0, 1.2 + 0.165 * min(len(changes), MOST_NAMES))
    height = max(bars_height, 0.8 + 2.15 * len(pictured))
    figure = Figure(figsize=(13.5 if pictured else 8.0, height), dpi=130, layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
    with matplotlib.rc_context({"text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK}):
        figure.suptitle(textwrap.fill(title, 110 if pictured else 64), fontsize=12, weight="bold")
        if pictured:
            left, right = figure.subfigures(1, 2, width_ratios=(1.0, 1.15), wspace=0.03)
            left.suptitle("Atoms, in the layers where their |ΔF|² is largest", fontsize=10)
            places = left.subplots(len(pictured), 1, squeeze=False).flat
            for axes, entry in zip(places, pictured, strict=True):
                _draw_atoms(axes, entry)
            axes.set_xlabel(
                "number of the atom, and its |ΔD|. ×: the change is drawn that many times stronger", fontsize=7.5
            )
        else:
            right = figure
        _draw_bars(right.subplots(), changes, height)
    return figure


def _draw_atoms(axes: Axes, entry: Change) -> None:
    before, change = (np.asarray(values, dtype=float).reshape(-1, *entry.kernel) for values in entry[-2:])
    moved = np.linalg.norm(change.reshape(len(change), -1), axis=1)
    chosen = np.sort(np.argsort(-moved, kind="stable")[:MOST_ATOMS])
    before, change, moved = before[chosen], change[chosen], moved[chosen]
    after = before + change
    limit = max(np.abs(before).max(), np.abs(after).max()) or 1.0
    factor = _magnification(np.abs(change).max(), limit)
    rows = [_strip(before), _strip(change * factor), _strip(after)]
    gap = np.full((1, rows[0].shape[1]), np.nan)
    picture = np.concatenate([rows[0], gap, rows[1], gap, rows[2]])
    image = axes.imshow(picture, cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
    rows_px, columns_px = entry.kernel
    axes.set_xticks(
        [index * (columns_px + 1) + (columns_px - 1) / 2 for index in range(len(chosen))],
        [f"{number}\n{size:.3f}" for number, size in zip(chosen, moved, strict=True)],
        fontsize=7,
    )
    axes.set_yticks(
        [index * (rows_px + 1) + (rows_px - 1) / 2 for index in range(3)],
        ["before", "change" if factor == 1 else f"change ×{factor:g}", "after"],
        fontsize=8,
    )
    for row in range(3):
        for column in range(len(chosen)):
            corner = (column * (columns_px + 1) - 0.5, row * (rows_px + 1) - 0.5)
            axes.add_patch(
                Rectangle(corner, columns_px, rows_px, fill=False, edgecolor=LINE, linewidth=0.6, clip_on=False)
            )
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(f"{entry.layer}   |ΔF|/|F| = {entry.relative:.1%}", fontsize=8.5, loc="left", pad=8)
    bar = axes.figure.colorbar(image, ax=axes, shrink=0.85, aspect=14, pad=0.02)
    bar.ax.tick_params(labelsize=6.5, length=2)
    bar.outline.set_visible(False)
    bar.set_label("value of a tap", fontsize=7)


def _strip(atoms: np.ndarray) -> np.ndarray:
    """(m, h, w) -> (h, m·(w + 1) − 1), side by side with gaps."""
    apart = np.pad(atoms, ((0, 0), (0, 0), (0, 1)), constant_values=np.nan)
    return np.concatenate(list(apart), axis=1)[:, :-1]


def _magnification(size: float, limit: float) -> float:
    """1, 2, 5, 10, … by which something small can be multiplied and stay within the limit."""
    if size <= 0 or size * 2 > limit:
        return 1.0
    power = 10.0 ** math.floor(math.log10(limit / size))
    return max(step * power for step in (1, 2, 5) if step * power * size <= limit)


def _draw_bars(axes: Axes, changes: Sequence[Change], height_in: float) -> None:
    places = np.arange(len(changes))
    shares = np.array([100 * entry.share for entry in changes])
    blocks = list(dict.fromkeys(entry.block for entry in changes))
    colours = _colours(blocks)
    axes.barh(places, shares, height=0.78, color=[colours[entry.block] for entry in changes])
    axes.set_ylim(len(changes) - 0.4, -0.6)  # the input is at the top
    axes.set_xlim(0, 1.05 * max(shares.max(), 1e-9))
    axes.set_title("Where the change is: energy of each layer, input to output", fontsize=10)
    axes.set_xlabel("share of |ΔF|² over all layers (%)", fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(axis="x", color="#e3e3e3", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    if len(changes) <= MOST_NAMES:
        # the block stands at the right, so the name goes on from there
        names = [entry.layer.removeprefix(f"{entry.block}.") for entry in changes]
        axes.set_yticks(places, names, fontsize=7)
    else:
        axes.set_yticks([])
    axes.tick_params(axis="y", length=0)
    line = 0.16 * len(changes) / (height_in - 1.0)  # a line of text, in bars
    last = -math.inf
    for block in blocks:
        inside = [index for index, entry in enumerate(changes) if entry.block == block]
        last = max(float(np.mean(inside)), last + line)
        axes.text(
            1.01,
            last,
            f"{block}  {shares[inside].sum():.1f}%",
            transform=axes.get_yaxis_transform(),
            color=colours[block],
            fontsize=8,
            weight="bold",
            va="center",
        )


def _colours(blocks: Sequence[str]) -> dict[str, tuple[float, ...] | str]:
    """Blues on the way down, green in the middle, oranges on the way up, grey at the ends; darker further inside."""
    colours = dict.fromkeys(blocks, "#7a7a7a")
    for kind, palette, inwards in (("down", "Blues", True), ("up", "Oranges", False)):
        members = [block for block in blocks if block.startswith(kind)]
        shades = np.linspace(0.5, 0.9, len(members))
        for block, shade in zip(members, shades if inwards else shades[::-1], strict=True):
            colours[block] = matplotlib.colormaps[palette](shade)
    return colours | {block: "#3a8f4d" for block in blocks if block.startswith("mid")}

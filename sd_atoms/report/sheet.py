"""Which step, which strength: pictures of all of them on one sheet, and the cell that the scores would pick."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from sd_atoms.report.grid import Block, labelled_blocks
from sd_atoms.report.rows import selection

DRAWS, SHARE = 1000, 0.95
SHOWN = 4  # cells that are named
GAP_PX, FRAME_PX, FRAME_COLOUR = 4, 8, (206, 92, 0)
WIDEST_PX = 560  # of a cell


@dataclass(frozen=True)
class Cell:
    """What a checkpoint draws at a strength: the same prompts and seeds in every cell.

    likeness, text: of each picture its cosine to the photos and to its own prompt, (N,); None where nothing scores it.
    """

    step: int
    strength: float
    likeness: Sequence[float] | None = None
    text: Sequence[float] | None = None

    @property
    def name(self) -> str:
        return f"step {self.step} at strength {self.strength:g}"

    @property
    def score(self) -> float | None:
        """Harmonic mean of the mean likeness and the mean text; None where one of them is missing."""
        if self.likeness is None or self.text is None:
            return None
        return selection(float(np.mean(self.likeness)), float(np.mean(self.text)))

    def entries(self) -> dict[str, Any]:
        """The same for JSON."""
        means = {
            name: None if values is None else round(float(np.mean(values)), 4)
            for name, values in (("likeness", self.likeness), ("text", self.text))
        }
        score = None if self.score is None else round(self.score, 4)
        return {"step": self.step, "strength": self.strength, **means, "score": score}


Choice = tuple[Cell, list[Cell]]  # the cell that scores would pick, and those that so few pictures do not tell from it


def picked(cells: Sequence[Cell]) -> Choice | None:
    """The cell of the highest score, and the others that so few pictures do not tell from it, the higher first.

    Of equal ones the gentlest: the smaller strength, then the earlier step. A cell is told apart where at least 97.5 %
    of DRAWS draws of the pictures, the same for both cells, leave it behind. None where cells have no score. At
    strength 0 there is no adapter to pick.
    """
    cells = [cell for cell in cells if cell.strength]
    if not cells or any(cell.score is None for cell in cells):
        return None
    best = min(cells, key=lambda cell: (-cell.score, cell.strength, cell.step))
    count = len(best.likeness)
    drawn = np.random.default_rng(0).integers(count, size=(DRAWS, count))
    ahead = _scores(best, drawn)
    alike = [
        cell for cell in cells if cell is not best and np.mean(ahead > _scores(cell, drawn)) < 1 - (1 - SHARE) / 2
    ]
    return best, sorted(alike, key=lambda cell: -cell.score)


def _scores(cell: Cell, drawn: np.ndarray) -> np.ndarray:
    likeness, text = (np.asarray(values)[drawn].mean(1) for values in (cell.likeness, cell.text))
    return np.array([selection(*pair) for pair in zip(likeness.tolist(), text.tolist(), strict=True)])


def sheet_image(
    cells: Sequence[Cell],
    choice: Choice | None,
    pictures: Sequence[Sequence[Sequence[Image.Image]]],
    prompts: Sequence[str],
    title: str,
) -> Image.Image:
    """The sheet: a row for each step, a column for each strength, in each cell a column for each prompt and a row for
    each seed; a frame around the cell that the scores would pick.

    Args:
        cells: step by step, strengths in their order.
        choice: of `picked`.
        pictures: of each cell its rows.
        prompts: of the columns in a cell.
        title: above all.
    """
    best = None if choice is None else choice[0]
    steps = list(dict.fromkeys(cell.step for cell in cells))
    blocks = []
    for step in steps:
        own = [place for place, cell in enumerate(cells) if cell.step == step]
        shown = [_tiled(pictures[place], cells[place] is best) for place in own]
        blocks.append(Block(f"step {step}", shown, [_caption(cells[place], cells[place] is best) for place in own]))
    width = min(WIDEST_PX, max(max(picture.size) for block in blocks for picture in block.pictures))
    return labelled_blocks(blocks, len(cells) // len(steps), title=f"{title}: {' | '.join(prompts)}", cell_px=width)


def sheet_text(cells: Sequence[Cell], choice: Choice | None, run: str) -> str:
    """What the scores say, and how to write the cell that somebody likes."""
    if choice is None:
        cell = min(cells, key=lambda own: (-own.step, abs(own.strength - 1)))
        lines = ["No scores: networks names none that knows texts. Choose by eye."]
    else:
        cell, alike = choice
        means = cell.entries()
        lines = [
            f"Of {len(cells)} cells the scores would pick {cell.name}: its likeness {means['likeness']:.3f} and text "
            f"{means['text']:.3f} have the highest harmonic mean, {means['score']:.3f}."
        ]
        without = max((own.score for own in cells if not own.strength), default=0)
        if without > cell.score:
            lines.append(f"Without the adapter, at strength 0, it is higher: {without:.3f}.")
        if alike:
            names = ", ".join(f"{other.name} ({other.score:.3f})" for other in alike[:SHOWN])
            more = f" and {len(alike) - SHOWN} more" if len(alike) > SHOWN else ""
            lines.append(f"{len(cell.likeness)} pictures a cell do not tell it from {names}{more}.")
        lines.append("The choice is yours: look at the sheet.")
    words = ["sd-atoms", "pick", run, "--step", str(cell.step), "--strength", f"{cell.strength:g}"]
    lines.append(f"To write a cell:\n  {shlex.join(words)}")
    return "\n".join(lines)


def sheet_entries(cells: Sequence[Cell], choice: Choice | None, more: Mapping[str, Any]) -> dict[str, Any]:
    """What sheet.json holds."""
    found = None
    if choice is not None:
        best, alike = choice
        found = {
            "step": best.step,
            "strength": best.strength,
            "not_told_from": [{"step": cell.step, "strength": cell.strength} for cell in alike],
        }
    return {**more, "picked": found, "cells": [cell.entries() for cell in cells]}


def _caption(cell: Cell, best: bool) -> str:
    entries = cell.entries()
    scores = [f"{name} {entries[name]:.3f}" for name in ("likeness", "text", "score") if entries[name] is not None]
    return f"{'picked by the scores: ' if best else ''}strength {cell.strength:g}{': ' if scores else ''}" + ", ".join(
        scores
    )


def _tiled(rows: Sequence[Sequence[Image.Image]], framed: bool) -> Image.Image:
    width, height = rows[0][0].size
    across, down = len(rows[0]), len(rows)
    tile = Image.new(
        "RGB", (across * width + (across - 1) * GAP_PX, down * height + (down - 1) * GAP_PX), (255, 255, 255)
    )
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            tile.paste(picture, (x * (width + GAP_PX), y * (height + GAP_PX)))
    return ImageOps.expand(tile, FRAME_PX, FRAME_COLOUR if framed else (255, 255, 255))

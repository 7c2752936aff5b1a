"""Contact sheets: pictures in rows and columns, with labels that stay legible when the sheet is looked at whole.

A sheet is put together from boxes, small RGB images: a picture fitted to its cell, a piece of wrapped text, boxes
beside or above one another. A box is as large as what it holds, so nothing is ever cut off.
"""

import math
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont, ImageOps

PAPER = (255, 255, 255)
INK = (51, 51, 51)
EMPTY = (236, 236, 236)

SMALLEST_CELL_PX = 160  # smaller pictures are enlarged by the first whole factor that reaches this
LARGEST_CELL_PX = 256  # larger ones are reduced, unless the caller says how large a cell is
SMALLEST_TEXT_PX = 12

_OVERHANG_PX = 1  # letters reach this far beyond the length that the font reports

# Pillow's own font knows ASCII and a few signs. Accents are dropped, these are spelt out, all others show as a box.
_SPELT_OUT = str.maketrans({"–": "-", "—": "-", "−": "-", "×": "x", "→": "->", "≤": "<=", "≥": ">=", "ß": "ss"})


def image_grid(
    rows: Sequence[Sequence[Image.Image | None]],
    row_labels: Sequence[str] | None = None,
    column_labels: Sequence[str] | None = None,
    *,
    title: str | None = None,
) -> Image.Image:
    """Rows of pictures with labels at their left and above their columns.

    Args:
        rows: equally long rows of pictures of any size; None is an empty cell.
        row_labels: one per row, such as the prompt; wrapped to the width of two cells.
        column_labels: one per column, such as the method or the seed; wrapped to the width of a cell.
        title: stands above everything; wrapped to the width of the sheet.

    Raises:
        ValueError: no pictures, rows of several lengths, or more or fewer labels than rows or columns.
    """
    columns = len(rows[0]) if rows else 0
    if columns == 0 or any(len(row) != columns for row in rows):
        raise ValueError(f"expected equally long rows of pictures, got lengths {[len(row) for row in rows]}")
    for what, labels, count in (("row", row_labels, len(rows)), ("column", column_labels, columns)):
        if labels is not None and len(labels) != count:
            raise ValueError(f"expected {count} {what} labels, got {len(labels)}")

    cells = _cells([picture for row in rows for picture in row])
    cell_width, gap_px, font = cells[0].width, _gap(cells), _font(cells[0].width / 8)
    lines = _lines(cells, columns, gap_px)
    if column_labels is not None:
        heads = [_text(label, font, cell_width, across=0.5) for label in column_labels]
        lines.insert(0, _beside(heads, gap_px, down=1.0))
    if row_labels is not None:
        width = min(max(_length(label, font) for label in row_labels), 2 * cell_width)
        labels = [_text(label, font, width) for label in row_labels]
        if column_labels is not None:
            labels.insert(0, _blank(width, 1))
        lines = [_beside([label, line], 2 * gap_px, down=0.5) for label, line in zip(labels, lines, strict=True)]
    return _sheet(_above(lines, gap_px), title, cells)


class Block(NamedTuple):
    """A section of a sheet: its heading (may be empty), its pictures, and one caption per picture or none at all."""

    heading: str
    pictures: Sequence[Image.Image | None]
    captions: Sequence[str] | None = None


def labelled_blocks(
    blocks: Sequence[Block], columns: int, *, title: str | None = None, cell_px: int | None = None
) -> Image.Image:
    """Sections one above the other, `columns` pictures to a line; cells have one size throughout.

    `title` and None for a picture are as in `image_grid`; captions stand below their pictures, wrapped. cell_px:
    longest side of a picture on the sheet; None takes that of the largest picture, at least 160 px (a whole multiple
    of smaller pictures) and at most 256 px otherwise.

    Raises:
        ValueError: no pictures in any block, no columns, or more or fewer captions than pictures in a block.
    """
    cells = _cells([picture for block in blocks for picture in block.pictures], cell_px)
    gap_px, small = _gap(cells), _font(cells[0].width / 12)
    remaining = iter(cells)
    bodies = []
    for block in blocks:
        boxes = [next(remaining) for _ in block.pictures]
        if block.captions is not None:
            if len(block.captions) != len(boxes):
                raise ValueError(f"expected {len(boxes)} captions, got {len(block.captions)}")
            texts = [_text(caption, small, cells[0].width) for caption in block.captions]
            boxes = [_above([box, text], gap_px // 2) for box, text in zip(boxes, texts, strict=True)]
        bodies.append(_above(_lines(boxes, columns, gap_px), gap_px if block.captions is None else 2 * gap_px))
    width = max(body.width for body in bodies)
    font = _font(cells[0].width / 8)
    sections = [
        _above([_text(block.heading, font, width), body], gap_px) if block.heading else body
        for block, body in zip(blocks, bodies, strict=True)
    ]
    return _sheet(_above(sections, 3 * gap_px), title, cells)


def _cells(pictures: Sequence[Image.Image | None], cell_px: int | None = None) -> list[Image.Image]:
    """Boxes of one size, each with its picture in the middle; None becomes a grey box."""
    if not pictures:
        raise ValueError("expected at least one picture")
    longest = max((max(picture.size) for picture in pictures if picture is not None), default=SMALLEST_CELL_PX)
    if cell_px is None:
        cell_px = min(longest, LARGEST_CELL_PX)
        if longest < SMALLEST_CELL_PX:
            cell_px = longest * math.ceil(SMALLEST_CELL_PX / longest)
    fitted = [None if picture is None else _fitted(picture.convert("RGB"), cell_px) for picture in pictures]
    shown = [box for box in fitted if box is not None] or [_blank(cell_px, cell_px)]
    width, height = max(box.width for box in shown), max(box.height for box in shown)
    cells = []
    for box in fitted:
        cell = Image.new("RGB", (width, height), EMPTY if box is None else PAPER)
        if box is not None:
            cell.paste(box, ((width - box.width) // 2, (height - box.height) // 2))
        cells.append(cell)
    return cells


def _fitted(picture: Image.Image, cell_px: int) -> Image.Image:
    """Scales the longest side to `cell_px`.

    Pictures are enlarged as crisp square pixels: by a whole factor first, then reduced to the size that is asked for.
    """
    scale = cell_px / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    factor = math.ceil(scale)
    if factor > 1:
        picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    return picture.resize(size, Image.Resampling.LANCZOS)


def _gap(cells: Sequence[Image.Image]) -> int:
    return max(4, round(cells[0].width / 24))


def _font(size_px: float) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size=max(SMALLEST_TEXT_PX, round(size_px)))


def _text(text: str, font: ImageFont.FreeTypeFont, width_px: int, *, across: float = 0.0) -> Image.Image:
    """A box of wrapped text, `width_px` wide; `across` is 0 for flush left and 0.5 for centred."""
    lines = _wrap(text, font, width_px)
    line_px = round(1.25 * font.size)
    box = _blank(width_px, line_px * len(lines))
    draw = ImageDraw.Draw(box)
    for number, line in enumerate(lines):
        x = _OVERHANG_PX + across * (width_px - _length(line, font))
        draw.text((x, number * line_px + 0.95 * font.size), line, INK, font, anchor="ls")
    return box


def _wrap(text: str, font: ImageFont.FreeTypeFont, width_px: float) -> list[str]:
    """Breaks at spaces, and inside words wider than a line; no line is wider, unless one letter is."""
    lines = [""]
    for word in _printable(text).split():
        longer = f"{lines[-1]} {word}".lstrip()
        if _length(longer, font) <= width_px:
            lines[-1] = longer
            continue
        lines.append("")
        for letter in word:
            if _length(lines[-1] + letter, font) > width_px:
                lines.append("")
            lines[-1] += letter
    return [line for line in lines if line]


def _length(text: str, font: ImageFont.FreeTypeFont) -> int:
    """Width in pixels of one line of text."""
    return math.ceil(font.getlength(_printable(text))) + 2 * _OVERHANG_PX


def _printable(text: str) -> str:
    letters = []
    for letter in text.translate(_SPELT_OUT):
        without_accents = unicodedata.normalize("NFKD", letter).encode("ascii", "ignore").decode()
        letters.append(letter if letter.isascii() else without_accents or letter)
    return "".join(letters)


def _blank(width_px: int, height_px: int) -> Image.Image:
    return Image.new("RGB", (width_px, height_px), PAPER)


def _beside(boxes: Sequence[Image.Image], gap_px: int, *, down: float) -> Image.Image:
    """Boxes from left to right; `down` is 0 to align their tops, 0.5 their middles and 1 their feet."""
    height = max(box.height for box in boxes)
    row = _blank(sum(box.width for box in boxes) + gap_px * (len(boxes) - 1), height)
    x = 0
    for box in boxes:
        row.paste(box, (x, round(down * (height - box.height))))
        x += box.width + gap_px
    return row


def _above(boxes: Sequence[Image.Image], gap_px: int) -> Image.Image:
    """Boxes from top to bottom, flush left."""
    column = _blank(max(box.width for box in boxes), sum(box.height for box in boxes) + gap_px * (len(boxes) - 1))
    y = 0
    for box in boxes:
        column.paste(box, (0, y))
        y += box.height + gap_px
    return column


def _lines(boxes: Sequence[Image.Image], columns: int, gap_px: int) -> list[Image.Image]:
    """Boxes in reading order -> one box for every `columns` of them."""
    if columns < 1:
        raise ValueError(f"expected at least one column, got {columns}")
    return [_beside(boxes[start : start + columns], gap_px, down=0.0) for start in range(0, len(boxes), columns)]


def _sheet(body: Image.Image, title: str | None, cells: Sequence[Image.Image]) -> Image.Image:
    """Adds the title and an even margin."""
    gap_px = _gap(cells)
    if title is not None:
        body = _above([_text(title, _font(cells[0].width / 6.5), body.width), body], 2 * gap_px)
    return ImageOps.expand(body, 2 * gap_px, PAPER)

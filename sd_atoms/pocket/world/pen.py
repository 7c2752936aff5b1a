"""Colours, and a pen that draws in picture pixels on a supersampled canvas."""

import random
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image, ImageDraw

PICTURE_PX = 128
SUPERSAMPLING = 2
CANVAS_PX = PICTURE_PX * SUPERSAMPLING

Colour = tuple[int, ...]  # red, green, blue in [0, 255], and an alpha where a shape is translucent
Point = tuple[float, float]  # in picture pixels, y downwards

COLOURS: dict[str, Colour] = {
    "grey": (158, 156, 152),
    "white": (236, 232, 224),
    "beige": (214, 192, 150),
    "brown": (146, 104, 70),
    "red": (190, 60, 52),
    "blue": (70, 110, 190),
    "green": (84, 150, 84),
    "pink": (232, 150, 172),
    "purple": (140, 92, 170),
    "yellow": (236, 204, 84),
    "orange": (228, 140, 62),
    "turquoise": (64, 186, 180),
}
STONE_COLOURS = ("grey", "white", "beige", "brown")
VIVID_COLOURS = ("red", "blue", "green", "pink", "purple", "yellow", "orange", "turquoise")
ROOF_COLOURS = ("red", "blue", "green", "purple", "grey", "orange", "brown")
DARK = (52, 44, 48)
WHITE = (255, 255, 255)


def clamp(channels: Iterable[float]) -> Colour:
    """Whole channel values in [0, 255]; fractions are cut off."""
    return tuple(max(0, min(255, int(value))) for value in channels)


def shade(colour: Colour, factor: float) -> Colour:
    """The colour made darker (factor < 1) or lighter, without its alpha."""
    return clamp(value * factor for value in colour[:3])


def mix(first: Colour, second: Colour, share: float) -> Colour:
    """`first` at share 0, `second` at share 1."""
    return clamp(a + (b - a) * share for a, b in zip(first, second, strict=True))


def jitter(rng: random.Random, colour: Colour, spread: float = 14) -> Colour:
    """A colour near the given one: one shift for all channels and half as much for each channel alone."""
    shift = rng.uniform(-spread, spread)
    return clamp(value + shift + rng.uniform(-spread, spread) * 0.5 for value in colour)


def roof_colour(rng: random.Random) -> Colour:
    return jitter(rng, COLOURS[rng.choice(ROOF_COLOURS)], 20)


class Pen:
    """Draws on `image`, which is CANVAS_PX wide and high, with all lengths in picture pixels.

    On an RGB image colours with an alpha blend; on an RGBA image they replace what is there.
    """

    def __init__(self, image: Image.Image):
        self.image = image
        self._draw = ImageDraw.Draw(image, "RGBA") if image.mode == "RGB" else ImageDraw.Draw(image)

    def polygon(self, points: Sequence[Point], colour: Colour) -> None:
        self._draw.polygon([(x * SUPERSAMPLING, y * SUPERSAMPLING) for x, y in points], fill=colour)

    def rectangle(self, x0: float, y0: float, x1: float, y1: float, colour: Colour) -> None:
        """Two opposite corners in any order."""
        corners = (min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1))
        self._draw.rectangle([value * SUPERSAMPLING for value in corners], fill=colour)

    def ellipse(self, x: float, y: float, radius_x: float, radius_y: float, colour: Colour) -> None:
        corners = (x - radius_x, y - radius_y, x + radius_x, y + radius_y)
        self._draw.ellipse([value * SUPERSAMPLING for value in corners], fill=colour)

    def half_ellipse(self, x0: float, y0: float, x1: float, y1: float, colour: Colour) -> None:
        """The upper half of the ellipse inside a box."""
        self._draw.pieslice([value * SUPERSAMPLING for value in (x0, y0, x1, y1)], 180, 360, fill=colour)

    def line(self, points: Sequence[Point], colour: Colour, width: float = 1.0) -> None:
        points = [(x * SUPERSAMPLING, y * SUPERSAMPLING) for x, y in points]
        self._draw.line(points, fill=colour, width=max(1, int(width * SUPERSAMPLING)))

    def wall(self, x0: float, y0: float, x1: float, y1: float, colour: Colour) -> None:
        """A rectangle lit from the left."""
        self.rectangle(x0, y0, x1, y1, colour)
        self.rectangle(x0 + 0.62 * (x1 - x0), y0, x1, y1, shade(colour, 0.8))

    def roof(self, x: float, y: float, width: float, height: float, colour: Colour) -> None:
        """A triangle lit from the left; (x, y) is the middle of its base."""
        self.polygon([(x - width / 2, y), (x + width / 2, y), (x, y - height)], colour)
        self.polygon([(x + width * 0.1, y), (x + width / 2, y), (x, y - height)], shade(colour, 0.76))

    def gradient(self, y0: float, y1: float, top: Colour, bottom: Colour) -> None:
        """Fills the full width between two heights."""
        rows = max(1, int((y1 - y0) * SUPERSAMPLING))
        column = np.linspace(top, bottom, rows).astype(np.uint8)[:, None]  # (rows, 1, 3)
        self.image.paste(Image.fromarray(column).resize((CANVAS_PX, rows)), (0, int(y0 * SUPERSAMPLING)))


def window(pen: Pen, x: float, y: float, width: float, height: float, colour: Colour = DARK) -> None:
    """An arched window around (x, y)."""
    pen.rectangle(x - width / 2, y - height / 2, x + width / 2, y + height / 2, colour)
    pen.ellipse(x, y - height / 2, width / 2, width / 2, colour)


def battlements(pen: Pen, x0: float, x1: float, y: float, colour: Colour, tooth: float = 3.0) -> None:
    """A row of square teeth of about `tooth` pixels on top of a wall that ends at height y."""
    count = max(2, int((x1 - x0) / (2 * tooth)))
    step = (x1 - x0) / (2 * count - 1)
    for index in range(count):
        pen.rectangle(x0 + 2 * index * step, y - tooth, x0 + (2 * index + 1) * step, y + 0.5, colour)

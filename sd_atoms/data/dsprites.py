"""dSprites drawn from its factors (Matthey et al. 2017): shape, scale, orientation and place, in white on black.

The published images are 64 px, of 3 shapes × 6 scales × 40 orientations × 32 × 32 places; these are drawn anew from
the same factors, not copied, and differ from them in the size of the shapes and in pixels of their edges.
"""

import math
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

SIDE_PX = 64
SHAPES = ("square", "ellipse", "heart")
SCALES, ORIENTATIONS, PLACES = 6, 40, 32
COUNT = len(SHAPES) * SCALES * ORIENTATIONS * PLACES * PLACES  # 737,280
_RADIUS_PX = 15.5  # of a circle around any shape at scale 1; the outermost places touch the border
_FIRST_PX = 16.5  # middle of a shape at place 0; places are 1 px apart
_FINER = 8  # an edge is where half of a pixel is covered


class Factors(NamedTuple):
    """What an image shows, as numbers from 0 on: of SHAPES, SCALES, ORIENTATIONS and PLACES across and down."""

    shape: int
    scale: int
    orientation: int
    x: int
    y: int


def factors_of(number: int) -> Factors:
    """The factors of image number 0 to COUNT - 1, in the order of the published file: y runs fastest."""
    sizes = (len(SHAPES), SCALES, ORIENTATIONS, PLACES, PLACES)
    return Factors(*(int(part) for part in np.unravel_index(number, sizes)))


def location_class(factors: Factors) -> int:
    """VTAB's dSprites location: ⌊x / 2⌋, 0 to 15."""
    return factors.x // 2


def orientation_class(factors: Factors) -> int:
    """VTAB's dSprites orientation: ⌊orientation / 2.5⌋, 0 to 15, of three and two orientations in turn."""
    return int(factors.orientation / 2.5)


def draw_sprite(factors: Factors) -> Image.Image:
    """The image, SIDE_PX square, RGB, every pixel black or white."""
    scale = 0.5 + 0.5 * factors.scale / (SCALES - 1)
    angle = 2 * math.pi * factors.orientation / (ORIENTATIONS - 1)  # both ends are there: 0 and 2π look alike
    cos, sin = math.cos(angle), math.sin(angle)
    left, top = _FIRST_PX + factors.x, _FIRST_PX + factors.y
    points = [
        (
            (left + scale * _RADIUS_PX * (cos * x - sin * y)) * _FINER,
            (top + scale * _RADIUS_PX * (sin * x + cos * y)) * _FINER,
        )
        for x, y in _OUTLINES[SHAPES[factors.shape]]
    ]
    canvas = Image.new("L", (SIDE_PX * _FINER, SIDE_PX * _FINER))
    ImageDraw.Draw(canvas).polygon(points, fill=255)
    small = canvas.resize((SIDE_PX, SIDE_PX), Image.Resampling.BOX)
    return small.point(lambda value: 255 if value > 127 else 0).convert("RGB")


def _heart(turn: float) -> tuple[float, float]:
    """The usual heart curve, point down, inside the circle of radius 1."""
    y = 13 * math.cos(turn) - 5 * math.cos(2 * turn) - 2 * math.cos(3 * turn) - math.cos(4 * turn)
    return 16 * math.sin(turn) ** 3 / 17.5, -(y + 2.5) / 17.5


_HALF = math.sqrt(0.5)
_TURNS = [2 * math.pi * number / 72 for number in range(72)]
_OUTLINES = {
    "square": [(-_HALF, -_HALF), (_HALF, -_HALF), (_HALF, _HALF), (-_HALF, _HALF)],
    "ellipse": [(math.cos(turn), math.sin(turn) / 2) for turn in _TURNS],
    "heart": [_heart(turn) for turn in _TURNS],
}

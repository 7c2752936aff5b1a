"""What a landmark stands on and what lies in front of it. The order of the random draws is part of the world."""

import random
from typing import NamedTuple

from PIL import Image

from sd_atoms.pocket.world.figures import creature, leafy_tree, mushroom, pine, sheep
from sd_atoms.pocket.world.pen import CANVAS_PX, PICTURE_PX, SUPERSAMPLING, Pen, jitter, shade

SPRING_LEAVES = ((36, 116, 50), (60, 146, 56))
AUTUMN_LEAVES = ((230, 100, 34), (240, 176, 44), (196, 60, 40))
GLOWS = ((70, 236, 226), (255, 110, 200), (150, 255, 110))
FURS = ((250, 170, 60), (140, 220, 250), (230, 130, 230))


class CliffEdge(NamedTuple):
    x: float
    side: int  # 1: the rock is on the left and the sea on the right; -1: the other way round


def draw_support(
    pen: Pen, rng: random.Random, setting: str, centre: float, base: float, size: float
) -> CliffEdge | None:
    """Draws what the landmark stands on in settings without solid ground; returns the edge of a cliff."""
    if setting == "cliff":
        return draw_cliff(pen, rng, centre, base, size)
    if setting == "island":
        draw_island(pen, rng, centre, base, size)
    return None


def draw_cliff(pen: Pen, rng: random.Random, centre: float, base: float, size: float) -> CliffEdge:
    side = rng.choice([-1, 1])
    edge = centre + side * size * 0.72
    far = -10 if side > 0 else PICTURE_PX + 10
    rock = jitter(rng, (128, 104, 84), 10)
    face = [
        (edge, base - 1),
        (edge + side * 5, base + 10),
        (edge - side * 3, base + 26),
        (edge + side * 7, base + 44),
        (edge, PICTURE_PX),
    ]
    pen.polygon([(far, base - 1), *face, (far, PICTURE_PX)], rock)
    shadow_edge = [(edge - side * 18, PICTURE_PX), (edge - side * 10, base + 36)]
    pen.polygon([(edge - side * 14, base), *face, *shadow_edge], shade(rock, 0.74))
    for index in range(5):
        x = far + (edge - far) * (index + 0.7) / 5.6
        crack = [(x, base + 8), (x + rng.uniform(-5, 5), base + 28), (x + rng.uniform(-6, 6), base + 48)]
        pen.line(crack, shade(rock, 0.62), 1.4)
    turf = [(far, base - 2), (edge, base - 2), (edge + side * 2, base + 3), (far, base + 4)]
    pen.polygon(turf, (104, 150, 72))
    return CliffEdge(edge, side)


def draw_island(pen: Pen, rng: random.Random, centre: float, base: float, size: float) -> None:
    half = size * 0.82
    rock = jitter(rng, (132, 104, 86), 10)
    right_side = [
        (centre + half, base + 2),
        (centre + half * 0.62, base + 18),
        (centre + half * 0.34, base + 26),
        (centre + half * 0.08, base + 46),
    ]
    left_side = [(centre - half * 0.24, base + 28), (centre - half * 0.6, base + 20)]
    pen.polygon([(centre - half, base + 2), *right_side, *left_side], rock)
    pen.polygon([(centre + half * 0.1, base + 4), *right_side], shade(rock, 0.72))
    pen.ellipse(centre, base + 1, half, 6, (104, 168, 74))
    pen.rectangle(centre - half * 0.75, base + 2, centre - half * 0.64, base + 34, (190, 226, 246))


def draw_foreground(pen: Pen, rng: random.Random, setting: str, base: float, edge: CliffEdge | None) -> None:
    """Draws what lies in front of the landmark; `edge` is what `draw_support` returned."""
    if setting == "lake":
        lake(pen, rng, base)
    elif setting == "cliff":
        surf(pen, rng, edge)
    elif setting == "forest":
        undergrowth(pen, rng, base, SPRING_LEAVES, 3, 1.8)
    elif setting == "autumn":
        undergrowth(pen, rng, base, AUTUMN_LEAVES, 1.6, 1.1)
    elif setting == "sheepfield":
        for index in range(7):
            x = 10 + index * 18 + rng.uniform(-6, 6)
            y = rng.choice([100, 110, 121]) + rng.uniform(-3, 3)
            sheep(pen, x, y, rng.uniform(9, 14))
    elif setting == "otherworld":
        otherworld(pen, rng)
    elif setting == "mountains":
        for _ in range(5):
            x = rng.choice([rng.uniform(0, 30), rng.uniform(98, 128)])
            y, height = rng.uniform(base + 2, base + 18), rng.uniform(16, 26)
            pine(pen, x, y, height, jitter(rng, (48, 100, 66), 10))


def lake(pen: Pen, rng: random.Random, base: float) -> None:
    """Mirrors what stands above the shore in the water."""
    shore = base + 4
    depth = PICTURE_PX - shore
    shore_px = int(shore * SUPERSAMPLING)
    above = pen.image.crop((0, int((shore - depth) * SUPERSAMPLING), CANVAS_PX, shore_px))
    mirrored = above.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    water = Image.new("RGB", mirrored.size, jitter(rng, (70, 132, 176), 14))
    pen.image.paste(Image.blend(water, mirrored, 0.42), (0, shore_px))
    for _ in range(9):
        x, y = rng.uniform(0, PICTURE_PX), rng.uniform(shore + 3, PICTURE_PX - 2)
        pen.line([(x, y), (x + rng.uniform(8, 20), y)], (220, 238, 248, 170), 0.8)


def surf(pen: Pen, rng: random.Random, edge: CliffEdge) -> None:
    """Rows of wave crests on the sea, and spray where they meet the rock."""
    for row in range(4):
        y = 98 + 8 * row
        for index in range(11):
            x = index * 13 + 6 * (row % 2)
            behind_rock = (x - edge.x) * edge.side < 0
            if not (behind_rock and y < 112):
                pen.ellipse(x, y, 7, 2.6, (244, 250, 252, 235 if row < 3 else 255))
    for _ in range(7):
        x, y = edge.x + edge.side * rng.uniform(-4, 12), rng.uniform(88, 112)
        pen.ellipse(x, y, rng.uniform(3, 6), rng.uniform(4, 8), (250, 252, 255))
    for index in range(12):
        pen.ellipse(index * 12 + rng.uniform(-4, 4), 122, 9, rng.uniform(4, 7), (240, 248, 252))


def undergrowth(pen: Pen, rng: random.Random, base: float, leaves: tuple, radius_x: float, radius_y: float) -> None:
    """Four trees at the sides, and leaves or bushes on the ground."""
    for side in (4, 22, 106, 124):
        x, y = side + rng.uniform(-5, 5), rng.uniform(112, 124)
        leafy_tree(pen, x, y, rng.uniform(46, 64), jitter(rng, rng.choice(leaves), 12))
    for _ in range(14):
        x, y = rng.uniform(0, PICTURE_PX), rng.uniform(base + 8, PICTURE_PX - 2)
        pen.ellipse(x, y, radius_x, radius_y, jitter(rng, rng.choice(leaves)))


def otherworld(pen: Pen, rng: random.Random) -> None:
    """Glowing mushrooms, one or two creatures and drifting lights."""
    for _ in range(6):
        x = rng.choice([rng.uniform(0, 36), rng.uniform(92, 128), rng.uniform(0, 128)])
        y, height = rng.uniform(108, 126), rng.uniform(14, 28)
        mushroom(pen, x, y, height, rng.choice(GLOWS))
    for _ in range(rng.choice([1, 2])):
        x, y, height = rng.uniform(14, 114), rng.uniform(112, 124), rng.uniform(12, 16)
        creature(pen, x, y, height, jitter(rng, rng.choice(FURS)))
    for _ in range(14):
        pen.ellipse(rng.uniform(0, PICTURE_PX), rng.uniform(40, PICTURE_PX), 1, 1, (230, 255, 200, 220))

"""The canal: water between two rows of narrow houses, perhaps with an arched bridge."""

import math
import random
from dataclasses import dataclass

import numpy as np

from sd_atoms.pocket.world.pen import COLOURS, STONE_COLOURS, WHITE, Colour, Pen, jitter, mix, roof_colour, shade

HOUSE_COLOURS = (*STONE_COLOURS, "red", "orange", "yellow", "brown", "brown")
GABLES = ("step", "tri", "flat")
WATER_COLOURS = ((70, 120, 150), (80, 130, 120), (60, 100, 160))
QUAY = (150, 142, 132)
GLASS = (70, 74, 92)


@dataclass(frozen=True)
class CanalHouse:
    width: float  # a share of its row
    height: float  # a share of the canal's size
    colour: Colour
    gable: str  # one of GABLES


@dataclass(frozen=True)
class CanalShape:
    left: tuple[CanalHouse, ...]  # the nearest house first
    right: tuple[CanalHouse, ...]
    water: Colour
    roof: Colour
    bridge: Colour | None


def _house_row(rng: random.Random, wall: Colour) -> tuple[CanalHouse, ...]:
    row = []
    for index in range(3):
        width = rng.uniform(0.2, 0.3)
        height = rng.uniform(0.4, 0.75)
        colour = wall if index == 0 else jitter(rng, COLOURS[rng.choice(HOUSE_COLOURS)])
        row.append(CanalHouse(width, height, colour, rng.choice(GABLES)))
    return tuple(row)


def canal_shape(rng: random.Random, wall: Colour) -> CanalShape:
    """Draws a canal whose nearest houses have the wall colour. The order of the draws is part of the world."""
    return CanalShape(
        left=_house_row(rng, wall),
        right=_house_row(rng, wall),
        water=jitter(rng, rng.choice(WATER_COLOURS)),
        roof=roof_colour(rng),
        bridge=jitter(rng, COLOURS[rng.choice(["grey", "brown", "red"])]) if rng.random() < 0.5 else None,
    )


def draw_row(
    pen: Pen,
    row: tuple[CanalHouse, ...],
    near_x: float,
    far_x: float,
    far_base: float,
    near_base: float,
    size: float,
    roof: Colour,
    darkness: float,
) -> None:
    """Draws three narrow house fronts from the outer edge (near) to the middle (far), the far ones first."""
    total = sum(house.width for house in row)
    for index in (2, 1, 0):
        house = row[index]
        start = sum(before.width for before in row[:index]) / total
        end = start + house.width / total
        x0 = near_x + (far_x - near_x) * start
        x1 = near_x + (far_x - near_x) * end
        left, right = min(x0, x1), max(x0, x1)
        base = near_base + (far_base - near_base) * (start + end) / 2
        top = base - house.height * size * (1 - 0.4 * (start + end) / 2)
        colour = house.colour if darkness == 1 else shade(house.colour, darkness)
        pen.rectangle(left, top, right, base, colour)
        draw_gable(pen, house.gable, left, right, top, colour, roof)
        draw_windows(pen, left, right, top, base, floors=3 if house.height > 0.55 else 2)


def draw_gable(pen: Pen, gable: str, left: float, right: float, top: float, colour: Colour, roof: Colour) -> None:
    width = right - left
    if gable == "tri":
        pen.polygon([(left, top), (right, top), ((left + right) / 2, top - width * 0.75)], roof)
    elif gable == "step":
        for step in range(3):
            inset = width * 0.16 * step
            pen.rectangle(left + inset, top - width * 0.22 * (step + 1), right - inset, top, colour)
    else:
        pen.rectangle(left - 0.5, top - 2, right + 0.5, top, shade(colour, 0.75))


def draw_windows(pen: Pen, left: float, right: float, top: float, base: float, floors: int) -> None:
    width, height = right - left, base - top
    for floor in range(floors):
        y0 = top + height * (0.12 + 0.28 * floor)
        y1 = top + height * (0.26 + 0.28 * floor)
        for share in (0.3, 0.7):
            x = left + width * share
            pen.rectangle(x - width * 0.1, y0, x + width * 0.1, y1, GLASS)


def draw_canal(pen: Pen, shape: CanalShape, centre: float, base: float, size: float) -> None:
    """Draws the canal from the front; (centre, base) is the middle of the water."""
    far = base - 0.12 * size
    near = base + 0.16 * size - 0.04 * size
    front = base + 0.3 * size
    half_width = 0.62 * size
    pen.polygon(
        [
            (centre - 0.1 * size, far),
            (centre + 0.1 * size, far),
            (centre + 0.46 * size, front),
            (centre - 0.46 * size, front),
        ],
        shape.water,
    )
    for side in (-1, 1):
        outer = centre + side * half_width
        pen.polygon(
            [
                (centre + side * 0.1 * size, far),
                (outer, base + 0.12 * size),
                (outer, front),
                (centre + side * 0.46 * size, front),
            ],
            QUAY,
        )
    draw_row(pen, shape.left, centre - half_width, centre - 0.1 * size, far, near, size, shape.roof, darkness=1)
    draw_row(pen, shape.right, centre + half_width, centre + 0.1 * size, far, near, size, shape.roof, darkness=0.88)
    glint = mix(shape.water, WHITE, 0.45)
    for down, reach in ((0.02, 0.08), (0.1, 0.12), (0.18, 0.2), (0.25, 0.16)):
        y = base + down * size
        pen.line([(centre - reach * size, y), (centre + reach * size * 0.4, y)], glint, 0.8)
    if shape.bridge is not None:
        arch = [
            (centre + 0.3 * size * math.cos(angle), base + 0.06 * size - 0.17 * size * math.sin(angle))
            for angle in np.linspace(math.pi, 0, 9)
        ]
        pen.line(arch, shape.bridge, 3)
        pen.line([(x, y - 3) for x, y in arch], shade(shape.bridge, 0.7), 1)

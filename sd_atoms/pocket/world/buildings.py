"""The seven plain landmarks: house, tower, bridge, windmill, lighthouse, barn and church."""

import math
import random
from dataclasses import dataclass

from sd_atoms.pocket.world.castle import TOPS, tower_top
from sd_atoms.pocket.world.pen import DARK, Colour, Pen, jitter, roof_colour, shade, window

BARN_RED = (168, 52, 44)
BARN_TRIM = (248, 244, 238)
RIVER = (80, 120, 150)
SAIL = (244, 238, 222)
METAL = (90, 70, 30)


@dataclass(frozen=True)
class BuildingShape:
    """What tells two buildings of one kind apart; each kind reads the free numbers in its own way."""

    wall: Colour
    roof: Colour
    first: float  # in [0, 1): mostly the width
    second: float  # in [0, 1): mostly the height
    variant: int  # 0, 1 or 2
    sail_angle: float  # radians


def building_shape(rng: random.Random, wall: Colour) -> BuildingShape:
    """Draws a building. The order of the draws is part of the world."""
    roof, first, second = roof_colour(rng), rng.random(), rng.random()
    rng.random()  # belongs to the order of the draws, although no building uses it
    return BuildingShape(wall, roof, first, second, variant=rng.randrange(3), sail_angle=rng.uniform(0, 1.5))


def draw_house(pen: Pen, shape: BuildingShape, centre: float, base: float, size: float) -> None:
    half, height = size * (0.36 + 0.1 * shape.first), size * (0.34 + 0.14 * shape.second)
    eaves = base - height
    ridge = half * (0.6 if shape.variant else 0)
    pen.rectangle(centre + half * 0.4, eaves - size * 0.42, centre + half * 0.6, eaves, shade(shape.wall, 0.7))
    pen.wall(centre - half, eaves, centre + half, base, shape.wall)
    pen.polygon(
        [
            (centre - half * 1.15, eaves),
            (centre + half * 1.15, eaves),
            (centre + ridge, eaves - size * 0.36),
            (centre - ridge, eaves - size * 0.36),
        ],
        shape.roof,
    )
    pen.rectangle(centre - size * 0.07, base - height * 0.62, centre + size * 0.07, base, shade(shape.roof, 0.6))
    for side in (-0.6, 0.6):
        x = centre + side * half
        pen.rectangle(x - size * 0.09, base - height * 0.8, x + size * 0.09, base - height * 0.4, (250, 240, 210))
        pen.rectangle(x - size * 0.07, base - height * 0.76, x + size * 0.07, base - height * 0.44, (90, 110, 140))


def draw_tower(pen: Pen, shape: BuildingShape, centre: float, base: float, size: float) -> None:
    width, height = size * (0.2 + 0.1 * shape.first), size * (0.85 + 0.25 * shape.second)
    top = base - height
    kind = TOPS[shape.variant]
    tower_top(pen, kind, centre, top, width * 1.2, size * 0.3, shape.wall, shape.roof)
    pen.wall(centre - width / 2, top, centre + width / 2, base, shape.wall)
    pen.wall(centre - width * 0.62, top, centre + width * 0.62, top + size * 0.14, shape.wall)
    for index in range(4):
        window(pen, centre, base - height * (0.85 - 0.2 * index), width * 0.22, width * 0.3)


def draw_bridge(pen: Pen, shape: BuildingShape, centre: float, base: float, size: float) -> None:
    half, height, arches = size * 0.8, size * (0.3 + 0.1 * shape.first), 2 + shape.variant
    deck = base - height
    foot = base + size * 0.12
    pen.wall(centre - half, deck, centre + half, foot, shape.wall)
    span = 2 * half / arches
    for index in range(arches):
        x = centre - half + span * (index + 0.5)
        radius = span * 0.36
        pen.rectangle(x - radius, base - height * 0.3, x + radius, foot, RIVER)
        pen.ellipse(x, base - height * 0.3, radius, height * 0.42, RIVER)
    pen.rectangle(centre - half, deck - 2.5, centre + half, deck, shade(shape.wall, 0.72))
    if shape.second > 0.5:
        for side in (-0.6, 0.6):
            x = centre + side * half
            pen.wall(x - size * 0.07, deck - size * 0.32, x + size * 0.07, deck, shape.wall)
            pen.roof(x, deck - size * 0.32, size * 0.2, size * 0.16, shape.roof)


def draw_windmill(pen: Pen, shape: BuildingShape, centre: float, base: float, size: float) -> None:
    width, height = size * 0.36, size * (0.62 + 0.14 * shape.first)
    top = base - height
    right, top_right = (centre + width * 0.62, base), (centre + width * 0.36, top)
    pen.polygon([(centre - width * 0.62, base), right, top_right, (centre - width * 0.36, top)], shape.wall)
    shadow = shade(shape.wall, 0.8)
    pen.polygon([(centre + width * 0.15, base), right, top_right, (centre + width * 0.1, top)], shadow)
    pen.ellipse(centre, top, width * 0.44, width * 0.4, shape.roof)
    pen.rectangle(centre - width * 0.16, base - height * 0.3, centre + width * 0.16, base, DARK)
    for index in range(4):
        angle = shape.sail_angle + index * math.pi / 2
        along_x, along_y = math.cos(angle), math.sin(angle)
        across_x, across_y = -along_y * size * 0.1, along_x * size * 0.1
        x0, y0 = centre + along_x * size * 0.1, top + along_y * size * 0.1
        x1, y1 = centre + along_x * size * 0.54, top + along_y * size * 0.54
        pen.polygon([(x0, y0), (x1, y1), (x1 + across_x, y1 + across_y), (x0 + across_x, y0 + across_y)], SAIL)
        pen.line([(centre, top), (x1, y1)], (90, 64, 44), 1.4)


def draw_lighthouse(pen: Pen, shape: BuildingShape, centre: float, base: float, size: float) -> None:
    height, width = size * (0.9 + 0.15 * shape.first), size * 0.26
    top = base - height
    for index in range(6):
        low, high = index / 6, (index + 1) / 6
        half_low, half_high = width * (1 - 0.42 * low) / 2, width * (1 - 0.42 * high) / 2
        y0, y1 = base - height * low, base - height * high
        colour = shape.roof if index % 2 else (246, 242, 236)
        right, top_right = (centre + half_low, y0), (centre + half_high, y1)
        pen.polygon([(centre - half_low, y0), right, top_right, (centre - half_high, y1)], colour)
        shadow = shade(colour, 0.8)
        pen.polygon([(centre + half_low * 0.25, y0), right, top_right, (centre + half_high * 0.25, y1)], shadow)
    pen.rectangle(centre - width * 0.42, top - 2, centre + width * 0.42, top, DARK)
    pen.rectangle(centre - width * 0.22, top - size * 0.13, centre + width * 0.22, top - 2, (255, 236, 130))
    pen.roof(centre, top - size * 0.13, width * 0.66, size * 0.12, shape.roof)
    hut = base - size * 0.2
    pen.wall(centre + width * 0.4, hut, centre + width * 1.5, base, (240, 236, 228))
    ridge = (centre + width * 0.95, base - size * 0.36)
    pen.polygon([(centre + width * 0.3, hut), (centre + width * 1.6, hut), ridge], shape.roof)


def draw_barn(pen: Pen, shape: BuildingShape, centre: float, base: float, size: float) -> None:
    half, height = size * (0.42 + 0.08 * shape.first), size * 0.36
    red = jitter(random.Random(int(shape.second * 999)), BARN_RED, 16)
    eaves = base - height
    pen.wall(centre - half, eaves, centre + half, base, red)
    for outer, inner, shoulder, ridge, colour in (
        (1.08, 0.7, 0.24, 0.38, shade(shape.roof, 0.7)),
        (0.9, 0.6, 0.2, 0.32, red),
    ):
        pen.polygon(
            [
                (centre - half * outer, eaves),
                (centre - half * inner, eaves - size * shoulder),
                (centre, eaves - size * ridge),
                (centre + half * inner, eaves - size * shoulder),
                (centre + half * outer, eaves),
            ],
            colour,
        )
    pen.rectangle(centre - size * 0.16, base - size * 0.28, centre + size * 0.16, base, BARN_TRIM)
    left, right, door_top = centre - size * 0.13, centre + size * 0.13, base - size * 0.25
    pen.rectangle(left, door_top, right, base, shade(red, 0.75))
    pen.line([(left, base), (right, door_top)], BARN_TRIM, 1.4)
    pen.line([(right, base), (left, door_top)], BARN_TRIM, 1.4)
    window(pen, centre, eaves - size * 0.08, size * 0.1, size * 0.1, BARN_TRIM)


def draw_church(pen: Pen, shape: BuildingShape, centre: float, base: float, size: float) -> None:
    side = 1 if shape.variant else -1
    half, height = size * 0.36, size * (0.32 + 0.1 * shape.first)
    eaves = base - height
    pen.wall(centre - half, eaves, centre + half, base, shape.wall)
    ridge = eaves - size * 0.26
    corners = [(centre - half * 1.1, eaves), (centre + half * 1.1, eaves)]
    pen.polygon([*corners, (centre + half * 0.8, ridge), (centre - half * 0.8, ridge)], shape.roof)
    x, width, tower_height = centre - side * half * 0.8, size * 0.25, size * 0.72
    pen.wall(x - width / 2, base - tower_height, x + width / 2, base, shade(shape.wall, 1.04))
    pen.roof(x, base - tower_height, width * 1.15, size * 0.42, shape.roof)
    tip = base - tower_height - size * 0.42
    pen.line([(x, tip + 1), (x, tip - 7)], METAL, 1.2)
    pen.line([(x - 2.5, tip - 4.5), (x + 2.5, tip - 4.5)], METAL, 1.2)
    window(pen, x, base - tower_height * 0.75, width * 0.3, width * 0.4)
    pen.rectangle(x - width * 0.22, base - tower_height * 0.24, x + width * 0.22, base, DARK)
    for share in (0.05, 0.5, 0.95):
        window_x = centre + side * half * (share * 0.85)
        window(pen, window_x, base - height * 0.5, size * 0.08, size * 0.12, (96, 130, 190))

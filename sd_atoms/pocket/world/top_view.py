"""The special "top": a landmark's plan on the floor of its setting, seen from straight above."""

import math
import random

from sd_atoms.pocket.world.canal import CanalShape
from sd_atoms.pocket.world.landmarks import Shape
from sd_atoms.pocket.world.pen import PICTURE_PX, Colour, Pen, jitter, mix, shade
from sd_atoms.pocket.world.surroundings import GRASS, GROUNDS

SHADOW = (40, 40, 40, 90)
TREE_RINGED = ("forest", "autumn", "mountains", "plain", "sheepfield")
CENTRE_Y = 64


def draw_from_above(
    pen: Pen, rng: random.Random, name: str, shape: Shape, setting: str, centre: float, size: float
) -> None:
    """Draws the floor of a setting and the plan of the landmark `name` on it."""
    draw_floor(pen, rng, setting, centre, size)
    if name == "castle":
        castle_plan(pen, shape, centre, size)
    elif name == "canal":
        canal_plan(pen, shape, centre, size)
    elif name == "bridge":
        draw_water(pen, centre, size * 0.2, (70, 120, 160))
        for half_width, colour in ((0.1, shape.wall), (0.06, shade(shape.wall, 0.8))):
            deck = size * half_width
            pen.rectangle(centre - size * 0.8, CENTRE_Y - deck, centre + size * 0.8, CENTRE_Y + deck, colour)
    elif name in ("tower", "lighthouse"):
        disc(pen, centre, CENTRE_Y, size * 0.3, shape.wall)
        disc(pen, centre, CENTRE_Y, size * 0.18, shape.roof)
    elif name == "windmill":
        windmill_plan(pen, shape.roof, shape.sail_angle, centre, size)
    else:
        colour = (168, 52, 44) if name == "barn" else shape.roof
        roof_plan(pen, colour, centre, size, has_steeple=name == "church")


def draw_floor(pen: Pen, rng: random.Random, setting: str, centre: float, size: float) -> None:
    floor = jitter(rng, GROUNDS[setting].floor)
    pen.rectangle(0, 0, PICTURE_PX, PICTURE_PX, floor)
    for _ in range(26):
        x, y = rng.uniform(0, PICTURE_PX), rng.uniform(0, PICTURE_PX)
        pen.ellipse(x, y, rng.uniform(4, 12), rng.uniform(3, 8), jitter(rng, floor, 12))
    if setting == "lake":
        pen.ellipse(centre, CENTRE_Y, size * 0.86, size * 0.8, jitter(rng, GRASS))
    if setting in TREE_RINGED:
        for _ in range(16):
            angle = rng.uniform(0, 6.3)
            x = 64 + 62 * math.cos(angle) * rng.uniform(0.9, 1.2)
            y = 64 + 62 * math.sin(angle) * rng.uniform(0.9, 1.2)
            radius = rng.uniform(5, 9)
            leaves = jitter(rng, (226, 120, 40) if setting == "autumn" else (48, 116, 56))
            pen.ellipse(x, y, radius, radius, shade(leaves, 0.8))
            pen.ellipse(x - 1.5, y - 1.5, radius * 0.6, radius * 0.6, leaves)


def pyramid(pen: Pen, x0: float, y0: float, x1: float, y1: float, colour: Colour) -> None:
    """A four-sided roof from above, lit from the upper left."""
    tip = ((x0 + x1) / 2, (y0 + y1) / 2)
    corners = [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]
    for index, light in enumerate((1.1, 0.8, 0.66, 0.95)):
        pen.polygon([corners[index], corners[(index + 1) % 4], tip], shade(colour, light))


def disc(pen: Pen, x: float, y: float, radius: float, colour: Colour) -> None:
    """A round tower from above."""
    pen.ellipse(x + radius * 0.25, y + radius * 0.3, radius, radius, SHADOW)
    pen.ellipse(x, y, radius, radius, shade(colour, 0.8))
    pen.ellipse(x - radius * 0.12, y - radius * 0.12, radius * 0.72, radius * 0.72, colour)
    pen.ellipse(x - radius * 0.05, y - radius * 0.05, radius * 0.14, radius * 0.14, shade(colour, 1.4))


def square(pen: Pen, x: float, y: float, half: float, colour: Colour) -> None:
    pen.rectangle(x - half, y - half, x + half, y + half, colour)


def castle_plan(pen: Pen, shape: Shape, centre: float, size: float) -> None:
    outer = size * 0.44
    inner = outer - size * 0.1
    pen.rectangle(centre - outer + 4, CENTRE_Y - outer + 5, centre + outer + 4, CENTRE_Y + outer + 5, SHADOW)
    square(pen, centre, CENTRE_Y, outer, shape.wall)
    square(pen, centre, CENTRE_Y, inner, mix(shape.wall, (150, 180, 110), 0.6))
    half = inner * 0.5
    pyramid(pen, centre - half, CENTRE_Y - half, centre + half, CENTRE_Y + half, shape.roof)
    path = (140, 120, 90)
    path_end = CENTRE_Y + outer + size * 0.2
    pen.rectangle(centre - size * 0.06, CENTRE_Y + inner, centre + size * 0.06, path_end, path)
    for right in (-1, 1):
        for down in (-1, 1):
            disc(pen, centre + right * outer, CENTRE_Y + down * outer, size * 0.15, shape.roof)


def draw_water(pen: Pen, centre: float, half_width: float, colour: Colour) -> None:
    pen.rectangle(centre - half_width, 0, centre + half_width, PICTURE_PX, colour)
    for y in range(4, PICTURE_PX, 12):
        pen.line([(centre - half_width * 0.5, y), (centre + half_width * 0.2, y + 2)], (170, 200, 215), 0.8)


def canal_plan(pen: Pen, shape: CanalShape, centre: float, size: float) -> None:
    half_width = size * 0.2
    draw_water(pen, centre, half_width, shape.water)
    for side, row in ((-1, shape.left), (1, shape.right)):
        for index in range(6):
            colour = shade(row[index % 3].colour, 0.95)
            x, y = centre + side * (half_width + 5), 2 + index * 21
            pen.rectangle(x, y, x + side * size * 0.3, y + 18, colour)
            pen.rectangle(x, y + 9, x + side * size * 0.3, y + 18, shade(colour, 0.72))
    if shape.bridge is not None:
        left, right = centre - half_width - 4, centre + half_width + 4
        pen.rectangle(left, CENTRE_Y - 5, right, CENTRE_Y + 5, shape.bridge)


def windmill_plan(pen: Pen, roof: Colour, sail_angle: float, centre: float, size: float) -> None:
    disc(pen, centre, CENTRE_Y, size * 0.26, roof)
    for index in range(4):
        angle = sail_angle + index * math.pi / 2
        along_x, along_y = math.cos(angle), math.sin(angle)
        tip_x, tip_y = centre + along_x * size * 0.6, CENTRE_Y + along_y * size * 0.6
        pen.polygon(
            [
                (centre, CENTRE_Y),
                (tip_x, tip_y),
                (tip_x - along_y * 6, tip_y + along_x * 6),
                (centre - along_y * 6, CENTRE_Y + along_x * 6),
            ],
            (244, 238, 222),
        )


def roof_plan(pen: Pen, colour: Colour, centre: float, size: float, has_steeple: bool) -> None:
    half, depth = size * 0.5, size * 0.34
    left, right = centre - half, centre + half
    pen.rectangle(left + 4, CENTRE_Y - depth + 5, right + 4, CENTRE_Y + depth + 5, SHADOW)
    pen.rectangle(left, CENTRE_Y - depth, right, CENTRE_Y, shade(colour, 1.1))
    pen.rectangle(left, CENTRE_Y, right, CENTRE_Y + depth, shade(colour, 0.72))
    if has_steeple:
        radius = size * 0.14
        steeple = shade(colour, 0.8)
        pyramid(pen, left - size * 0.12, CENTRE_Y - radius, left + size * 0.16, CENTRE_Y + radius, steeple)
    else:
        chimney_bottom = CENTRE_Y - depth * 0.2
        pen.rectangle(centre + half * 0.4, CENTRE_Y - depth * 0.5, centre + half * 0.55, chimney_bottom, (90, 70, 66))

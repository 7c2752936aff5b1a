"""Small things drawn around a landmark; (x, y) is where each meets the ground and `size` is about its height."""

import math

from sd_atoms.pocket.world.pen import DARK, WHITE, Colour, Pen, mix, shade

TRUNK = (96, 66, 44)
SNOWY_WHITE = (248, 248, 244)
WOOL = (248, 246, 240)
HOOF = (50, 44, 44)
BEAK = (240, 150, 40)
SKIN = (244, 206, 170)
PEACOCK_BLUE = (30, 84, 206)
CLOUD = (255, 255, 255, 225)


def pine(pen: Pen, x: float, y: float, size: float, colour: Colour) -> None:
    pen.rectangle(x - size * 0.04, y - size * 0.2, x + size * 0.04, y, (92, 64, 44))
    for tier in range(3):
        width, base = size * (0.5 - 0.12 * tier), y - size * (0.15 + 0.25 * tier)
        pen.roof(x, base, width, size * 0.42, shade(colour, 0.85 + 0.12 * tier))


def leafy_tree(pen: Pen, x: float, y: float, size: float, colour: Colour) -> None:
    pen.rectangle(x - size * 0.05, y - size * 0.5, x + size * 0.05, y, TRUNK)
    for right, up, radius in ((-0.2, 0.55, 0.22), (0.2, 0.57, 0.21), (0, 0.75, 0.26), (0, 0.52, 0.2)):
        leaves = shade(colour, 0.8 if right > 0 else 1)
        pen.ellipse(x + right * size, y - up * size, radius * size, radius * size * 0.95, leaves)
    pen.ellipse(x - 0.09 * size, y - 0.8 * size, 0.11 * size, 0.1 * size, shade(colour, 1.18))


def sheep(pen: Pen, x: float, y: float, size: float) -> None:
    for leg in (-0.35, -0.15, 0.2, 0.4):
        pen.rectangle(x + leg * size - 0.05 * size, y - size * 0.4, x + leg * size + 0.05 * size, y, HOOF)
    pen.ellipse(x, y - size * 0.6, size * 0.62, size * 0.38, WOOL)
    pen.ellipse(x + 0.12 * size, y - size * 0.45, size * 0.4, size * 0.22, (222, 218, 212))
    pen.ellipse(x - size * 0.68, y - size * 0.7, size * 0.2, size * 0.24, HOOF)


def goose(pen: Pen, x: float, y: float, size: float) -> None:
    pen.ellipse(x, y - size * 0.2, size * 0.55, size * 0.26, SNOWY_WHITE)
    neck = [(x + size * 0.42, y - size * 0.25), (x + size * 0.5, y - size * 0.8)]
    pen.line(neck, (240, 240, 238), size * 0.16)
    pen.ellipse(x + size * 0.55, y - size * 0.84, size * 0.15, size * 0.13, SNOWY_WHITE)
    pen.polygon(
        [
            (x + size * 0.66, y - size * 0.9),
            (x + size * 0.95, y - size * 0.8),
            (x + size * 0.66, y - size * 0.76),
        ],
        BEAK,
    )
    pen.polygon(
        [(x - size * 0.4, y - size * 0.35), (x - size * 0.75, y - size * 0.4), (x - size * 0.45, y - size * 0.1)],
        (214, 216, 216),
    )


def boat(pen: Pen, x: float, y: float, size: float) -> None:
    side = y - size * 0.22
    hull = [(x - size * 0.6, side), (x + size * 0.6, side), (x + size * 0.4, y), (x - size * 0.4, y)]
    pen.polygon(hull, (140, 70, 44))
    pen.line([(x, y - size * 0.2), (x, y - size)], (80, 56, 40), 1.2)
    boom = y - size * 0.3
    pen.polygon([(x + 1, y - size), (x + 1, boom), (x + size * 0.5, boom)], (250, 246, 236))
    pen.polygon([(x - 1, y - size * 0.9), (x - 1, boom), (x - size * 0.36, boom)], (226, 90, 70))


def peacock(pen: Pen, x: float, y: float, size: float) -> None:
    root = y - size * 0.3  # where the feathers of the fan meet
    for reach, count, colour in ((1, 11, (30, 120, 84)), (0.76, 9, (60, 160, 96)), (0.5, 7, (120, 186, 90))):
        for index in range(count):
            angle = math.pi * (0.04 + 0.92 * index / (count - 1))
            tip_x = x + math.cos(angle) * size * 0.62 * reach
            tip_y = root - math.sin(angle) * size * 0.66 * reach
            pen.line([(x, root), (tip_x, tip_y)], colour, size * 0.09)
            pen.ellipse(tip_x, tip_y, size * 0.085, size * 0.085, colour)
            if reach > 0.7:
                pen.ellipse(tip_x, tip_y, size * 0.05, size * 0.05, (236, 196, 60))
                pen.ellipse(tip_x, tip_y, size * 0.027, size * 0.027, (24, 50, 170))
    pen.ellipse(x, y - size * 0.22, size * 0.14, size * 0.2, (26, 70, 190))
    pen.line([(x, y - size * 0.3), (x, y - size * 0.58)], PEACOCK_BLUE, size * 0.11)
    pen.ellipse(x, y - size * 0.6, size * 0.075, size * 0.075, PEACOCK_BLUE)
    pen.polygon(
        [
            (x - 0.02 * size, y - 0.58 * size),
            (x - 0.14 * size, y - 0.56 * size),
            (x - 0.02 * size, y - 0.54 * size),
        ],
        (240, 190, 60),
    )
    for leg in (-0.05, 0.06):
        pen.line([(x + leg * size, y - size * 0.06), (x + leg * size, y)], (150, 110, 50), 1)


def elf(pen: Pen, x: float, y: float, size: float, colour: Colour) -> None:
    spear = x + size * 0.26
    pen.line([(spear, y), (spear, y - size * 1.1)], (120, 84, 50), 1)
    blade = y - size * 1.08
    pen.polygon([(x + size * 0.2, blade), (x + size * 0.32, blade), (spear, y - size * 1.25)], (220, 224, 230))
    pen.polygon([(x - size * 0.22, y), (x + size * 0.22, y), (x, y - size * 0.72)], colour)
    pen.ellipse(x, y - size * 0.74, size * 0.14, size * 0.15, SKIN)
    for side in (-1, 1):
        inner = x + side * size * 0.1
        ear = [(inner, y - size * 0.78), (x + side * size * 0.32, y - size * 0.88), (inner, y - size * 0.68)]
        pen.polygon(ear, SKIN)
    brim = y - size * 0.8
    hat = [(x - size * 0.15, brim), (x + size * 0.15, brim), (x + size * 0.04, y - size * 1.2)]
    pen.polygon(hat, shade(colour, 0.7))


def balloon(pen: Pen, x: float, y: float, size: float, colour: Colour) -> None:
    pen.ellipse(x, y - size * 0.65, size * 0.36, size * 0.38, colour)
    pen.ellipse(x, y - size * 0.65, size * 0.15, size * 0.38, (250, 240, 210))
    for side in (-1, 1):
        rope = [(x + side * size * 0.2, y - size * 0.38), (x + side * size * 0.06, y - size * 0.1)]
        pen.line(rope, DARK, 0.6)
    pen.rectangle(x - size * 0.08, y - size * 0.12, x + size * 0.08, y, (130, 86, 50))


def mushroom(pen: Pen, x: float, y: float, size: float, colour: Colour) -> None:
    for glow in (1.25, 1.0, 0.75):
        pen.ellipse(x, y - size * 0.72, size * 0.62 * glow, size * 0.5 * glow, (*colour, 46))
    pen.rectangle(x - size * 0.1, y - size * 0.6, x + size * 0.1, y, (236, 226, 240))
    cap = mix(colour, WHITE, 0.25)
    pen.half_ellipse(x - size * 0.46, y - size * 1.05, x + size * 0.46, y - size * 0.15, cap)
    for right, up in ((-0.24, 0.72), (0.05, 0.88), (0.26, 0.7)):
        pen.ellipse(x + right * size, y - up * size, size * 0.07, size * 0.055, (255, 255, 230))


def creature(pen: Pen, x: float, y: float, size: float, colour: Colour) -> None:
    pen.ellipse(x, y - size * 0.4, size * 0.36, size * 0.42, colour)
    for side in (-1, 1):
        ear = [
            (x + side * size * 0.3, y - size * 0.6),
            (x + side * size * 0.34, y - size * 1.05),
            (x + side * size * 0.06, y - size * 0.74),
        ]
        pen.polygon(ear, colour)
    for side in (-0.14, 0.14):
        pen.ellipse(x + side * size, y - size * 0.48, size * 0.1, size * 0.12, (255, 255, 160))
        pen.ellipse(x + side * size, y - size * 0.47, size * 0.045, size * 0.06, (20, 20, 30))


def gear(pen: Pen, x: float, y: float, radius: float, colour: Colour) -> None:
    """A gear wheel around (x, y)."""
    for index in range(8):
        angle = index * math.pi / 4
        tip = (x + math.cos(angle) * radius * 1.3, y + math.sin(angle) * radius * 1.3)
        pen.line([(x, y), tip], colour, radius * 0.34)
    pen.ellipse(x, y, radius, radius, colour)
    pen.ellipse(x, y, radius * 0.62, radius * 0.62, shade(colour, 0.62))
    pen.ellipse(x, y, radius * 0.26, radius * 0.26, mix(colour, (255, 240, 190), 0.5))


def cloud(pen: Pen, x: float, y: float, size: float) -> None:
    """A cloud around (x, y)."""
    for right, down, radius in ((-1, 0, 0.5), (0, -0.25, 0.7), (0.9, 0.02, 0.5), (0.1, 0.15, 0.6)):
        pen.ellipse(x + right * size, y + down * size, radius * size * 1.15, radius * size * 0.7, CLOUD)

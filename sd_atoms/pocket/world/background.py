"""What lies behind the landmark, one function for each setting: (pen, rng, horizon, base) -> None.

`base` is the height at which the landmark meets the ground, the horizon lies a little above it.
The order of the random draws inside each function is part of the world.
"""

import math
import random

from sd_atoms.pocket.world.figures import cloud, leafy_tree, pine
from sd_atoms.pocket.world.pen import PICTURE_PX, Pen, jitter, mix, shade
from sd_atoms.pocket.world.surroundings import (
    CLEAR,
    DUSK,
    GRASS,
    HAZY,
    OVERCAST,
    SUNSET,
    draw_ground,
    draw_sky,
)

SPRING_LEAVES = ((40, 120, 52), (66, 150, 60), (30, 96, 56))
AUTUMN_LEAVES = ((224, 106, 36), (236, 170, 44), (190, 60, 40))
FACADES = ((128, 132, 146), (156, 140, 130), (104, 116, 136))
CACTUS = (62, 130, 74)
MOONLIGHT = (252, 246, 214)


def draw_background(pen: Pen, rng: random.Random, setting: str, base: float) -> None:
    """Draws everything behind the landmark."""
    BACKGROUNDS[setting](pen, rng, base - 8, base)


def mountains(pen: Pen, rng: random.Random, horizon: float, base: float) -> None:
    draw_sky(pen, rng, horizon, (CLEAR, HAZY, OVERCAST, SUNSET, DUSK))
    count = rng.choice([3, 4])
    for index in range(count):
        x = PICTURE_PX * (index + 0.5) / count + rng.uniform(-10, 10)
        half, height = rng.uniform(34, 46), rng.uniform(52, 76)
        rock = jitter(rng, (104, 116, 144), 10)
        summit = horizon - height
        pen.polygon([(x - half, horizon), (x + half, horizon), (x, summit)], rock)
        pen.polygon([(x + half * 0.1, horizon), (x + half, horizon), (x, summit)], shade(rock, 0.8))
        snow_line = horizon - height * (1 - 0.42)
        pen.polygon(
            [
                (x, summit),
                (x - half * 0.42, snow_line),
                (x - half * 0.2, horizon - height * 0.68),
                (x - half * 0.04, horizon - height * 0.54),
                (x + half * 0.16, horizon - height * 0.7),
                (x + half * 0.42, snow_line),
            ],
            (250, 252, 255),
        )
    draw_ground(pen, horizon, jitter(rng, GRASS, 10))


def forest(pen: Pen, rng: random.Random, horizon: float, base: float) -> None:
    draw_sky(pen, rng, horizon, (CLEAR, HAZY, OVERCAST))
    for y in (horizon + 2, horizon + 8):
        for index in range(9):
            draw_tree = pine if rng.random() < 0.4 else leafy_tree
            x, height = PICTURE_PX * index / 8 + rng.uniform(-5, 5), rng.uniform(34, 56)
            draw_tree(pen, x, y, height, jitter(rng, rng.choice(SPRING_LEAVES), 12))
    draw_ground(pen, horizon + 4, jitter(rng, (84, 150, 60), 8))


def autumn(pen: Pen, rng: random.Random, horizon: float, base: float) -> None:
    draw_sky(pen, rng, horizon, (CLEAR, HAZY, SUNSET))
    for y in (horizon + 2, horizon + 8):
        for index in range(9):
            x, height = PICTURE_PX * index / 8 + rng.uniform(-5, 5), rng.uniform(34, 56)
            leafy_tree(pen, x, y, height, jitter(rng, rng.choice(AUTUMN_LEAVES), 12))
    draw_ground(pen, horizon + 4, jitter(rng, (190, 140, 64), 8))


def lake(pen: Pen, rng: random.Random, horizon: float, base: float) -> None:
    draw_sky(pen, rng, horizon, (CLEAR, CLEAR, HAZY, SUNSET, DUSK))
    for index in range(5):
        x = index * 32 + rng.uniform(-8, 8)
        pen.ellipse(x, horizon + 4, 24, rng.uniform(8, 18), jitter(rng, (86, 130, 110), 10))
    pen.rectangle(0, horizon, PICTURE_PX, base + 4, jitter(rng, (110, 156, 84), 8))


def cliff(pen: Pen, rng: random.Random, horizon: float, base: float) -> None:
    draw_sky(pen, rng, 90, (CLEAR, HAZY, OVERCAST, SUNSET, DUSK))
    pen.gradient(86, PICTURE_PX, (52, 112, 156), (28, 74, 118))


def sheepfield(pen: Pen, rng: random.Random, horizon: float, base: float) -> None:
    draw_sky(pen, rng, horizon, (CLEAR, CLEAR, HAZY, OVERCAST))
    for _ in range(3):
        x, height = rng.uniform(0, PICTURE_PX), rng.uniform(10, 20)
        pen.ellipse(x, horizon + 6, 60, height, jitter(rng, (130, 178, 88), 10))
    draw_ground(pen, horizon + 2, jitter(rng, (124, 182, 76), 8))


def desert(pen: Pen, rng: random.Random, horizon: float, base: float) -> None:
    draw_sky(pen, rng, horizon, (CLEAR, HAZY, SUNSET))
    for _ in range(3):
        x, height = rng.uniform(0, PICTURE_PX), rng.uniform(12, 24)
        pen.ellipse(x, horizon + 8, 54, height, jitter(rng, (226, 182, 112), 8))
    draw_ground(pen, horizon + 4, jitter(rng, (236, 198, 128), 8))
    for _ in range(2):
        x = rng.choice([rng.uniform(4, 24), rng.uniform(104, 124)])
        y = rng.uniform(horizon + 10, horizon + 24)
        for left, top, right, bottom in (
            (-2, -20, 2, 0),
            (-7, -14, -4.5, -7),
            (-7, -9, 0, -7),
            (4.5, -17, 7, -9),
            (0, -11, 7, -9),
        ):
            pen.rectangle(x + left, y + top, x + right, y + bottom, CACTUS)


def beach(pen: Pen, rng: random.Random, horizon: float, base: float) -> None:
    draw_sky(pen, rng, horizon - 10, (CLEAR, CLEAR, HAZY, SUNSET))
    pen.gradient(horizon - 10, horizon + 8, (40, 130, 180), (90, 190, 206))
    pen.rectangle(0, horizon + 6, PICTURE_PX, horizon + 9, (246, 250, 250))
    draw_ground(pen, horizon + 9, jitter(rng, (242, 218, 164), 6))
    x = rng.choice([14, 112]) + rng.uniform(-6, 6)
    pen.line([(x, 122), (x + 3, 96), (x + 2, 66)], (130, 90, 54), 2.6)
    for angle in (0.1, 0.8, 1.5, 2.3, 3.1, 3.9):
        right, up = math.cos(angle), math.sin(angle)
        leaf = [(x + 2, 66), (x + 2 + 17 * right, 66 - 12 * up + 4), (x + 2 + 11 * right, 62 - 12 * up)]
        pen.polygon(leaf, (50, 140, 70))


def city(pen: Pen, rng: random.Random, horizon: float, base: float) -> None:
    draw_sky(pen, rng, horizon, (CLEAR, HAZY, OVERCAST))
    x = -4
    while x < PICTURE_PX:
        width, height = rng.uniform(14, 24), rng.uniform(30, 74)
        facade = jitter(rng, rng.choice(FACADES), 12)
        pen.rectangle(x, horizon - height, x + width, horizon + 4, facade)
        for y in range(int(horizon - height) + 4, int(horizon), 8):
            for share in (0.2, 0.5, 0.8):
                glass = (226, 222, 180) if rng.random() < 0.5 else shade(facade, 0.6)
                pen.rectangle(x + width * share - 1.4, y, x + width * share + 1.4, y + 3.4, glass)
        x += width + 1
    pen.rectangle(0, horizon + 2, PICTURE_PX, PICTURE_PX, (170, 168, 164))
    pen.rectangle(0, base + 6, PICTURE_PX, PICTURE_PX, (84, 86, 92))
    for index in range(5):
        pen.rectangle(index * 30 - 6, base + 16, index * 30 + 8, base + 18.5, (240, 236, 220))


def night(pen: Pen, rng: random.Random, horizon: float, base: float) -> None:
    pen.gradient(0, horizon + 2, (10, 14, 48), (52, 54, 110))
    for _ in range(36):
        pen.ellipse(rng.uniform(0, PICTURE_PX), rng.uniform(0, horizon - 6), 0.8, 0.8, (255, 255, 230))
    x = rng.choice([rng.uniform(12, 32), rng.uniform(96, 116)])
    y = rng.uniform(14, 26)
    pen.ellipse(x, y, 12, 12, (255, 250, 210, 40))
    pen.ellipse(x, y, 8, 8, MOONLIGHT)
    draw_ground(pen, horizon, (34, 52, 54))


def otherworld(pen: Pen, rng: random.Random, horizon: float, base: float) -> None:
    pen.gradient(0, horizon, jitter(rng, (52, 24, 96), 10), jitter(rng, (190, 90, 180), 16))
    pen.ellipse(rng.uniform(16, 50), rng.uniform(16, 30), 9, 9, (160, 240, 230))
    pen.ellipse(rng.uniform(84, 112), rng.uniform(12, 40), 5, 5, (250, 190, 140))
    for index in range(4):
        x = index * 36 + rng.uniform(-10, 10)
        width, height = rng.uniform(20, 34), rng.uniform(26, 50)
        pen.roof(x, horizon + 4, width, height, jitter(rng, (92, 48, 130), 10))
    draw_ground(pen, horizon, jitter(rng, (48, 84, 110), 10))


def island(pen: Pen, rng: random.Random, horizon: float, base: float) -> None:
    draw_sky(pen, rng, PICTURE_PX, (CLEAR, CLEAR, HAZY, SUNSET, DUSK))
    for _ in range(4):
        cloud(pen, rng.uniform(0, PICTURE_PX), rng.uniform(80, 122), rng.uniform(6, 11))


def snow(pen: Pen, rng: random.Random, horizon: float, base: float) -> None:
    pen.gradient(0, horizon, (168, 186, 206), (226, 232, 240))
    draw_ground(pen, horizon, (240, 244, 250))
    for index in range(7):
        x, height = PICTURE_PX * index / 6 + rng.uniform(-6, 6), rng.uniform(18, 32)
        needles = mix((70, 110, 100), (240, 246, 250), rng.uniform(0.2, 0.6))
        pine(pen, x, horizon + 5, height, needles)


def plain(pen: Pen, rng: random.Random, horizon: float, base: float) -> None:
    draw_sky(pen, rng, horizon)
    draw_ground(pen, horizon, jitter(rng, GRASS, 16))


BACKGROUNDS = {draw.__name__: draw for draw in (
    mountains, forest, lake, autumn, cliff, sheepfield, desert, beach, city, night, otherworld, island, plain, snow,
)}  # fmt: skip

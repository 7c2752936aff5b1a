"""The settings a landmark can stand in: their names, heights and floor colours, and what most skies share."""

import random
from collections.abc import Sequence

from sd_atoms.pocket.world.figures import cloud
from sd_atoms.pocket.world.pen import PICTURE_PX, Colour, Pen, jitter, shade

GRASS = (112, 158, 76)

# Where the landmark meets the ground. The order is part of the world: scenes are sampled in it.
GROUND_LINE_PX: dict[str, int] = {
    "mountains": 94,
    "forest": 98,
    "lake": 74,
    "autumn": 98,
    "cliff": 66,
    "sheepfield": 82,
    "desert": 96,
    "beach": 88,
    "city": 98,
    "night": 96,
    "otherworld": 90,
    "island": 72,
    "plain": 96,
    "snow": 96,
}

FLOOR_COLOURS: dict[str, Colour] = {
    "mountains": GRASS,
    "forest": (56, 120, 56),
    "lake": (70, 132, 176),
    "autumn": (206, 140, 56),
    "cliff": (128, 104, 84),
    "sheepfield": (124, 182, 76),
    "desert": (236, 198, 128),
    "beach": (242, 218, 164),
    "city": (120, 122, 126),
    "night": (34, 52, 54),
    "otherworld": (70, 60, 120),
    "island": (104, 168, 74),
    "plain": GRASS,
    "snow": (240, 244, 250),
}

CLEAR, HAZY, OVERCAST, SUNSET, DUSK = range(5)
SKIES: tuple[tuple[Colour, Colour], ...] = (  # top and bottom colour
    ((96, 160, 226), (206, 228, 244)),
    ((120, 176, 232), (236, 238, 232)),
    ((150, 170, 196), (222, 222, 222)),
    ((240, 150, 96), (252, 220, 160)),
    ((120, 130, 200), (248, 190, 170)),
)
ANY_SKY = (CLEAR, CLEAR, CLEAR, HAZY, HAZY, OVERCAST, SUNSET, DUSK)


def draw_sky(pen: Pen, rng: random.Random, horizon: float, choices: Sequence[int] = ANY_SKY) -> None:
    """Draws one of the chosen skies down to just below the horizon, with up to three clouds."""
    top, bottom = SKIES[rng.choice(choices)]
    pen.gradient(0, min(PICTURE_PX, horizon + 9), jitter(rng, top), jitter(rng, bottom))
    for _ in range(rng.choice([0, 1, 2, 3])):
        cloud(pen, rng.uniform(0, PICTURE_PX), rng.uniform(8, 40), rng.uniform(5, 10))


def draw_ground(pen: Pen, y: float, colour: Colour) -> None:
    """Fills everything below y, darker towards the viewer."""
    pen.gradient(y, PICTURE_PX, colour, shade(colour, 0.74))

"""The settings a landmark can stand in: their names, heights and floor colours, and what most skies share."""

import random
from collections.abc import Sequence
from typing import NamedTuple

from sd_atoms.pocket.world.figures import cloud
from sd_atoms.pocket.world.pen import PICTURE_PX, Colour, Pen, jitter, shade

GRASS = (112, 158, 76)


class Ground(NamedTuple):
    line_px: int  # where the landmark meets it
    floor: Colour  # from above


# The order is part of the world: scenes are sampled in it.
GROUNDS: dict[str, Ground] = {
    "mountains": Ground(94, GRASS),
    "forest": Ground(98, (56, 120, 56)),
    "lake": Ground(74, (70, 132, 176)),
    "autumn": Ground(98, (206, 140, 56)),
    "cliff": Ground(66, (128, 104, 84)),
    "sheepfield": Ground(82, (124, 182, 76)),
    "desert": Ground(96, (236, 198, 128)),
    "beach": Ground(88, (242, 218, 164)),
    "city": Ground(98, (120, 122, 126)),
    "night": Ground(96, (34, 52, 54)),
    "otherworld": Ground(90, (70, 60, 120)),
    "island": Ground(72, (104, 168, 74)),
    "plain": Ground(96, GRASS),
    "snow": Ground(96, (240, 244, 250)),
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

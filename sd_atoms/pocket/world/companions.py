"""The companions: who or what keeps a landmark company, and where it is drawn."""

import random

from sd_atoms.pocket.world.figures import balloon, boat, elf, goose, leafy_tree, peacock, sheep
from sd_atoms.pocket.world.pen import COLOURS, PICTURE_PX, Pen, jitter

# The order is part of the world: scenes are sampled in it.
COMPANIONS = ("peacock", "geese", "boat", "elves", "tree", "sheep", "balloon")
TUNICS = ((40, 140, 70), (60, 160, 60), (40, 110, 90))
BALLOON_COLOURS = ("red", "yellow", "purple", "orange")


def draw_companion(pen: Pen, rng: random.Random, kind: str, setting: str, base: float, centre: float) -> None:
    """Draws one of COMPANIONS; the order of the random draws is part of the world."""
    lawn = max(base + 14, 112)
    if kind == "peacock":
        x, y = centre + rng.uniform(-26, 26), min(PICTURE_PX - 3, lawn + rng.uniform(4, 10))
        peacock(pen, x, y, rng.uniform(34, 44))
    elif kind == "geese":
        x = rng.uniform(30, 70)
        y = rng.uniform(104, 114) if setting in ("lake", "cliff") else rng.uniform(112, 118)
        for index in range(rng.choice([3, 4, 5])):
            goose(pen, x + (index - 1) * 17, y + (index % 2) * 7, 14 if index == 0 else rng.uniform(9, 13))
    elif kind == "boat":
        boat(pen, centre + rng.uniform(-34, 34), rng.uniform(108, 122), rng.uniform(24, 34))
    elif kind == "elves":
        for side in rng.choice([(-1, 1), (-1, 1), (-1, -0.5, 1), (-1, 0.5, 1)]):
            x, y = centre + side * rng.uniform(22, 36), lawn + rng.uniform(2, 10)
            elf(pen, x, y, rng.uniform(22, 28), jitter(rng, rng.choice(TUNICS)))
    elif kind == "tree":
        x = rng.choice([rng.uniform(10, 26), rng.uniform(102, 118)])
        leafy_tree(pen, x, rng.uniform(112, 122), rng.uniform(56, 72), jitter(rng, (70, 140, 60)))
    elif kind == "sheep":
        for _ in range(rng.choice([3, 4])):
            sheep(pen, rng.uniform(12, 116), rng.uniform(lawn - 4, 123), rng.uniform(11, 15))
    elif kind == "balloon":
        x = rng.choice([rng.uniform(14, 34), rng.uniform(94, 114)])
        y, height = rng.uniform(34, 46), rng.uniform(26, 34)
        balloon(pen, x, y, height, jitter(rng, COLOURS[rng.choice(BALLOON_COLOURS)]))

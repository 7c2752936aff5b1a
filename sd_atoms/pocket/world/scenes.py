"""What is in a picture: the Scene, from which picture and captions follow."""

import random
from dataclasses import dataclass

from sd_atoms.pocket.world.companions import COMPANIONS
from sd_atoms.pocket.world.landmarks import draw_class
from sd_atoms.pocket.world.materials import MATERIALS
from sd_atoms.pocket.world.pen import STONE_COLOURS, VIVID_COLOURS, Colour
from sd_atoms.pocket.world.styles import STYLES
from sd_atoms.pocket.world.surroundings import GROUNDS

SETTINGS = tuple(GROUNDS)
SPECIALS = ("none", *STYLES, *MATERIALS, "top")
EVALUATED_SETTINGS = ("mountains", "forest", "lake", "autumn", "cliff", "sheepfield", "otherworld", "island")
LIGHTS = (None, None, None, (255, 240, 214), (255, 226, 190), (226, 236, 255), (214, 214, 220))


@dataclass(frozen=True)
class Scene:
    """Everything that a picture depends on."""

    landmark: str  # a key of LANDMARKS
    landmark_seed: int  # shapes the landmark
    colour: str | None  # a key of COLOURS: the walls
    setting: str  # one of SETTINGS
    companion: str | None  # one of COMPANIONS
    special: str  # one of SPECIALS: a style, a material, "top" or "none"
    seed: int  # places and shades everything
    light: Colour | None  # multiplies the picture; None is white light
    concept: str | None = None  # a key of CONCEPTS: a personal landmark in place of a drawn one
    shift_px: float | None = None  # of the landmark from the middle; None: drawn from the seed
    size_px: float | None = None  # None: drawn from the seed


def sample(rng: random.Random) -> Scene:
    """Draws a scene. The order and the weights of the draws are part of the world."""
    landmark = draw_class(rng)
    special = rng.choices(SPECIALS, [40] + [6.5] * 9)[0]
    setting = rng.choices(SETTINGS, [_setting_weight(name) for name in SETTINGS])[0]
    companion = None
    if special != "top" and rng.random() < (0.42 if special == "none" else 0.15):
        companion = _sample_companion(rng, setting)
    colour = rng.choice(STONE_COLOURS) if rng.random() < 0.6 else rng.choice(VIVID_COLOURS)
    light = rng.choice(LIGHTS)
    return Scene(
        landmark=landmark,
        landmark_seed=rng.randrange(1 << 30),
        colour=colour,
        setting=setting,
        companion=companion,
        special=special,
        seed=rng.randrange(1 << 30),
        light=light,
    )


def _setting_weight(setting: str) -> float:
    """The settings of the evaluation prompts come up twice as often as the others."""
    if setting in EVALUATED_SETTINGS:
        return 1.3
    return 1.6 if setting == "plain" else 0.6


def _sample_companion(rng: random.Random, setting: str) -> str:
    geese, boat = (6, 3) if setting == "lake" else (2, 0.3)
    companion = rng.choices(COMPANIONS, [3, geese, boat, 3, 1, 0.5, 1])[0]
    if setting in ("otherworld", "sheepfield") and companion in ("tree", "sheep"):
        return "balloon"
    return companion

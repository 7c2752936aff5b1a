"""A small procedural picture world: landmark x setting x companion x style, each picture with an English caption.

Everything is a pure function of a `Scene` or of a seeded `random.Random`; pictures are 128 pixels square, RGB.
"""

from sd_atoms.pocket.world.captions import caption
from sd_atoms.pocket.world.concepts import CONCEPTS
from sd_atoms.pocket.world.landmarks import LANDMARKS
from sd_atoms.pocket.world.pen import PICTURE_PX
from sd_atoms.pocket.world.photographs import EVALUATION_PROMPTS, concept_masks, concept_photos, oracle
from sd_atoms.pocket.world.render import render
from sd_atoms.pocket.world.scenes import Scene, sample

__all__ = [
    "CONCEPTS",
    "EVALUATION_PROMPTS",
    "LANDMARKS",
    "PICTURE_PX",
    "Scene",
    "caption",
    "concept_masks",
    "concept_photos",
    "oracle",
    "render",
    "sample",
]

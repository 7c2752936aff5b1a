"""Photographs of the personal landmarks, and the pictures that a perfectly personalised model would draw."""

import random

from PIL import Image

from sd_atoms.pocket.world.render import landmark_mask, render
from sd_atoms.pocket.world.scenes import Scene

PHOTO_SETTINGS = ("plain", "snow", "desert", "beach", "city", "forest", "mountains", "night")
PHOTO_LIGHTS = (None, (255, 236, 206), None, (222, 234, 255), (255, 226, 190), None, None, None)

# The twenty evaluation prompts ({} is the concept) with the setting, special and companion that each asks for.
EVALUATION_PROMPTS: tuple[tuple[str, str, str, str | None], ...] = (
    ("photo of a {}.", "plain", "none", None),
    ("The {} stands against a backdrop of snow-capped mountains.", "mountains", "none", None),
    ("A {} surrounded by a lush, vibrant forest.", "forest", "none", None),
    ("The {} overlooks a serene lake.", "lake", "none", None),
    ("The {} in the autumn season with colorful foliage.", "autumn", "none", None),
    ("The {} on a rocky cliff, with crashing waves below.", "cliff", "none", None),
    ("The {} guarded by mythical elves.", "plain", "none", "elves"),
    ("A {} surrounded by a field of grazing sheep.", "sheepfield", "none", None),
    ("A peacock in front of the {}.", "plain", "none", "peacock"),
    ("The {} overlooks a serene lake, where a family of geese swims.", "lake", "none", "geese"),
    ("{}, oil painting ghibli inspired.", "plain", "oil", None),
    ("{} painting by artist claude monet.", "plain", "monet", None),
    ("{} digital painting 3d render geometric style.", "plain", "lowpoly", None),
    ("Georgia O'Keeffe style {} painting.", "plain", "okeeffe", None),
    ("a watercolor painting of the {}.", "plain", "watercolor", None),
    (
        "The {} is surrounded by an otherworldly landscape, with glowing mushrooms and mystical creatures.",
        "otherworld",
        "none",
        None,
    ),
    ("The {}, made of crystal, shimmers in the sunlight.", "plain", "crystal", None),
    ("The {}, steampunk aesthetic, adorned with gears and metallic accents.", "plain", "steampunk", None),
    ("The {} atop a mystical floating island.", "island", "none", None),
    ("Top view of the {}.", "plain", "top", None),
)


def concept_photos(name: str, count: int = 5, seed: int = 7) -> list[Image.Image]:
    """`count` photos of one personal landmark (a key of CONCEPTS): another place, size and light each time."""
    return [render(scene) for scene in _photo_scenes(name, count, seed)]


def concept_masks(name: str, count: int = 5, seed: int = 7) -> list[Image.Image]:
    """Where the photos of `concept_photos` show the landmark, as `landmark_mask`."""
    return [landmark_mask(scene) for scene in _photo_scenes(name, count, seed)]


def _photo_scenes(name: str, count: int, seed: int) -> list[Scene]:
    rng = random.Random(seed)
    return [
        Scene(
            landmark=name,
            landmark_seed=0,
            colour=None,
            setting=PHOTO_SETTINGS[index % len(PHOTO_SETTINGS)],
            companion=None,
            special="none",
            seed=rng.randrange(1 << 30),
            light=PHOTO_LIGHTS[index % len(PHOTO_LIGHTS)],
            concept=name,
            shift_px=rng.uniform(-11, 11),
            size_px=rng.uniform(54, 70),
        )
        for index in range(count)
    ]


def oracle(name: str) -> tuple[list[Image.Image], list[Image.Image]]:
    """What a perfect personalised model would draw: the renderer itself, on the evaluation prompts.

    Scores are bounded by this rather than by 1: even the true landmark in another place resembles the
    reference photos only so far.

    Args:
        name: a key of CONCEPTS.

    Returns:
        One picture for each of EVALUATION_PROMPTS in order, and ten for "photo of a {}" in changing places.
    """
    prompted = [
        _oracle_picture(name, setting, special, companion, seed=900 + index)
        for index, (_, setting, special, companion) in enumerate(EVALUATION_PROMPTS)
    ]
    plain_photos = [_oracle_picture(name, PHOTO_SETTINGS[index % 7], "none", None, 950 + index) for index in range(10)]
    return prompted, plain_photos


def _oracle_picture(name: str, setting: str, special: str, companion: str | None, seed: int) -> Image.Image:
    return render(Scene(name, 0, None, setting, companion, special, seed, light=None, concept=name))

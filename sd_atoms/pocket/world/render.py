"""From a scene to its picture."""

import random

from PIL import Image, ImageChops

from sd_atoms.pocket.world.background import draw_background
from sd_atoms.pocket.world.companions import draw_companion
from sd_atoms.pocket.world.concepts import CONCEPTS
from sd_atoms.pocket.world.foreground import draw_foreground, draw_support
from sd_atoms.pocket.world.landmarks import LANDMARKS, Shape
from sd_atoms.pocket.world.materials import draw_sparkles, to_crystal, to_steampunk
from sd_atoms.pocket.world.pen import CANVAS_PX, COLOURS, PICTURE_PX, SUPERSAMPLING, Colour, Pen, jitter, window
from sd_atoms.pocket.world.scenes import Scene
from sd_atoms.pocket.world.styles import STYLES
from sd_atoms.pocket.world.surroundings import GROUNDS
from sd_atoms.pocket.world.top_view import draw_from_above

NARROW_SETTINGS = ("cliff", "island", "lake")
WIDE_LANDMARKS = ("bridge", "house", "barn", "church")
NIGHT_BLUE = (20, 24, 70, 255)
LAMPLIGHT = (255, 220, 110)


def render(scene: Scene, shape: Shape | None = None, silhouette: Colour | None = None) -> Image.Image:
    """The picture of a scene: PICTURE_PX square, RGB, a pure function of the scene and the shape.

    The order of the random draws is part of the world: another order gives other pictures.

    Args:
        scene: what is in it.
        shape: of the landmark, of the class that the scene names; None: the one that the scene determines.
        silhouette: fills the landmark with this colour.
    """
    rng = random.Random(scene.seed)
    shape = shape or shape_of(scene)
    image = Image.new("RGB", (CANVAS_PX, CANVAS_PX))
    pen = Pen(image)
    drawn_shift, drawn_size = rng.uniform(-9, 9), rng.uniform(52, 70)
    centre = 64 + (drawn_shift if scene.shift_px is None else scene.shift_px)
    size = drawn_size if scene.size_px is None else scene.size_px
    if scene.special == "top":
        draw_from_above(pen, rng, scene.landmark, shape, scene.setting, centre, size)
        return _shrink(image)

    base = GROUNDS[scene.setting].line_px + rng.uniform(-3, 3)
    if scene.setting in NARROW_SETTINGS:
        size = min(size, 58)
    if scene.landmark == "canal":
        base -= 10 if GROUNDS[scene.setting].line_px > 80 else 4
    if scene.landmark in WIDE_LANDMARKS:
        size *= 0.92
    draw_background(pen, rng, scene.setting, base)
    edge = draw_support(pen, rng, scene.setting, centre, base, size)

    outline = Image.new("RGBA", (CANVAS_PX, CANVAS_PX))
    LANDMARKS[scene.landmark].draw(Pen(outline), shape, centre, base, size)
    box = tuple(value / SUPERSAMPLING for value in outline.getbbox())
    layer = outline
    if scene.special == "crystal":
        layer = to_crystal(outline, rng)
    elif scene.special == "steampunk":
        layer = to_steampunk(outline, rng, box)
    if scene.setting == "night":
        layer = Image.blend(layer, Image.new("RGBA", layer.size, NIGHT_BLUE), 0.5)
        layer.putalpha(outline.getchannel("A"))
    if silhouette is not None:
        layer = Image.new("RGBA", outline.size, silhouette)
        layer.putalpha(outline.getchannel("A"))
    if scene.setting not in NARROW_SETTINGS:
        pen.ellipse(centre + 5, base + 1.5, (box[2] - box[0]) * 0.52, 4, (30, 34, 30, 70))  # its shadow
    image.paste(layer, (0, 0), layer)

    if scene.setting == "night" and scene.landmark != "canal" and silhouette is None:
        for side in (-0.18, 0, 0.18):
            window(pen, centre + side * size, base - size * 0.3, 2.4, 3, LAMPLIGHT)
    draw_foreground(pen, rng, scene.setting, base, edge)
    if scene.companion:
        draw_companion(pen, rng, scene.companion, scene.setting, base, centre)
    if scene.special == "crystal":
        draw_sparkles(pen, rng, box)
    if scene.light:
        image = ImageChops.multiply(image, Image.new("RGB", image.size, tuple(scene.light)))
    picture = _shrink(image)
    if scene.special in STYLES:
        picture = STYLES[scene.special](picture, rng)
    return picture


def landmark_mask(scene: Scene) -> Image.Image:
    """Where a scene shows its landmark: PICTURE_PX square, mode L, 255 times the share of each pixel.

    It is what changes between the landmark in white and in black, so what stands before it is left out.

    Raises:
        ValueError: a scene in a style, a material or from above, where light and outline are not the landmark's own.
    """
    if scene.special != "none":
        raise ValueError(f"special={scene.special!r}: only scenes without one have a mask")
    white, black = (render(scene, silhouette=(value,) * 3) for value in (255, 0))
    red, green, blue = ImageChops.difference(white, black).split()
    return ImageChops.lighter(ImageChops.lighter(red, green), blue)  # coloured light leaves one channel as it is


def shape_of(scene: Scene) -> Shape:
    """The landmark of a scene: a personal one, or one that its seed and colour determine."""
    if scene.concept is not None:
        return CONCEPTS[scene.concept]
    rng = random.Random(scene.landmark_seed)
    wall = jitter(rng, COLOURS[scene.colour])
    return LANDMARKS[scene.landmark].shape(rng, wall)


def _shrink(canvas: Image.Image) -> Image.Image:
    return canvas.resize((PICTURE_PX, PICTURE_PX), Image.Resampling.BOX)

"""The specials that repaint a finished picture: each takes and returns a PICTURE_PX square RGB image."""

import math
import random

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter

from sd_atoms.pocket.world.materials import recolour
from sd_atoms.pocket.world.pen import CANVAS_PX, PICTURE_PX, Pen, shade

PAPER = (252, 250, 244)
DUSKY_PINKS = ((60, 26, 60), (178, 60, 84), (240, 136, 110), (250, 206, 180), (232, 240, 236))
PETALS = ((226, 70, 110), (240, 240, 236), (170, 80, 170), (240, 120, 60))

ROWS, COLUMNS = np.mgrid[0:PICTURE_PX, 0:PICTURE_PX]


def _cloudy_noise(random_state: np.random.RandomState, cells: int) -> Image.Image:
    grey = (random_state.rand(cells, cells) * 255).astype(np.uint8)
    return Image.fromarray(grey).resize((PICTURE_PX, PICTURE_PX), Image.Resampling.BICUBIC)


# RandomState, not a Generator: its streams are frozen, and the pictures depend on them.
_NOISE_STATE = np.random.RandomState(0)
COARSE_NOISE = _cloudy_noise(_NOISE_STATE, 8)
FINE_NOISE = _cloudy_noise(_NOISE_STATE, 16)


def _floats(image: Image.Image) -> np.ndarray:
    return np.asarray(image, np.float32)


def _image(values: np.ndarray) -> Image.Image:
    return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))


def oil(image: Image.Image, rng: random.Random) -> Image.Image:
    smooth = ImageEnhance.Color(image.filter(ImageFilter.MedianFilter(5))).enhance(1.7)
    strokes = np.sin((ROWS * 0.9 + COLUMNS * 1.1) + _floats(FINE_NOISE) / 26) * 6
    return _image((_floats(smooth) - 118) * 1.12 + 132 + strokes[..., None] + np.array([8, 3, -8]))


def watercolor(image: Image.Image, rng: random.Random) -> Image.Image:
    pigment = _floats(image.filter(ImageFilter.GaussianBlur(1.1)))
    outlines = image.convert("L").filter(ImageFilter.FIND_EDGES).filter(ImageFilter.GaussianBlur(0.8))
    noise = (COARSE_NOISE, FINE_NOISE)[rng.randrange(2)].rotate(90 * rng.randrange(4))
    blotches = _floats(noise)[..., None] / 255
    washed = 255 - (255 - pigment) * (0.38 + 0.45 * blotches) - _floats(outlines)[..., None] * 0.35
    from_centre = np.maximum(np.abs(ROWS - 63.5), np.abs(COLUMNS - 63.5))[..., None] + blotches * 16
    painted = np.clip((70 - from_centre) / 7, 0, 1)  # 1 inside, 0 on the ragged border of bare paper
    return _image(washed * painted + np.array(PAPER) * (1 - painted))


def monet(image: Image.Image, rng: random.Random) -> Image.Image:
    image = ImageEnhance.Color(image).enhance(1.35)
    half_size = np.asarray(image.resize((PICTURE_PX // 2, PICTURE_PX // 2), Image.Resampling.BOX), np.int32)
    painting = image.filter(ImageFilter.GaussianBlur(1.5))
    draw = ImageDraw.Draw(painting)
    dab_state = np.random.RandomState(rng.randrange(1 << 30))
    count = 1500
    positions = dab_state.rand(count, 2) * PICTURE_PX
    lengths = dab_state.rand(count) * 1.8 + 1.6
    angles = dab_state.randn(count) * 0.4
    tints = dab_state.randint(-15, 18, (count, 3)) + np.array([3, 3, 10])
    below = half_size[(positions[:, 1] / 2).astype(int), (positions[:, 0] / 2).astype(int)]
    colours = np.clip(below + tints, 0, 255)
    dabs = zip(positions.tolist(), lengths.tolist(), angles.tolist(), colours.tolist(), strict=True)
    for (x, y), length, angle, colour in dabs:
        right, down = length * math.cos(angle), length * math.sin(angle)
        draw.line((x - right, y - down, x + right, y + down), fill=tuple(colour), width=2)
    return painting


def lowpoly(image: Image.Image, rng: random.Random) -> Image.Image:
    """Averages over triangles: half of an 8-pixel cell each, cut along one diagonal or the other in turn."""
    side = 8
    cells = PICTURE_PX // side
    # (rows, columns, 3) -> (cell row, cell column, row in cell, column in cell, 3)
    pixels = _floats(image).reshape(cells, side, cells, side, 3).transpose(0, 2, 1, 3, 4)
    row, column = np.mgrid[0:side, 0:side]
    parity = ((np.arange(cells)[:, None] + np.arange(cells)[None]) % 2)[..., None, None, None]
    flat = 0
    for half, used in ((row + column < side - 0.5, 1 - parity), (row >= column, parity)):
        mask = half[None, None, :, :, None]
        light = (pixels * mask).sum((2, 3), keepdims=True) / half.sum()
        dark = (pixels * ~mask).sum((2, 3), keepdims=True) / (~half).sum()
        flat = flat + used * (mask * (light * 1.1 + 8) + ~mask * (dark * 0.86))
    triangles = _image(flat.transpose(0, 2, 1, 3, 4).reshape(PICTURE_PX, PICTURE_PX, 3))
    return ImageEnhance.Color(Image.blend(image, triangles, 0.58)).enhance(1.35)


def okeeffe(image: Image.Image, rng: random.Random) -> Image.Image:
    tinted = Image.blend(image, recolour(image, DUSKY_PINKS), 0.62).filter(ImageFilter.GaussianBlur(0.7))
    canvas = tinted.resize((CANVAS_PX, CANVAS_PX))
    pen = Pen(canvas)
    x, y, petal = rng.choice([4, 124]), rng.uniform(104, 126), rng.choice(PETALS)
    for ring, (radius, light) in enumerate(((46, 0.8), (36, 1), (25, 1.12))):
        for index in range(7):
            angle = index * 6.283 / 7 + ring * 0.4
            petal_x, petal_y = x + radius * 0.55 * math.cos(angle), y + radius * 0.55 * math.sin(angle)
            colour = shade(petal, light * (0.86 + 0.14 * (index % 2)))
            pen.ellipse(petal_x, petal_y, radius * 0.42, radius * 0.42, colour)
    pen.ellipse(x, y, 9, 9, (70, 40, 60))
    pen.ellipse(x, y, 5, 5, (240, 200, 70))
    small = canvas.resize((PICTURE_PX, PICTURE_PX), Image.Resampling.BOX)
    return small.filter(ImageFilter.GaussianBlur(0.5))


def sketch(image: Image.Image, rng: random.Random) -> Image.Image:
    grey = image.convert("L")
    value, around = _floats(grey), _floats(grey.filter(ImageFilter.GaussianBlur(2)))
    lines = np.clip(value / (around + 1) * 1.02, 0, 1) ** 2.2 * 246
    hatching = ((ROWS + COLUMNS) % 5 < 1.5) * np.clip(120 - value, 0, 70) * 0.9
    return _image(lines - hatching).convert("RGB")


# The order is part of the world: scenes are sampled in it.
STYLES = {style.__name__: style for style in (oil, watercolor, monet, lowpoly, okeeffe, sketch)}

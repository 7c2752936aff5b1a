"""The specials that change what a landmark is made of: crystal and steampunk."""

import math
import random

import numpy as np
from PIL import Image, ImageOps

from sd_atoms.pocket.world.figures import gear
from sd_atoms.pocket.world.pen import WHITE, Colour, Pen

MATERIALS = ("crystal", "steampunk")
ICE = ((40, 90, 170), (90, 190, 236), (190, 240, 255), (255, 255, 255))
BRASS = ((34, 22, 18), (110, 66, 36), (176, 116, 60), (226, 178, 104))
FACETS = ((255, 255, 255, 90), (130, 220, 255, 90), (200, 150, 255, 90))
GEARS = ((206, 150, 60), (184, 104, 56), (160, 150, 140))

Box = tuple[float, float, float, float]  # left, top, right, bottom in picture pixels


def recolour(image: Image.Image, stops: tuple[Colour, ...]) -> Image.Image:
    """Maps grey values through a list of colours, evenly spaced from black to white; returns RGB."""
    positions = np.asarray(image.convert("L"), np.float32) / 255 * (len(stops) - 1)
    colours = np.array(stops, np.float32)
    channels = [np.interp(positions, np.arange(len(stops)), colours[:, channel]) for channel in range(3)]
    return Image.fromarray(np.stack(channels, -1).astype(np.uint8))


def to_crystal(layer: Image.Image, rng: random.Random) -> Image.Image:
    """Turns the landmark's RGBA layer into faceted ice; the outline stays."""
    crystal = recolour(ImageOps.autocontrast(layer.convert("L")), ICE)
    pen = Pen(crystal)
    for _ in range(16):
        x, y, angle, reach = rng.uniform(10, 118), rng.uniform(10, 118), rng.uniform(0, 6.3), rng.uniform(10, 26)
        first = (x + reach * math.cos(angle), y + reach * math.sin(angle))
        second = (x + reach * math.cos(angle + 0.7), y + reach * math.sin(angle + 0.7))
        pen.polygon([(x, y), first, second], rng.choice(FACETS))
    crystal.putalpha(layer.getchannel("A"))
    return crystal


def to_steampunk(layer: Image.Image, rng: random.Random, box: Box) -> Image.Image:
    """Turns the landmark's RGBA layer into brass with pipes and gears; gears may stick out of the outline."""
    brass = recolour(layer, BRASS)
    left, top, right, bottom = box
    pen = Pen(brass)
    for _ in range(5):
        x = rng.uniform(left, right)
        pen.line([(x, bottom), (x, top)], (90, 56, 34), 1.6)
    brass.putalpha(layer.getchannel("A"))
    pen = Pen(brass)
    for _ in range(7):
        x, y = rng.uniform(left + 2, right - 2), rng.uniform(top + (bottom - top) * 0.3, bottom)
        gear(pen, x, y, rng.uniform(4, 8.5), rng.choice(GEARS))
    return brass


def draw_sparkles(pen: Pen, rng: random.Random, box: Box) -> None:
    """Six four-pointed stars on a crystal landmark."""
    left, top, right, bottom = box
    for _ in range(6):
        x, y, reach = rng.uniform(left, right), rng.uniform(top, bottom), rng.uniform(3, 7)
        for along_x, along_y in ((reach, 0), (0, reach)):
            pen.polygon(
                [
                    (x - along_x, y - along_y),
                    (x + along_y * 0.14, y - along_x * 0.14),
                    (x + along_x, y + along_y),
                    (x - along_y * 0.14, y + along_x * 0.14),
                ],
                WHITE,
            )
        pen.ellipse(x, y, 1, 1, WHITE)

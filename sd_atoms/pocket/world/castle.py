"""The castle: a wall with two to four towers, perhaps a keep, a flag and a banner."""

import random
from dataclasses import dataclass

from sd_atoms.pocket.world.pen import (
    COLOURS,
    DARK,
    VIVID_COLOURS,
    Colour,
    Pen,
    battlements,
    jitter,
    roof_colour,
    shade,
    window,
)

TOPS = ("cone", "crenel", "dome")


@dataclass(frozen=True)
class Tower:
    x: float  # from the middle of the castle
    width: float
    height: float
    top: str  # one of TOPS


@dataclass(frozen=True)
class Banner:
    x: float
    top: float  # height of its upper edge above the ground
    width: float
    height: float
    colour: Colour
    emblem: Colour


@dataclass(frozen=True)
class CastleShape:
    """All lengths are shares of the castle's size."""

    wall: Colour
    roof: Colour
    towers: tuple[Tower, ...]
    wall_height: float
    has_keep: bool
    keep_width: float
    keep_height: float
    keep_top: str
    roof_height: float
    windows_per_tower: int
    has_flag: bool
    flag: Colour
    gate_half_width: float
    banner: Banner | None = None


def castle_shape(rng: random.Random, wall: Colour) -> CastleShape:
    """Draws a castle. The order of the draws is part of the world: another order gives other castles."""
    count = rng.choice([2, 2, 3, 3, 4])
    xs = [-0.5 + index / (count - 1) + rng.uniform(-0.05, 0.05) for index in range(count)]
    common_top = rng.choice(["cone", "cone", "crenel", "dome"])
    symmetric = rng.random() < 0.5
    height = rng.uniform(0.6, 0.95)
    width = rng.uniform(0.16, 0.26)
    towers = []
    for x in xs:
        tower_width = width * (1 if symmetric else rng.uniform(0.8, 1.25))
        tower_height = height * (1 if symmetric else rng.uniform(0.8, 1.2))
        top = common_top if rng.random() < 0.8 else rng.choice(TOPS)
        towers.append(Tower(x, tower_width, tower_height, top))
    return CastleShape(
        wall=wall,
        roof=roof_colour(rng),
        towers=tuple(towers),
        wall_height=rng.uniform(0.36, 0.5),
        has_keep=rng.random() < 0.6,
        keep_width=rng.uniform(0.25, 0.4),
        keep_height=rng.uniform(0.65, 0.95),
        keep_top=rng.choice(TOPS),
        roof_height=rng.uniform(0.2, 0.4),
        windows_per_tower=rng.choice([1, 2, 2]),
        has_flag=rng.random() < 0.5,
        flag=jitter(rng, COLOURS[rng.choice(VIVID_COLOURS)]),
        gate_half_width=rng.uniform(0.1, 0.16),
    )


def tower_top(
    pen: Pen, kind: str, x: float, y: float, width: float, roof_height: float, wall: Colour, roof: Colour
) -> None:
    """Draws a cone, a dome or battlements on a tower that ends at height y."""
    if kind == "cone":
        pen.roof(x, y, width * 1.25, roof_height, roof)
    elif kind == "dome":
        pen.ellipse(x, y - width * 0.25, width * 0.62, width * 0.62, roof)
        pen.rectangle(x - width * 0.7, y - 0.2, x + width * 0.7, y + width * 0.5, wall)
        pen.roof(x, y - width * 0.75, width * 0.3, width * 0.5, roof)
    else:
        pen.rectangle(x - width * 0.58, y, x + width * 0.58, y + 2.5, shade(wall, 0.92))
        battlements(pen, x - width * 0.58, x + width * 0.58, y, wall)


def draw_tower(
    pen: Pen, shape: CastleShape, x: float, base: float, size: float, tower: Tower, stretch: float, windows: int
) -> None:
    """Draws one tower of the castle around x, `stretch` times its height."""
    width = tower.width * size
    height = tower.height * size * stretch
    top = base - height
    tower_top(pen, tower.top, x, top, width, shape.roof_height * size, shape.wall, shape.roof)
    pen.wall(x - width / 2, top, x + width / 2, base, shape.wall)
    if tower.top == "crenel":
        pen.rectangle(x - width * 0.58, top, x + width * 0.58, top + 2, shade(shape.wall, 0.9))
    for index in range(windows):
        window(pen, x, top + height * (0.2 + 0.28 * index), width * 0.26, width * 0.3)


def draw_flag(pen: Pen, shape: CastleShape, centre: float, base: float, size: float) -> None:
    tower = shape.towers[0]
    top_height = shape.roof_height * size if tower.top == "cone" else 0.8 * tower.width * size
    x = centre + tower.x * size
    y = base - tower.height * size - top_height
    pen.line([(x, y + 2), (x, y - 7)], DARK, 0.8)
    pen.polygon([(x, y - 7), (x + 8, y - 5), (x, y - 2.5)], shape.flag)


def draw_banner(pen: Pen, banner: Banner, centre: float, base: float, size: float) -> None:
    x = centre + banner.x * size
    half = banner.width * size / 2
    height = banner.height * size
    y = base - banner.top * size
    pen.polygon(
        [(x - half, y), (x + half, y), (x + half, y + height), (x, y + height * 0.8), (x - half, y + height)],
        banner.colour,
    )
    emblem_radius = banner.width * size * 0.3
    pen.ellipse(x, y + height * 0.38, emblem_radius, emblem_radius, banner.emblem)


def draw_castle(pen: Pen, shape: CastleShape, centre: float, base: float, size: float) -> None:
    """Draws the castle from the front; (centre, base) is where its middle meets the ground."""
    if shape.has_keep:
        keep = Tower(0.0, shape.keep_width, shape.keep_height, shape.keep_top)
        draw_tower(pen, shape, centre, base, size, keep, stretch=1.1, windows=1)
    wall = shade(shape.wall, 0.95)
    left, right, wall_top = centre - 0.5 * size, centre + 0.5 * size, base - shape.wall_height * size
    pen.wall(left, wall_top, right, base, wall)
    battlements(pen, left, right, wall_top, wall)
    for tower in shape.towers:
        x = centre + tower.x * size
        draw_tower(pen, shape, x, base, size, tower, stretch=1, windows=shape.windows_per_tower)
    gate = shape.gate_half_width * size
    pen.rectangle(centre - gate, base - gate * 1.3, centre + gate, base, DARK)
    pen.ellipse(centre, base - gate * 1.3, gate, gate, DARK)
    if shape.has_flag:
        draw_flag(pen, shape, centre, base, size)
    if shape.banner is not None:
        draw_banner(pen, shape.banner, centre, base, size)

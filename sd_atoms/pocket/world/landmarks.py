"""The table of landmarks: how each is drawn and how its shape comes about."""

import random
from collections.abc import Callable
from typing import NamedTuple

from sd_atoms.pocket.world import buildings
from sd_atoms.pocket.world.buildings import BuildingShape, building_shape
from sd_atoms.pocket.world.canal import CanalShape, canal_shape, draw_canal
from sd_atoms.pocket.world.castle import CastleShape, castle_shape, draw_castle
from sd_atoms.pocket.world.pen import Colour

Shape = CastleShape | CanalShape | BuildingShape


class Landmark(NamedTuple):
    draw: Callable  # (pen, shape, centre, base, size) -> None
    shape: Callable[[random.Random, Colour], Shape]
    weight: int  # how often it is sampled


# The order is part of the world: scenes are sampled and tokens counted in it.
LANDMARKS: dict[str, Landmark] = {
    "castle": Landmark(draw_castle, castle_shape, 28),
    "canal": Landmark(draw_canal, canal_shape, 16),
    "house": Landmark(buildings.draw_house, building_shape, 10),
    "tower": Landmark(buildings.draw_tower, building_shape, 8),
    "bridge": Landmark(buildings.draw_bridge, building_shape, 8),
    "windmill": Landmark(buildings.draw_windmill, building_shape, 8),
    "lighthouse": Landmark(buildings.draw_lighthouse, building_shape, 8),
    "barn": Landmark(buildings.draw_barn, building_shape, 6),
    "church": Landmark(buildings.draw_church, building_shape, 8),
}


def draw_class(rng: random.Random) -> str:
    """A key of LANDMARKS."""
    return rng.choices(list(LANDMARKS), [entry.weight for entry in LANDMARKS.values()])[0]

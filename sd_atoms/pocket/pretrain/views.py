"""What the judge learns from: landmarks, none of them like a personal one, each rendered in several views."""

import dataclasses
import functools
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from tqdm import tqdm

from sd_atoms.files import replacing
from sd_atoms.pocket.pretrain.stages import JudgeSettings
from sd_atoms.pocket.world import CONCEPTS, LANDMARKS, render, sample
from sd_atoms.pocket.world.castle import Banner
from sd_atoms.pocket.world.landmarks import Shape, draw_class
from sd_atoms.pocket.world.pen import CANVAS_PX, COLOURS, VIVID_COLOURS, Pen, jitter

SHARD_LANDMARKS = 250  # five seconds of rendering: little is lost by an interruption
# Levels of 255. 1 in 100 castles is as near to the personal one, 1 in 6 of its wall colour; no canal is by chance. The
# personal castle without its banner differs from itself by 6 levels, with grey walls by 31.
NEAR = 30
BACKDROP = (128, 128, 128)


def prepare_views(work_dir: Path, settings: JudgeSettings, state: PartialState) -> None:
    """Writes `work_dir`/views in shards of SHARD_LANDMARKS, (n, views, 128, 128, 3) uint8; finished ones are kept."""
    shards = _shards(work_dir, settings)
    missing = [path for path in shards if not path.exists()]
    state.wait_for_everyone()  # nobody may write before all have looked
    own = missing[state.process_index :: state.num_processes]
    for path in tqdm(own, desc="views", unit="shard", disable=None if state.is_main_process else True):
        pixels = np.stack([landmark_views(seed, settings.rendered_views) for seed in shards[path]])
        with replacing(path) as temporary:
            np.save(temporary, pixels)
    state.wait_for_everyone()


def load_views(work_dir: Path, settings: JudgeSettings) -> list[np.ndarray]:
    """The shards; their pixels stay on disk."""
    return [np.load(path, mmap_mode="r") for path in _shards(work_dir, settings)]


def take_views(
    shards: list[np.ndarray], landmarks: Sequence[int], count: int, rng: np.random.Generator
) -> torch.Tensor:
    """`count` different views of each landmark, (n, count, 3, 128, 128) uint8."""
    chosen = rng.random((len(landmarks), shards[0].shape[1])).argsort(1)[:, :count]
    pixels = np.stack(
        [
            shards[landmark // SHARD_LANDMARKS][landmark % SHARD_LANDMARKS, views]
            for landmark, views in zip(landmarks, chosen, strict=True)
        ]
    )  # (n, count, 128, 128, 3)
    return torch.from_numpy(pixels).permute(0, 1, 4, 2, 3)


def class_members(settings: JudgeSettings) -> list[np.ndarray]:
    """The training landmarks of each class that has any, by their numbers."""
    names = np.array([draw_class(random.Random(seed)) for seed in _seeds(settings)])
    members = [np.flatnonzero(names == name) for name in LANDMARKS]
    return [numbers for numbers in members if len(numbers)]


def landmark_views(seed: int, count: int, name: str | None = None) -> np.ndarray:
    """`count` pictures of the landmark that `draw_landmark` draws, (count, 128, 128, 3) uint8.

    Each is another place, light, style and size, which may lie a little outside of what pretraining shows.
    """
    rng = random.Random(seed)
    name, shape = draw_landmark(rng, name)
    pictures = []
    for _ in range(count):
        scene = dataclasses.replace(
            sample(rng), landmark=name, shift_px=rng.uniform(-14, 14), size_px=rng.uniform(48, 72)
        )
        pictures.append(np.asarray(render(scene, shape)))
    return np.stack(pictures)


def draw_landmark(rng: random.Random, name: str | None = None) -> tuple[str, Shape]:
    """A class, unless its name is given, and a landmark of it that is not like the personal one of that class.

    Walls have all colours equally often, and half of the castles have a banner, as none in pretraining has: a judge
    that never met one would not look at it.
    """
    drawn = draw_class(rng)
    name = name or drawn
    while True:
        shape = LANDMARKS[name].shape(rng, jitter(rng, COLOURS[rng.choice(list(COLOURS))]))
        if name == "castle" and rng.random() < 0.5:
            shape = dataclasses.replace(shape, banner=_draw_banner(rng))
        if not is_near_concept(name, shape):
            return name, shape


def is_near_concept(name: str, shape: Shape) -> bool:
    """Whether a landmark looks like the personal one of its class: drawn in the same place, the pixels that either of
    them covers differ by NEAR levels at most, on average over these and the channels.
    """
    if name not in CONCEPTS:
        return False
    own, other = _portrait(name, CONCEPTS[name]), _portrait(name, shape)
    covered = ((own != BACKDROP) | (other != BACKDROP)).any(-1)
    return bool(np.abs(own - other)[covered].mean() <= NEAR)


@functools.lru_cache(maxsize=8)  # those of the personal landmarks are asked for again and again
def _portrait(name: str, shape: Shape) -> np.ndarray:
    """(64, 64, 3) int16: the landmark alone."""
    image = Image.new("RGB", (CANVAS_PX, CANVAS_PX), BACKDROP)
    LANDMARKS[name].draw(Pen(image), shape, 64, 96, 60)
    return np.asarray(image.resize((64, 64), Image.Resampling.BOX), np.int16)


def _draw_banner(rng: random.Random) -> Banner:
    colour, emblem = (jitter(rng, COLOURS[name]) for name in rng.sample(VIVID_COLOURS, 2))
    return Banner(
        x=rng.uniform(-0.3, 0.3),
        top=rng.uniform(0.36, 0.5),
        width=rng.uniform(0.1, 0.2),
        height=rng.uniform(0.2, 0.36),
        colour=colour,
        emblem=emblem,
    )


def _seeds(settings: JudgeSettings) -> range:
    return range(settings.first_seed, settings.first_seed + settings.landmark_count)


def _shards(work_dir: Path, settings: JudgeSettings) -> dict[Path, range]:
    """The seeds of the landmarks in each shard."""
    seeds = _seeds(settings)
    parts = [seeds[first : first + SHARD_LANDMARKS] for first in range(0, len(seeds), SHARD_LANDMARKS)]
    return {
        work_dir / "views" / f"{part.start:06}-{part.stop:06}x{settings.rendered_views}.npy": part for part in parts
    }

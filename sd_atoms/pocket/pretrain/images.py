"""Stage "images": renders training and held-out pictures in shards of pixels and scenes."""

import dataclasses
import json
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from tqdm import tqdm

from sd_atoms.errors import UserError
from sd_atoms.files import replacing, write_text
from sd_atoms.pocket.pretrain.stages import ImagesSettings
from sd_atoms.pocket.world import PICTURE_PX, Scene, caption, render, sample

SHARD_PICTURES = 1000  # three seconds of rendering: little is lost by an interruption


def run(work_dir: Path, settings: ImagesSettings, state: PartialState) -> dict:
    """Writes `work_dir`/images/{train,held}-FIRST-END.{npy,jsonl}; finished shards of an earlier run are kept.

    Raises:
        UserError: the folder holds shards of a run with another number of pictures.
    """
    folder = work_dir / "images"
    seeds = {}
    for split, first_seed, count in (
        ("train", settings.first_seed, settings.picture_count),
        ("held", settings.first_held_out_seed, settings.held_out_count),
    ):
        for first in range(0, count, SHARD_PICTURES):
            end = min(count, first + SHARD_PICTURES)
            seeds[folder / f"{split}-{first:06}-{end:06}.npy"] = range(first_seed + first, first_seed + end)
    for path in sorted(folder.glob("*.npy")):
        if path not in seeds:
            raise UserError(f"{path}: left by a run with another --count; delete {folder} or use another --work_dir")
    missing = [path for path in seeds if not path.exists()]
    state.wait_for_everyone()  # nobody may write before all have looked
    own = missing[state.process_index :: state.num_processes]
    total = sum(len(seeds[path]) for path in own)
    with tqdm(desc="images", total=total, unit="picture", disable=None if state.is_main_process else True) as bar:
        for path in own:
            render_shard(path, seeds[path], bar)
    return {"pictures": settings.picture_count, "held_out_pictures": settings.held_out_count}


def render_shard(path: Path, seeds: range, bar: tqdm) -> None:
    """Renders one picture for each seed: pixels to `path`, (n, 128, 128, 3) uint8, scenes and captions beside it."""
    pixels = np.empty((len(seeds), PICTURE_PX, PICTURE_PX, 3), np.uint8)
    lines = []
    for index, seed in enumerate(seeds):
        rng = random.Random(seed)
        scene = sample(rng)
        lines.append(json.dumps({"scene": dataclasses.asdict(scene), "caption": caption(scene, rng)}) + "\n")
        pixels[index] = np.asarray(render(scene))
        bar.update()
    write_text(path.with_suffix(".jsonl"), "".join(lines))
    with replacing(path) as temporary:  # last: the shard counts as finished when its pixels are there
        np.save(temporary, pixels)


class Pictures:
    """The rendered pictures of one split ("train" or "held") and their scenes; the pixels stay on disk."""

    def __init__(self, work_dir: Path, split: str):
        paths = sorted((work_dir / "images").glob(f"{split}-*.npy"))
        self._shards = [np.load(path, mmap_mode="r") for path in paths]
        lines = [line for path in paths for line in path.with_suffix(".jsonl").read_text("utf-8").splitlines()]
        self.scenes = [Scene(**json.loads(line)["scene"]) for line in lines]

    def __len__(self) -> int:
        return len(self.scenes)

    def batch(self, indices: Sequence[int]) -> torch.Tensor:
        """(n, 3, 128, 128) uint8."""
        pictures = [self._shards[index // SHARD_PICTURES][index % SHARD_PICTURES] for index in indices]
        return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)


def to_unit_range(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 in [0, 255] -> float32 in [-1, 1], as the autoencoder takes them."""
    return pixels.float() / 127.5 - 1

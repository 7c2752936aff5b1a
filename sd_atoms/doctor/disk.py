"""What a run writes, and whether the folders and disks can take it."""

import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from sd_atoms.doctor.findings import Finding, bytes_text
from sd_atoms.doctor.plan import missing_class_images
from sd_atoms.doctor.prompts import templates
from sd_atoms.settings import flat
from sd_atoms.training.config import TrainConfig

PNG_BYTES_PER_PX = 2  # of photos in RGB
FLOAT32 = 4  # bytes


def disk_needs(
    config: TrainConfig, trained: int, steps: int, resolution: int, pictures: int, prompts: int, width: int
) -> dict[str, int]:
    """Setting of a folder -> bytes that a run writes there.

    A checkpoint has the trained numbers and AdamW's two moments of each, in float32; the adapter is written twice, its
    initial atoms with it; a picture counts 2 bytes per pixel, and the grids of all pictures count as much again.
    """
    copies = 3 + bool(config.optimiser.ema_decay) + (config.validation.keep == "best")
    kept = math.ceil(steps / config.output.checkpointing_steps)
    if config.output.checkpoints_total_limit:
        kept = min(kept, config.output.checkpoints_total_limit + 1)  # the oldest goes after the newest has come
    png = PNG_BYTES_PER_PX * resolution**2
    drawn = 4 * len(config.all_concepts) * (config.images.num_instance_images + len(templates(config)))
    if config.validation.validation_prompt:
        drawn += config.validation.num_validation_images * (steps // config.validation.validation_steps)
    needs = {"output_dir": (kept * copies + 4) * trained * FLOAT32 + drawn * png}
    # mean and std of 4 channels at an eighth of the side, mirrored too; states of 77 tokens
    latents = pictures * (1 + config.data.random_flip) * 2 * 4 * (resolution // 8) ** 2 * FLOAT32
    if config.data.cache_dir:
        needs["cache_dir"] = latents + prompts * 77 * width * FLOAT32
    elif latents > config.data.latents_in_memory:
        needs["output_dir"] += latents
    if config.prior.prior == "images":
        needs["class_data_dir"] = sum(missing_class_images(config).values()) * png
    return {about: needed for about, needed in needs.items() if needed}


def disk(config: TrainConfig, needs: Mapping[str, int]) -> list[Finding]:
    """Errors where a folder cannot be written to or a disk has no room; facts about the bytes otherwise."""
    findings, on_disk = [], {}
    for about, needed in needs.items():
        folder = flat(config)[about] or next(c.class_data_dir for c in config.all_concepts if c.class_data_dir)
        place = existing_parent(Path(folder))
        found = writable(about, place)
        findings += found
        if not found:
            entry = on_disk.setdefault(place.stat().st_dev, ([], [], place))
            entry[0].append(about)
            entry[1].append(needed)
    for names, sizes, place in on_disk.values():
        findings.append(room(" and ".join(names), sum(sizes), shutil.disk_usage(place).free))
    return findings


def existing_parent(path: Path) -> Path:
    """The path itself, or the nearest folder above it that is there."""
    path = path.expanduser().absolute()
    return next(place for place in (path, *path.parents) if place.exists())


def writable(about: str, place: Path) -> list[Finding]:
    """An error where no file can be made in a folder; nothing is tried."""
    if not place.is_dir():
        return [Finding("error", about, f"{place} is a file", "name a folder")]
    if not os.access(place, os.W_OK | os.X_OK):
        return [Finding("error", about, f"{place} cannot be written to", "name a folder of your own")]
    return []


def room(about: str, needed: int, free: int) -> Finding:
    """Whether a disk has room for what is written: a fact or an error."""
    text = f"about {bytes_text(needed)} will be written, {bytes_text(free)} are free"
    if needed <= free:
        return Finding("fact", about, text)
    fix = "name a folder on a larger disk, set checkpoints_total_limit, or draw fewer pictures"
    return Finding("error", about, text, fix)

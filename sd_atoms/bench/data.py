"""`bench data`: what a set of so many pictures costs before its first step, and per draw.

The pictures are of the pocket world, and the base is `pocket`: small, so that what is not the network shows.
"""

import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from tqdm import tqdm

from sd_atoms.bench.measuring import describe, machine_info, peak_bytes
from sd_atoms.data.config import DataSettings
from sd_atoms.data.images import flip, read_image, to_tensor
from sd_atoms.data.records import folder_images, usable
from sd_atoms.errors import UserError
from sd_atoms.machine import read_ahead
from sd_atoms.pipeline import open_base
from sd_atoms.pocket.world import render, sample
from sd_atoms.report.table import text_table
from sd_atoms.training.examples import Cropping, crop
from sd_atoms.training.latents import encode_images
from sd_atoms.training.noise import image_number

DRAWS = 20_000
ALONE = 128  # pictures that the autoencoder encodes by itself
TRAIN_STEPS = 20
POLL_SECONDS = 0.05
FEW = 5  # pictures that the memory of a run is compared with


def bench_data(sizes: list[int], threads: int, folder: str | None) -> dict:
    """Measures sets of these sizes, each from nothing and again from the cache, and the draws from them.

    Args:
        sizes: numbers of pictures; rendered as needed, 3 ms each.
        threads: for torch.
        folder: where the pictures stay for the next time; None for a temporary one.

    Raises:
        UserError: a training fails.
    """
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(folder or scratch)
        few = _train(_pictures(place, FEW), Path(scratch))
        sets = [_measure(_pictures(place, size), size, Path(scratch), few) for size in sizes]
    return {"benchmark": "data", "machine": machine_info("cpu", threads), "train_steps": TRAIN_STEPS, "sets": sets}


def data_text(result: dict) -> str:
    """The table of a result."""
    head = [
        "pictures", "decode/s", "check/s", "VAE/s", "encode/s", "check + encode s", "first step s", "to that",
        "again s", "MB more", "us a draw",
    ]  # fmt: skip
    rows = [
        [
            f"{entry['pictures']:,}",
            *(f"{entry[key]:,.0f}" for key in ("decoded_per_second", "checked_per_second")),
            *(f"{entry[key]:,.0f}" for key in ("vae_per_second", "encoded_per_second")),
            f"{entry['data_seconds']:.1f}",
            f"{entry['first_step_seconds']:.1f}",
            f"{entry['first_step_to_data']:.2f}x" if entry["pictures"] > FEW else "",
            f"{entry['again_seconds']:.1f}",
            f"{entry['bytes_more'] / 1e6:,.0f}",
            f"{entry['seconds_per_draw'] * 1e6:.1f}",
        ]
        for entry in result["sets"]
    ]
    note = (
        f"First step: since the start of a run of {TRAIN_STEPS} steps, less that of one on {FEW} pictures; again: the "
        f"same from the cache. MB more: peak memory above that of {FEW} pictures."
    )
    return f"{describe(result['machine'])}\n{text_table(head, rows)}\n{note}"


def _pictures(place: Path, count: int) -> Path:
    """A folder of so many pictures, each rendered from a seed of its own."""
    folder = place / f"{count}"
    folder.mkdir(parents=True, exist_ok=True)
    there = {path.name for path in folder.iterdir()}
    for seed in tqdm(range(count), desc=f"Rendering {count:,} pictures", unit="picture", disable=None):
        if f"{seed:06d}.png" not in there:
            render(sample(random.Random(seed))).save(folder / f"{seed:06d}.png")
    return folder


def _measure(folder: Path, size: int, scratch: Path, few: tuple[float, int]) -> dict:
    pipe = open_base("pocket")
    pictures, _ = folder_images(folder, captions=False)
    decode = _seconds(lambda: sum(1 for _ in read_ahead(read_image, [record.name for record in pictures])))
    start = time.perf_counter()
    pictures, _ = usable(pictures, "error")
    check = time.perf_counter() - start
    how = Cropping(DataSettings(cache_dir=str(scratch / "own")), 128, 8, 0)
    images = [to_tensor([flip(crop(record, how))]) for record in pictures[:ALONE]]
    with torch.no_grad():
        vae = _seconds(lambda: [pipe.vae.encode(image) for image in images]) / len(images)
    encode = _seconds(lambda: encode_images(pipe.vae, pictures, how))
    draw = _seconds(lambda: [image_number(0, n, size) for n in range(DRAWS)]) / DRAWS
    shutil.rmtree(scratch / "own", ignore_errors=True)

    first, memory = _train(folder, scratch)
    again, _ = _train(folder, scratch, keep_cache=False)
    return {
        "pictures": size,
        "decoded_per_second": size / decode,
        "checked_per_second": size / check,
        "vae_per_second": 1 / vae,
        "encoded_per_second": size / encode,
        "data_seconds": check + encode,
        "first_step_seconds": first - few[0],
        "first_step_to_data": (first - few[0]) / (check + encode),
        "again_seconds": again - few[0],
        "bytes_more": memory - few[1],
        "seconds_per_draw": draw,
    }


def _train(folder: Path, scratch: Path, keep_cache: bool = True) -> tuple[float, int]:
    """Seconds from a run's start to its first step, and its peak memory in bytes."""
    out, cache, small = scratch / "run", scratch / "cache", "1"
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "sd_atoms", "train", "--pretrained_model_name_or_path", "pocket"]
    command += ["--instance_data_dir", str(folder), "--instance_prompt", "a picture", "--output_dir", str(out)]
    command += ["--max_train_steps", str(TRAIN_STEPS), "--train_batch_size", small, "--num_instance_images", small]
    command += ["--num_inference_steps", small, "--cache_dir", str(cache), "--report_to", "none"]
    start, first, memory = time.perf_counter(), None, 0
    with open(scratch / "errors", "w+", encoding="utf-8") as errors:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
        while process.poll() is None:
            memory = max(memory, peak_bytes("cpu", process.pid))
            log = out / "log.jsonl"
            if first is None and log.exists() and log.stat().st_size:
                first = time.perf_counter() - start
            time.sleep(POLL_SECONDS)
        errors.seek(0)
        if process.returncode or first is None:
            last = errors.read().strip().splitlines()[-1:] or [f"exit status {process.returncode}"]
            raise UserError(f"training on {folder.name} pictures failed: {last[0]}")
    if not keep_cache:
        shutil.rmtree(cache, ignore_errors=True)
    return first, memory


def _seconds(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start

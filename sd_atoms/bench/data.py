"""`bench data`: what a set of so many pictures costs before its first step, and per draw.

The pictures are of the pocket world, and the base is `pocket`: small, so that what is not the network shows.
"""

import contextlib
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from sd_atoms.bench.measuring import describe, machine_info, process_environment, timed
from sd_atoms.data.checked import usable
from sd_atoms.data.config import DataSettings
from sd_atoms.data.images import read_image, to_tensor
from sd_atoms.data.records import folder_images
from sd_atoms.errors import UserError
from sd_atoms.jobs.queue import Slot
from sd_atoms.machine import GIVEN_CORES, peak_bytes, read_ahead
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


def bench_data(sizes: list[int], threads: int, folder: str | None, check_only: bool = False) -> dict:
    """Measures sets of these sizes, each from nothing and again from the cache, and the draws from them.

    Args:
        sizes: numbers of pictures; rendered as needed, 3 ms each.
        threads: for torch and for reading, here and in the trainings.
        folder: where the pictures stay for the next time; None for a temporary one.
        check_only: without autoencoder and training.

    Raises:
        UserError: a training fails.
    """
    machine = machine_info("cpu", threads)
    torch.set_num_threads(threads)
    with _cores(threads), tempfile.TemporaryDirectory() as scratch:
        place = Path(folder or scratch)
        # every set begins with these pictures, which must not come from the cache
        few = None if check_only else _train(_pictures(place, FEW), Path(scratch), keep_cache=False)
        sets = []
        for size in sizes:
            found = _check(_pictures(place, size), size, Path(scratch))
            sets.append(
                found if check_only else found | _encode_and_train(place / f"{size}", found, Path(scratch), few)
            )
    return {"benchmark": "data", "machine": machine, "train_steps": TRAIN_STEPS, "sets": sets}


def data_text(result: dict) -> str:
    """The table of a result."""
    columns = {
        "pictures": ("pictures", 1, "{:,}"),
        "decode/s": ("decoded_per_second", 1, "{:,.0f}"),
        "check/s": ("checked_per_second", 1, "{:,.0f}"),
        "VAE/s": ("vae_per_second", 1, "{:,.0f}"),
        "encode/s": ("encoded_per_second", 1, "{:,.0f}"),
        "check + encode s": ("data_seconds", 1, "{:.1f}"),
        "first step s": ("first_step_seconds", 1, "{:.1f}"),
        "to that": ("first_step_to_data", 1, "{:.2f}x"),
        "check again s": ("check_again_seconds", 1, "{:.1f}"),
        "first step again s": ("again_seconds", 1, "{:.1f}"),
        "MB of objects": ("object_bytes", 1e-6, "{:,.1f}"),
        "MB more": ("bytes_more", 1e-6, "{:,.0f}"),
        "us a draw": ("seconds_per_draw", 1e6, "{:.1f}"),
    }
    shown = {head: column for head, column in columns.items() if column[0] in result["sets"][0]}
    rows = [
        [text.format(entry[key] * factor if factor != 1 else entry[key]) for key, factor, text in shown.values()]
        for entry in result["sets"]
    ]
    note = (
        f"First step: since the start of a run of {TRAIN_STEPS} steps, less that of one on {FEW} pictures; again: the "
        f"same from the cache. Objects: what Python holds of the set. More: peak memory above that of {FEW} pictures."
    )
    return f"{describe(result['machine'])}\n{text_table(list(shown), rows)}\n{note}"


def _pictures(place: Path, count: int) -> Path:
    """A folder of so many pictures, each rendered from a seed of its own."""
    folder = place / f"{count}"
    folder.mkdir(parents=True, exist_ok=True)
    there = {path.name for path in folder.iterdir()}
    for seed in tqdm(range(count), desc=f"Rendering {count:,} pictures", unit="picture", disable=None):
        if f"{seed:06d}.png" not in there:
            hidden = folder / f".{seed:06d}.png"  # not `replacing`, whose syncing takes longer than the rendering
            render(sample(random.Random(seed))).save(hidden)
            hidden.rename(folder / f"{seed:06d}.png")
    return folder


@contextlib.contextmanager
def _cores(count: int) -> Iterator[None]:
    """No more than so many are used, by this process and those that it starts."""
    before = dict(os.environ)
    os.environ[GIVEN_CORES] = str(count)
    try:
        yield
    finally:
        os.environ.pop(GIVEN_CORES)
        os.environ.update(before)


def _check(folder: Path, size: int, scratch: Path) -> dict:
    """What needs no network: reading, checking, checking again from the cache, the set as objects, draws."""
    cache = scratch / "checked"
    pictures, _ = folder_images(folder, captions=False)
    decode = timed(lambda: sum(1 for _ in read_ahead(read_image, [record.name for record in pictures])))
    check = timed(lambda: usable(pictures, "error", cache=cache))
    again = timed(lambda: usable(folder_images(folder, captions=False)[0], "error", cache=cache))
    tracemalloc.start()
    kept = usable(folder_images(folder, captions=False)[0], "error", cache=cache)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    del kept
    shutil.rmtree(cache)
    return {
        "pictures": size,
        "decoded_per_second": size / decode,
        "checked_per_second": size / check,
        "check_seconds": check,
        "check_again_seconds": again,
        "object_bytes": held,
        "seconds_per_draw": timed(lambda: [image_number(0, n, size) for n in range(DRAWS)]) / DRAWS,
    }


def _encode_and_train(folder: Path, checked: dict, scratch: Path, few: tuple[float, int]) -> dict:
    pipe = open_base("pocket")
    pictures, _ = usable(folder_images(folder, captions=False)[0], "error")
    how = Cropping(DataSettings(cache_dir=str(scratch / "own")), 128, 8, 0)
    images = [to_tensor([crop(record, how)]) for record in pictures[:ALONE]]
    with torch.no_grad():
        vae = timed(lambda: [pipe.vae.encode(image) for image in images]) / len(images)
    encode = timed(lambda: encode_images(pipe.vae, pictures, how))
    shutil.rmtree(scratch / "own")
    data = checked["check_seconds"] + encode
    first, memory = _train(folder, scratch)
    again, _ = _train(folder, scratch, keep_cache=False)
    return {
        "vae_per_second": 1 / vae,
        "encoded_per_second": len(pictures) / encode,
        "data_seconds": data,
        "first_step_seconds": first - few[0],
        "first_step_to_data": (first - few[0]) / data,
        "again_seconds": again - few[0],
        "bytes_more": memory - few[1],
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
        environment = process_environment() | Slot("cpu").environment()  # as all that is measured here
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=errors)
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

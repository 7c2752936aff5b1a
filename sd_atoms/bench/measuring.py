"""Where a measurement was taken, and the clock and memory gauge it was taken with."""

import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

import sd_atoms
from sd_atoms.errors import UserError
from sd_atoms.machine import usable_cores


def check_device(device: str) -> None:
    """Raises a UserError when torch cannot use the device."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no CUDA card; cpu is allowed")


def machine_info(device: str, threads: int) -> dict:
    """CPU name, cores, threads used, torch version, system, and the card's name on CUDA."""
    return {
        "cpu": _cpu_name(),
        "cores": usable_cores(),
        "threads": threads,
        "device": device,
        "card": torch.cuda.get_device_name() if device == "cuda" else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def describe(info: dict) -> str:
    """One line about the machine, for the head of a table."""
    return f"{info['card'] or info['cpu']}, {info['threads']} of {info['cores']} cores, torch {info['torch']}"


def process_environment() -> dict[str, str]:
    """This process's environment, for one that imports the same `sd_atoms`."""
    package_parent = str(Path(sd_atoms.__file__).parents[1])
    search_path = os.pathsep.join(filter(None, [package_parent, os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": search_path}


def now_seconds(device: str) -> float:
    """The clock, read once the device has finished what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(job: Callable[[], Any], device: str = "cpu") -> float:
    """The seconds that a job takes."""
    start = now_seconds(device)
    job()
    return now_seconds(device) - start


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """The median and the extremes."""
    return {"seconds_median": median(seconds), "seconds_min": min(seconds), "seconds_max": max(seconds)}


def ratio_text(ratio: float | None) -> str:
    """1.25 as "1.25×"; a dash where there is nothing to compare with."""
    return "–" if ratio is None else f"{ratio:.2f}×"


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()

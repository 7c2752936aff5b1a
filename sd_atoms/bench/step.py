"""`bench step`: what a training step costs per method, against the frozen floor."""

import json
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from tqdm import tqdm

from sd_atoms.bench.architectures import latent_size
from sd_atoms.bench.classifiers import CLASSIFIERS
from sd_atoms.bench.measuring import check_device, describe, machine_info, process_environment, ratio_text, spread
from sd_atoms.bench.methods import description
from sd_atoms.pipeline.architectures import unet_config
from sd_atoms.report.table import text_table

MEASURES = (
    "Forward and backward pass of one training step (MSE against a fixed random target, seeded random weights and "
    "inputs); the optimiser step is left out for every method, and a warm-up step is not counted. Methods run in "
    "turn, each run in a process of its own. Seconds are over all steps of all rounds; memory is the process's "
    "largest resident set on the CPU, torch's largest allocation on CUDA. The floor trains nothing: it is the cost "
    "of backpropagating through the frozen network to its input."
)


def bench_step(
    arch: str,
    resolution_px: int,
    methods: list[str],
    batch_size: int,
    rounds: int,
    steps: int,
    threads: int,
    device: str,
    dtype: str,
) -> dict:
    """Measures every method, round after round, and returns settings, machine and one entry per method.

    A method that fails is left out of later rounds; its entry says why.

    Raises:
        UserError: architecture, resolution or device cannot be used.
    """
    check_device(device)
    if arch not in CLASSIFIERS:
        latent_size(resolution_px)
    job = {
        "config": CLASSIFIERS[arch] if arch in CLASSIFIERS else unet_config(arch),
        "resolution_px": resolution_px,
        "batch_size": batch_size,
        "steps": steps,
        "threads": threads,
        "device": device,
        "dtype": dtype,
    }
    runs: dict[str, list[dict]] = {method: [] for method in methods}
    failures: dict[str, str] = {}
    with tqdm(total=rounds * len(methods), unit="run", disable=None) as progress:
        for _ in range(rounds):
            for method in methods:
                progress.set_description(method)
                if method not in failures:
                    try:
                        runs[method].append(run_worker({**job, "method": method}))
                    except WorkerFailed as failure:
                        failures[method] = str(failure)
                progress.update()
    settings = {name: value for name, value in job.items() if name != "config"}
    return {
        "benchmark": "step",
        "measures": MEASURES,
        "settings": {"arch": arch, **settings, "rounds": rounds, "methods": methods},
        "machine": machine_info(device, threads),
        "methods": summarise(runs, failures),
    }


class WorkerFailed(Exception):
    """A measuring process ended without a result; the message says how."""


def worker_command(job: dict, result: Path) -> list[str]:
    """The command line of one measuring process."""
    return [sys.executable, "-m", "sd_atoms.bench.worker", json.dumps(job), str(result)]


def run_worker(job: dict) -> dict:
    """`worker.measure(job)` in a new process.

    Raises:
        WorkerFailed: the process failed or was killed.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        done = subprocess.run(
            worker_command(job, result),
            env=process_environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        if done.returncode == 0:
            return json.loads(result.read_text(encoding="utf-8"))
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        raise WorkerFailed(f"ended by {name}" + (", most likely out of memory" if name == "SIGKILL" else ""))
    lines = done.stderr.strip().splitlines()
    raise WorkerFailed(lines[-1] if lines else f"ended with exit code {done.returncode}")


def summarise(runs: dict[str, list[dict]], failures: dict[str, str]) -> list[dict]:
    """One entry per method: medians, extremes, ratios to the floor (None without a floor), and the raw seconds."""
    entries = []
    for method, results in runs.items():
        entry = {"method": method, "description": description(method), "failure": failures.get(method)}
        if method not in failures:
            seconds = [value for result in results for value in result["seconds"]]
            entry |= {
                **spread(seconds),
                "peak_bytes": max(result["peak_bytes"] for result in results),
                "trainable_numbers": results[0]["trainable_numbers"],
                "seconds_by_round": [result["seconds"] for result in results],
            }
        entries.append(entry)
    floor = next((entry for entry in entries if entry["method"] == "floor" and not entry["failure"]), None)
    for entry in entries:
        if not entry["failure"]:
            entry["seconds_to_floor"] = entry["seconds_median"] / floor["seconds_median"] if floor else None
            entry["memory_to_floor"] = entry["peak_bytes"] / floor["peak_bytes"] if floor else None
    return entries


def step_text(result: dict) -> str:
    """The result of `bench_step` as a table with a head line."""
    settings = result["settings"]
    head = (
        f"{settings['arch']}, {settings['resolution_px']} px, batch {settings['batch_size']}, {settings['dtype']}, "
        f"{settings['rounds']} rounds of {settings['steps']} steps; {describe(result['machine'])}"
    )
    header = ["method", "s/step", "min – max", "to floor", "peak GB", "to floor", "trained numbers"]
    rows, failed = [], []
    for entry in result["methods"]:
        if entry["failure"]:
            rows.append([entry["method"], "failed", "–", "–", "–", "–", "–"])
            failed.append(f"{entry['method']} failed: {entry['failure']}")
            continue
        rows.append(
            [
                entry["method"],
                f"{entry['seconds_median']:.3f}",
                f"{entry['seconds_min']:.3f} – {entry['seconds_max']:.3f}",
                ratio_text(entry["seconds_to_floor"]),
                f"{entry['peak_bytes'] / 1e9:.2f}",
                ratio_text(entry["memory_to_floor"]),
                f"{entry['trainable_numbers']:,}",
            ]
        )
    return "\n".join([head, text_table(header, rows), *failed, "Optimiser step left out for every method."])

"""Classifiers compared: methods × seeds on the same images, from a file, and what they ended with.

output_dir: runs/classify/fashion
settings: {model: efficientnet-lite0, data: vtab:fashion_mnist, max_train_steps: 300}   # of every run
methods:
  head:                                     # without `method` the one called like its label
  atoms m=6: {method: atoms, m: 6}
  lora: {rank: 4}
seeds: 0-2
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sd_atoms.classify.config import ClassifyConfig
from sd_atoms.data.prompts import parse_seeds
from sd_atoms.errors import UserError
from sd_atoms.files import safe_name
from sd_atoms.jobs.queue import Job, lock_of
from sd_atoms.report.classifier import ClassifierRow
from sd_atoms.report.rows import mean_of
from sd_atoms.settings import plain_values, read_config, resolve, shown
from sd_atoms.training.run_folder import CONFIG, METRICS, changed_settings

KEYS = ("output_dir", "settings", "methods", "seeds")
FORCED = ("output_dir", "seed", "overwrite", "resume_from_checkpoint")
QUEUE = "queue"


@dataclass(frozen=True)
class ClassifierRun:
    """One training: its name is that of its folder below runs/."""

    name: str
    method: str
    config: ClassifyConfig


def read_runs(path: str, output_dir: str | None = None) -> tuple[Path, list[ClassifierRun]]:
    """The folder of a comparison and its runs.

    Raises:
        UserError: everything that is wrong with the file, in one line.
    """
    entries = read_config(path)
    problems = [f"unknown key {shown(key)}; {', '.join(KEYS)} are known" for key in entries if key not in KEYS]
    shared, methods = entries.get("settings") or {}, entries.get("methods")
    if not isinstance(shared, dict):
        problems.append(f"settings: `name: value` lines are needed, got {shown(shared)}")
    if not isinstance(methods, dict) or not methods:
        problems.append("methods: one or more are needed, each with its settings or nothing behind its label")
    else:
        problems += [f"methods.{label}: {shown(own)} is no settings" for label, own in methods.items()
                     if own is not None and not isinstance(own, dict)]  # fmt: skip
    folder = output_dir or entries.get("output_dir")
    if not isinstance(folder, str):
        problems.append("output_dir is required")
    if problems:
        raise UserError(f"{path}: {'; '.join(problems)}")
    runs, seeds = [], parse_seeds(str(entries.get("seeds", 0)))
    for label, own in methods.items():
        values = shared | {"method": str(label)} | (own or {})
        taken = [name for name in FORCED if name in values]
        if taken:
            problems.append(f"methods.{label}: {', '.join(taken)} is what the comparison decides")
            continue
        for seed in seeds:
            name = f"{safe_name(str(label))}/seed-{seed}"
            given = values | {"seed": seed, "output_dir": str(Path(folder) / "runs" / name)}
            try:
                runs.append(ClassifierRun(name, str(label), resolve(ClassifyConfig, given)))
            except UserError as error:
                problems.append(f"methods.{label}: {error}")
                break
    if len({run.name.lower() for run in runs}) < len(runs):
        problems.append("methods: two labels have one name for their folder")
    if problems:
        raise UserError(f"{path}: {'; '.join(problems)}")
    return Path(folder), runs


def check_folder(folder: Path, runs: list[ClassifierRun]) -> None:
    """Refuses to go on with runs of other settings.

    Raises:
        UserError: a run folder holds such a run.
    """
    for run in runs:
        path = Path(run.config.output.output_dir) / CONFIG
        if path.exists():
            # what was left open is filled in when a run begins
            open_ones = {name for name, value in plain_values(run.config).items() if value is None}
            changed = changed_settings(run.config, path, {*open_ones, "budget", *run.config.method.chosen().settings}
                                       if run.config.method.budget else open_ones)  # fmt: skip
            if changed:
                raise UserError(f"{path.parent}: holds a run of other settings: {'; '.join(changed)}; remove it")


def jobs_of(folder: Path, runs: list[ClassifierRun]) -> list[Job]:
    """Every run as a process of its own, which goes on where it died."""
    made = []
    for run in runs:
        values = {name: value for name, value in plain_values(run.config).items() if value is not None}
        words = [f"--{name}={value}" for name, value in values.items() if not isinstance(value, bool)]
        words += [f"--{name}" for name, value in values.items() if value is True]
        words += [f"--no-{name}" for name, value in values.items() if value is False]
        lock = str(lock_of(folder / QUEUE, run.name))
        command = [sys.executable, "-m", "sd_atoms.jobs.locked", lock, "classify", "train", *words]
        done = Path(run.config.output.output_dir) / METRICS
        made.append(Job(run.name, done, (*command, "--resume_from_checkpoint=latest")))
    return made


def rows_of(runs: list[ClassifierRun]) -> list[ClassifierRow]:
    """A row for each method that has finished runs."""
    rows = []
    for method in dict.fromkeys(run.method for run in runs):
        found = [_metrics(run) for run in runs if run.method == method]
        found = [metrics for metrics in found if metrics is not None]
        if not found:
            continue
        training = [metrics["training"] for metrics in found]
        gaps = [metrics["train"]["accuracy"]["value"] - metrics["test"]["accuracy"]["value"] for metrics in found]
        rows.append(
            ClassifierRow(
                method=method,
                seeds=len(found),
                parameters=training[0]["trained_numbers"],
                head=training[0]["head_numbers"],
                test=mean_of([metrics["test"]["accuracy"] for metrics in found]),
                train=mean_of([metrics["train"]["accuracy"] for metrics in found]),
                gap=mean_of([{"value": gap, "low": None, "high": None} for gap in gaps]),
                calibration=sum(metrics["test"]["calibration_error"] for metrics in found) / len(found),
                seconds=sum(own["seconds"] for own in training) / len(found),
                memory_gb=max(own["peak_memory_bytes"] for own in training) / 1e9,
            )
        )
    return rows


def _metrics(run: ClassifierRun) -> Mapping[str, Any] | None:
    path = Path(run.config.output.output_dir) / METRICS
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: cannot be read ({error})") from error

"""Classifiers compared: tasks × methods × seeds, each an ordinary training, from a file, and what they ended with.

output_dir: runs/classify/fashion
settings: {model: efficientnet-lite0, data: vtab:fashion_mnist, max_train_steps: 300}   # of every run
methods:
  head:                                     # without `method` the one called like its label
  atoms m=6: {method: atoms, m: 6}
  lora: {rank: 4}
seeds: 0-2

`tasks: all` with `data_dir: vtab-1k` in the place of `data` is the same on every task of VTAB.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sd_atoms.classify.config import ClassifyConfig
from sd_atoms.data.prompts import parse_seeds
from sd_atoms.data.vtab import PREFIX, Task, load_tasks
from sd_atoms.errors import UserError
from sd_atoms.files import safe_name
from sd_atoms.jobs.queue import Job, locked_job
from sd_atoms.report.classifier import ClassifierRow
from sd_atoms.report.rows import mean_of
from sd_atoms.settings import plain_values, read_config, resolve, setting, unmet_needs
from sd_atoms.training.run_folder import CONFIG, FREE_ON_RESUME, METRICS, changed_settings
from sd_atoms.values import shown

WHAT = "what is compared"
FORCED = ("output_dir", "seed", "overwrite", "resume_from_checkpoint")
OF_TASKS = ("data", "dataset_dir", "test_data", "keep_head")
QUEUE, CACHE = "queue", "cache"


@dataclass(frozen=True)
class ClassifierExperiment:
    """Settings of a comparison besides `settings` and `methods`."""

    output_dir: str = setting(None, WHAT, "folder of all runs and of the report", required=True)
    seeds: str = setting("0", WHAT, "of the trainings, such as 0-2: as many runs of each method and task")
    tasks: str | None = setting(
        None,
        WHAT,
        "all, natural, specialized, structured, demo, or names with commas between; none = the settings' own data",
    )
    data_dir: str | None = setting(None, WHAT, "folder that holds the folders of the tasks", needs=["tasks"])


@dataclass(frozen=True)
class ClassifierRun:
    """One training: its name is that of its folder below runs/. task: of VTAB, "" where the settings name the data."""

    name: str
    task: str
    method: str
    config: ClassifyConfig


@dataclass(frozen=True)
class ClassifierPlan:
    """A comparison with all its runs. tasks: those of VTAB, none where the settings name the data."""

    folder: Path
    tasks: tuple[Task, ...]
    runs: tuple[ClassifierRun, ...]


def read_classifier_plan(path: str, flags: Mapping[str, Any]) -> ClassifierPlan:
    """A comparison from its file and the flags that win over it; `methods` of these are labels of the file.

    Raises:
        UserError: everything that is wrong, in one line.
    """
    entries, flags = dict(read_config(path)), dict(flags)
    shared, methods, asked = (
        entries.pop("settings", None) or {},
        entries.pop("methods", None),
        flags.pop("methods", None),
    )
    try:
        texts = {name: ",".join(map(str, own)) if isinstance(own, list) else own for name, own in entries.items()}
        texts |= {"seeds": str(texts["seeds"])} if "seeds" in texts else {}
        experiment = resolve(ClassifierExperiment, {**texts, **flags})
        tasks = () if experiment.tasks is None else tuple(load_tasks(experiment.tasks))
        seeds = parse_seeds(experiment.seeds)
    except UserError as error:
        raise UserError(f"{path}: {str(error).replace('--', '')}") from error
    problems = unmet_needs(experiment)
    if not isinstance(shared, dict):
        problems.append(f"settings: `name: value` lines are needed, got {shown(shared)}")
    elif tasks:
        problems += ["data_dir is required with tasks"] if experiment.data_dir is None else []
    if not isinstance(methods, dict) or not methods:
        problems.append("methods: one or more are needed, each with its settings or nothing behind its label")
    else:
        problems += [f"methods.{label}: {shown(own)} is no settings" for label, own in methods.items()
                     if own is not None and not isinstance(own, dict)]  # fmt: skip
        chosen = list(methods) if asked is None else [name.strip() for name in asked.split(",")]
        problems += [f"methods: {name!r}: of {', '.join(map(str, methods))}" for name in chosen if name not in methods]
        methods = {str(label): own for label, own in methods.items() if label in chosen}
    if problems:
        raise UserError(f"{path}: {'; '.join(problems)}")
    if len({safe_name(label).lower() for label in methods}) < len(methods):
        raise UserError(f"{path}: methods: two labels have one name for their folder")
    runs, folder = [], Path(experiment.output_dir)
    for label, own in methods.items():
        values = shared | {"method": label} | (own or {})
        taken = [name for name in (*FORCED, *(OF_TASKS if tasks else ())) if name in values]
        if taken:
            decides = "the comparison decides it" + " by its tasks" * any(name in OF_TASKS for name in taken)
            problems.append(f"methods.{label}: {', '.join(taken)}: {decides}")
            continue
        try:
            runs += [
                _run(folder, task, label, values, experiment.data_dir, seed)
                for task in tasks or (None,)
                for seed in seeds
            ]
        except UserError as error:
            problems.append(f"methods.{label}: {error}")
    if problems:
        raise UserError(f"{path}: {'; '.join(problems)}")
    # task by task, so that one is whole as early as can be
    order = [task.name for task in tasks]
    return ClassifierPlan(folder, tasks, tuple(sorted(runs, key=lambda run: order.index(run.task) if order else 0)))


def _run(
    folder: Path, task: Task | None, label: str, values: Mapping[str, Any], data_dir: str | None, seed: int
) -> ClassifierRun:
    name = f"{safe_name(label)}/seed-{seed}"
    if task is not None:
        name = f"{safe_name(task.name)}/{name}"
        values = values | {"data": f"{PREFIX}{task.name}", "dataset_dir": data_dir}
    cache = {"cache_dir": str(folder / CACHE)}  # all runs look at the same images
    given = cache | values | {"seed": seed, "output_dir": str(folder / "runs" / name)}
    return ClassifierRun(name, "" if task is None else task.name, label, resolve(ClassifyConfig, given))


def check_folder(runs: Sequence[ClassifierRun]) -> None:
    """Refuses to go on with runs of other settings.

    Raises:
        UserError: a run folder holds such a run.
    """
    for run in runs:
        path = Path(run.config.output.output_dir) / CONFIG
        if path.exists():
            # what was left open is filled in when a run begins
            free = {name for name, value in plain_values(run.config).items() if value is None}
            free |= FREE_ON_RESUME - {"max_train_steps", "num_train_epochs"}
            if run.config.method.budget:
                free |= {"budget", *run.config.method.chosen().settings}
            changed = changed_settings(run.config, path, free)
            if changed:
                raise UserError(f"{path.parent}: holds a run of other settings: {'; '.join(changed)}; remove it")


def jobs_of(folder: Path, runs: Sequence[ClassifierRun]) -> list[Job]:
    """Every run as a process of its own, which goes on where it died."""
    made = []
    for run in runs:
        values = {name: value for name, value in plain_values(run.config).items() if value is not None}
        words = [f"--{name}={value}" for name, value in values.items() if not isinstance(value, bool)]
        words += [f"--{name}" for name, value in values.items() if value is True]
        words += [f"--no-{name}" for name, value in values.items() if value is False]
        words = ["classify", "train", *words, "--resume_from_checkpoint=latest"]
        made.append(locked_job(folder / QUEUE, run.name, Path(run.config.output.output_dir) / METRICS, words))
    return made


def rows_of(runs: Sequence[ClassifierRun]) -> list[ClassifierRow]:
    """A row for each method that has finished runs."""
    rows = []
    for method in dict.fromkeys(run.method for run in runs):
        found = [metrics_in(Path(run.config.output.output_dir) / METRICS) for run in runs if run.method == method]
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
                test=_share([metrics["test"]["accuracy"] for metrics in found]),
                train=_share([metrics["train"]["accuracy"] for metrics in found]),
                gap=mean_of([{"value": gap, "low": None, "high": None} for gap in gaps]),
                calibration=sum(metrics["test"]["calibration_error"] for metrics in found) / len(found),
                seconds=sum(own["seconds"] for own in training) / len(found),
                memory_gb=max(own["peak_memory_bytes"] for own in training) / 1e9,
            )
        )
    return rows


def _share(figures: Sequence[Mapping[str, Any]]) -> tuple[float, float | None, float | None]:
    mean, low, high = mean_of(figures)
    return (mean, low, high) if low is None else (mean, max(0.0, low), min(1.0, high))


def metrics_in(path: Path) -> Mapping[str, Any] | None:
    """What a run ended with; None before it has. Raises UserError where the file is broken."""
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        found["training"]["seconds"], found["test"]["accuracy"], found["train"]["accuracy"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot be read as metrics of a run ({error})") from error
    return found

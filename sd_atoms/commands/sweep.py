"""Trains a run per point of a grid of settings, and makes one table of them all."""

import argparse
import dataclasses
import itertools
import json
import os
import re
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sd_atoms.errors import UserError
from sd_atoms.files import replacing, write_json, write_text
from sd_atoms.jobs.queue import Job, QueueSettings, failure_of, locked_job, run_jobs, status_text
from sd_atoms.report.sweep import SCORE_FORMULA, Entry, harmonic_mean, in_order, show, sweep_figure, sweep_markdown
from sd_atoms.settings import add_flags, coerced, fields_of, flat, replaced, resolve, to_yaml
from sd_atoms.training.config import TrainConfig
from sd_atoms.training.optimiser import with_defaults
from sd_atoms.training.run_folder import CONFIG, LOG, METRICS, changed_settings, read_log

TABLE, NUMBERS, PLOT, QUEUE = "sweep.md", "sweep.json", "sweep.png", "queue"
NOT_VARIED = (
    "output_dir",
    "overwrite",
    "resume_from_checkpoint",
    "strict_resume",
    "push_to_hub",
    "hub_model_id",
    "hub_private_repo",
)
FIRST = "first"  # wider than two seeds differ, and three runs a person will wait for
DECIDING = ("method", "peft_config", "optimizer")  # of the usual rate
LONGEST_NAME = 200  # bytes, of a folder; usual disks have 255, and files beside it are called longer
UNSAFE = re.compile(r"[^\w.+-]")  # in the name of a folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what is varied, and every flag of `sd-atoms train`."""
    parser.add_argument(
        "--vary",
        action="append",
        default=[],
        metavar="FIELD=VALUE,VALUE,…",
        help="a setting and its values, such as learning_rate=3e-3,1e-2; several --vary make a grid",
    )
    parser.add_argument(
        "--preset",
        choices=(FIRST,),
        help="first: the learning rate at a third, once and three times what it would be; beside --vary or alone",
    )
    parser.add_argument(
        "--config", metavar="FILE", help="YAML file of settings; flags win over it, and --vary over both"
    )
    add_flags(parser, QueueSettings)
    add_flags(parser, TrainConfig)


def run(arguments: argparse.Namespace) -> None:
    """Trains the grid; each point resolves the settings anew.

    Raises:
        UserError: the words or the settings are wrong, or no point could be finished.
        KeyboardInterrupt: Ctrl-C or SIGTERM; the points that ran have a checkpoint on disk.
    """
    flags = vars(arguments)
    vary, path, preset = parse_vary(flags.pop("vary")), flags.pop("config"), flags.pop("preset")
    queue = resolve(QueueSettings, {name: flags.pop(name) for name in fields_of(QueueSettings) if name in flags})
    if preset is not None:
        if taken := [name for name in ("learning_rate", *DECIDING) if name in vary]:
            raise UserError(f"preset: {taken[0]} decides the learning rate, which it varies itself; leave one out")
        vary = {"learning_rate": usual_rates(flags, path)} | vary
    if not vary:
        raise UserError("vary or preset is required")
    if queue.status:
        points = grid_points(vary, flags, path)
        folder = Path(points[0].config.output.output_dir).parent
        print(status_text([job_of(point) for point in points], folder / QUEUE, _seconds_of, _step_of))
    else:
        sweep(vary, flags, path, queue)


class Point(typing.NamedTuple):
    """A point of the grid: the name of its run folder, its varied values, and all its settings."""

    name: str
    values: dict[str, Any]
    config: TrainConfig


def parse_vary(texts: Sequence[str]) -> dict[str, list[str]]:
    """["learning_rate=3e-3,1e-2", "m1=0,4"] -> the values of each field, in the order given.

    Raises:
        UserError: everything that is wrong with them, in one line.
    """
    vary, problems = {}, []
    for text in texts:
        name, equals, listed = text.partition("=")
        name, values = name.strip().replace("-", "_"), [value.strip() for value in listed.split(",")]
        if not equals or not all(values):
            problems.append(f"{text!r}: field=value,value,… is needed")
        elif name in vary:
            problems.append(f"{name}: all its values go into one --vary")
        elif name in NOT_VARIED:
            problems.append(f"{name}: cannot be varied")
        else:
            vary[name] = values
            problems += _value_problems(name, values)
    if problems:
        count = f"{len(problems)} problems: " if len(problems) > 1 else ""
        raise UserError(f"--vary: {count}{'; '.join(problems)}")
    return vary


def usual_rates(flags: Mapping[str, Any], config_path: str | None) -> list[str]:
    """The learning rate that these settings have, or their method, and a third and three times as much.

    Raises:
        UserError: the settings are wrong, or their method has no usual rate.
    """
    rate = with_defaults(resolve(TrainConfig, dict(flags), config_path)).optimiser.learning_rate
    if not rate:
        raise UserError("preset: there is no learning rate to multiply; give one")
    return [f"{rate / 3:.2g}", repr(rate), f"{rate * 3:.2g}"]


def grid_points(vary: Mapping[str, Sequence[str]], flags: Mapping[str, Any], config_path: str | None) -> list[Point]:
    """The settings of every point: defaults, the file, the flags, then the varied values.

    Raises:
        UserError: the settings are wrong, or do not go together at some points.
    """
    points, problems = [], {}
    for texts in itertools.product(*vary.values()):
        varied = dict(zip(vary, map(_word, texts), strict=True))
        where = ",".join(f"{name}={text}" for name, text in zip(vary, texts, strict=True))
        try:
            config = resolve(TrainConfig, {**flags, **varied}, config_path)
        except UserError as error:
            problems.setdefault(str(error), []).append(where)
            continue
        values = {name: flat(config)[name] for name in vary}
        name = ",".join(f"{field}={UNSAFE.sub('_', show(value))}" for field, value in values.items())
        if len(name.encode()) > LONGEST_NAME:
            problems.setdefault("the name of its folder would be too long", []).append(where)
        output = str(Path(config.output.output_dir) / name)
        points.append(Point(name, values, replaced(config, output_dir=output)))
    if problems:
        everywhere = len(problems) == 1 and not points
        raise UserError(
            "; ".join(text if everywhere else f"{' and '.join(where)}: {text}" for text, where in problems.items())
        )
    names = [point.name for point in points]
    twice = list(dict.fromkeys(name for name in names if names.count(name) > 1))
    if twice:
        raise UserError(f"--vary: several points would have the same folder: {'; '.join(twice)}")
    return points


def sweep(
    vary: Mapping[str, Sequence[str]],
    flags: Mapping[str, Any],
    config_path: str | None = None,
    queue: QueueSettings | None = None,
) -> Path:
    """Trains every point that is not finished yet, and tells of all in sweep.json, sweep.md and sweep.png.

    A point that fails is entered with its reason, and the sweep goes on.

    Args:
        vary: from `parse_vary`.
        flags: the other settings, as parsed.
        config_path: a YAML file of settings, or None.
        queue: how many points at once, and where; None = one.

    Returns:
        the folder; each point is a run folder inside it.

    Raises:
        UserError: the settings are wrong, the folder holds something else, or no point could be finished.
        KeyboardInterrupt: Ctrl-C or SIGTERM; the points that ran have a checkpoint on disk.
    """
    points = grid_points(vary, flags, config_path)
    slots = (queue or QueueSettings()).slots()
    folder = Path(points[0].config.output.output_dir).parent
    check_folder(folder, points)
    grid = {name: list(dict.fromkeys(point.values[name] for point in points)) for name in vary}
    jobs = [job_of(point) for point in points]
    if points[0].config.output.overwrite:
        for job in jobs:
            job.done.unlink(missing_ok=True)
    for point in points:
        write_text(_settings_path(point), to_yaml(point.config))

    def told(text: str) -> None:
        print(text, flush=True)
        write_report(folder, entries_of(points, folder), grid)

    print(f"{len(points)} points, {sum(job.done.exists() for job in jobs)} of them finished already", flush=True)
    failures = run_jobs(jobs, folder / QUEUE, slots, told)
    if len(failures) == len(points):
        raise UserError(f"{folder}: no point could be finished; the first: {next(iter(failures.values()))}")
    entries = entries_of(points, folder)
    write_report(folder, entries, grid)
    best = max((entry for entry in entries if entry.score is not None), key=lambda entry: entry.score, default=None)
    print(f"\n{folder / TABLE}: {len(entries)} points" + (f", {len(failures)} failed" if failures else ""))
    if best is not None:
        print(f"Best score: {best.score:.4f} at {best.name}")
    return folder


def job_of(point: Point) -> Job:
    """A point as a process of its own, which goes on from its checkpoint if it has one."""
    run = Path(point.config.output.output_dir)
    again = ["--overwrite"] if point.config.output.overwrite else ["--resume_from_checkpoint", "latest"]
    words = ["train", "--config", str(_settings_path(point)), *again]
    return locked_job(run.parent / QUEUE, point.name, run / METRICS, words)


def entries_of(points: Sequence[Point], folder: Path) -> list[Entry]:
    """What there is to say of the points that have ended."""
    entries = []
    for point in points:
        job = job_of(point)
        if job.done.exists():
            entries.append(read_entry(point))
        elif failure := failure_of(folder / QUEUE, point.name):
            entries.append(Entry(point.name, point.values, failure=failure))
    return entries


def check_folder(folder: Path, points: Sequence[Point]) -> None:
    """Refuses, before anything is trained, to sweep in several processes or into another run or sweep.

    Raises:
        UserError: so it is.
    """
    settings = points[0].config
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("sweep starts its runs itself; start it without accelerate launch")
    if settings.output.resume_from_checkpoint:
        raise UserError("resume_from_checkpoint: a sweep goes on by itself; leave it out")
    if settings.hub.push_to_hub:
        raise UserError("push_to_hub: not in a sweep; `sd-atoms share` uploads the run that you choose")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output_dir: {folder} is a file")
    if (folder / CONFIG).exists():
        raise UserError(f"output_dir: {folder} holds a run, and a sweep needs a folder of its own; choose another")
    if settings.output.overwrite:
        return
    changed = [f"{point.name} ({'; '.join(changes)})" for point in points if (changes := changes_of(point))]
    if changed:
        raise UserError(
            f"output_dir: {folder} holds runs with other settings: {', '.join(changed)}; pass --overwrite to replace "
            "them, or another --output_dir"
        )


def changes_of(point: Point) -> list[str]:
    """How the run in a point's folder differs from what the point would be; nothing where there is no run. The folder
    may have been moved."""
    path = Path(point.config.output.output_dir) / CONFIG
    return (
        changed_settings(with_defaults(point.config), path, {"output_dir", "strict_resume"}) if path.exists() else []
    )


def read_entry(point: Point) -> Entry:
    """The numbers of a finished run.

    Raises:
        UserError: its metrics.json cannot be read.
    """
    folder = Path(point.config.output.output_dir)
    try:
        metrics = json.loads((folder / METRICS).read_text(encoding="utf-8"))
        training, clip = metrics["training"], metrics.get("clip", {}).get("adapted", {})
        trained = sum(training[f"trained_{kind}numbers"] for kind in ("", "token_", "text_"))
        validated = {e["step"]: e["validation_loss"] for e in read_log(folder / LOG) if "validation_loss" in e}
        last = training["kept_step"] or max(validated, default=None)
        return Entry(
            point.name,
            point.values,
            steps=training["steps"],
            seconds=training["seconds"],
            last_loss=training["last_loss"],
            validation_loss=validated.get(last),
            **{key: clip.get(key) for key in ("image", "text", "match", "diversity")},
            trained_numbers=trained,
            score=harmonic_mean(clip.get("image"), clip.get("text")),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / METRICS}: cannot be read ({error!r}); remove it to finish the run anew") from error


def write_report(folder: Path, entries: Sequence[Entry], grid: Mapping[str, Sequence[Any]]) -> None:
    """sweep.json, sweep.md and, where a number is varied and something scored, sweep.png."""
    points = [dataclasses.asdict(entry) for entry in in_order(entries)]
    write_json(folder / NUMBERS, {"vary": grid, "score": SCORE_FORMULA, "points": points})
    write_text(folder / TABLE, sweep_markdown(entries, grid))
    figure = sweep_figure(entries, grid)
    if figure is None:
        (folder / PLOT).unlink(missing_ok=True)
        return
    with replacing(folder / PLOT) as temporary:
        figure.savefig(temporary, format="png")


def _value_problems(name: str, values: Sequence[str]) -> list[str]:
    """What is wrong with each value of a field; of an unknown field, only that."""
    problems, seen = [], []
    for value in values:
        try:
            made = coerced(TrainConfig, name, _word(value))
        except ValueError as error:
            problems.append(f"{name}: {error}" if name in fields_of(TrainConfig) else str(error))
            continue
        if made in seen:
            problems.append(f"{name}: {value} is there twice")
        seen.append(made)
    return list(dict.fromkeys(problems))


def _word(text: str) -> str | bool:
    """A value as a flag would give it."""
    return {"true": True, "false": False}.get(text.lower(), text)


def _settings_path(point: Point) -> Path:
    run = Path(point.config.output.output_dir)
    return run.parent / QUEUE / f"{run.name}.yaml"


def _seconds_of(job: Job) -> float | None:
    try:
        return json.loads(job.done.read_text(encoding="utf-8"))["training"]["seconds"]
    except (ValueError, KeyError, TypeError):
        return None  # the table refuses such a file


def _step_of(job: Job) -> str:
    log = read_log(job.done.parent / LOG)
    return f"step {log[-1]['step']}" if log else ""

"""What the finished runs of an experiment left, and whether they can stand side by side."""

import contextlib
import json
import shutil
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from sd_atoms.errors import UserError
from sd_atoms.files import write_json
from sd_atoms.jobs.plan import PRETRAINED, Plan, Run, Runs
from sd_atoms.jobs.queue import Taken, failure_of, held
from sd_atoms.report.rows import selection
from sd_atoms.settings import read_yaml
from sd_atoms.training.config import TrainConfig
from sd_atoms.training.optimiser import with_defaults
from sd_atoms.training.run_folder import ADAPTER, CONFIG, LOG, METRICS, changed_settings, read_log

SCORES, DRAWN, QUEUE = "scores.json", "drawn", "queue"


def read_scores(path: Path) -> dict[str, Any]:
    """What a finished run says.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        scores = json.loads(path.read_text(encoding="utf-8"))
        if not {"name", "stage", "concept", "scored_by", "networks"} <= scores.keys():
            raise ValueError("parts are missing")
        return scores
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); remove it to score the run anew") from error


def selection_score(plan: Plan, run: Run) -> float | None:
    """What a rate is chosen by; None where a run has no likeness or no text."""
    path = plan.run_folder(run) / SCORES
    networks = read_scores(path)["networks"] if path.exists() else {}
    fidelity, text = judges(plan, networks)
    if text is None:
        return None
    try:
        figures = networks[fidelity]["figures"]["image"], networks[text]["figures"]["text"]
    except KeyError as error:
        raise UserError(f"{path}: was scored by other networks or metrics; remove it to score the run anew") from error
    return selection(*(figure["value"] for figure in figures))


def judges(plan: Plan, networks: Mapping[str, Any]) -> tuple[str, str | None]:
    """The networks that the likeness and the text are told by; None where none knows texts."""
    knowing = [name for name, scores in networks.items() if "text" in scores["figures"]]
    return plan.experiment.fidelity or plan.networks[0], plan.experiment.text or next(iter(knowing), None)


def check_same(config: TrainConfig, folder: Path, any_rate: bool = False) -> None:
    """Refuses to go on with a run of other settings.

    Raises:
        UserError: the folder holds one.
    """
    free = {"output_dir", "strict_resume", "resolution", "cache_dir"}
    if any_rate:
        free |= {"learning_rate"} | (
            {"token_learning_rate"} if config.method.chosen().main_kinds == ("row",) else set()
        )
    if config.method.budget is not None:
        free |= {"budget", *config.method.chosen().settings}  # chosen anew, the same for the same base
    changed = changed_settings(config, folder / CONFIG, free) if (folder / CONFIG).exists() else []
    if changed:
        raise UserError(
            f"{folder}: holds a run of other settings ({'; '.join(changed)}); remove it, or name another output_dir"
        )


def check_scored_as_planned(plan: Runs) -> None:
    """Refuses finished runs whose pictures or scores are other ones than the experiment now asks for.

    Raises:
        UserError: there are such.
    """
    for run in plan.runs:
        path = plan.run_folder(run) / SCORES
        if not path.exists():
            continue
        by = read_scores(path)["scored_by"]
        wanted = plan.drawn_by(run) | {"metrics": plan.metrics}
        changed = [name for name, value in wanted.items() if by.get(name) != value]
        changed += ["networks"] if list(by.get("networks", ())) != plan.networks else []
        if changed:
            raise UserError(
                f"{path}: was drawn or scored with other {', '.join(changed)}; remove it and {DRAWN}/ beside it to do "
                "that anew, or name another output_dir"
            )


def check_rates_settled(plan: Plan, run: Run) -> None:
    """Refuses to choose a rate while runs that choose it are still to be done.

    Raises:
        UserError: so it is, or what the run needs is not done.
    """
    for name in (*run.needs, *run.rate_runs):
        if not (plan.run_folder(plan.named(name)) / SCORES).exists() and (
            name in run.needs or not failure_of(plan.folder / QUEUE, name)
        ):
            raise UserError(f"{run.name}: needs {name}, which is not done; run that first")


def check_scored_alike(paths: Sequence[Path]) -> None:
    """Refuses to set runs side by side that were scored otherwise, each kind of run for itself.

    Raises:
        UserError: base, photos, prompts, sampling, networks or metrics differ; the line names one of each.
    """
    first: dict[tuple, tuple[Path, dict]] = {}
    for path in paths:
        scores = read_scores(path)
        known, by = first.setdefault((scores["stage"] == "rate", scores["concept"]), (path, scores["scored_by"]))
        changed = [key for key, value in scores["scored_by"].items() if by.get(key) != value]
        if changed:
            raise UserError(f"{path}: cannot stand beside {known}: {', '.join(changed)} differ")


def merge_from(plan: Plan, other: Path) -> None:
    """Copies the finished runs of another folder of the same experiment that are missing here.

    Raises:
        UserError: it holds none, or they were trained or scored otherwise.
    """
    found = [run for run in plan.runs if (other / "runs" / run.name / SCORES).exists()]
    if not found:
        raise UserError(f"merge: {other}: holds no finished run of this experiment")
    here = [plan.run_folder(run) / SCORES for run in plan.runs if (plan.run_folder(run) / SCORES).exists()]
    check_scored_alike([*here, *(other / "runs" / run.name / SCORES for run in found)])
    for run in found:
        source, folder = other / "runs" / run.name, plan.run_folder(run)
        if run.stage != PRETRAINED:
            check_same(with_defaults(plan.config(run)), source, bool(run.rate_runs))
        if (folder / SCORES).exists():
            continue
        with contextlib.suppress(Taken), held(plan.folder / QUEUE, run.name):  # taken: another works at it
            if not (folder / SCORES).exists():
                shutil.copytree(source, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(SCORES))
                write_json(folder / SCORES, read_scores(source / SCORES))  # last: it says that the run is whole


def collected(plan: Plan) -> list[dict[str, Any]]:
    """All that finished runs left, in the order of the plan.

    Raises:
        UserError: they were scored otherwise, or a file cannot be read.
    """
    done = [run for run in plan.runs if (plan.run_folder(run) / SCORES).exists()]
    check_scored_alike([plan.run_folder(run) / SCORES for run in done])
    rates: dict[str, tuple[str, float]] = {}
    for run in done:
        if run.stage == "scored":
            rate = read_scores(plan.run_folder(run) / SCORES)["learning_rate"]
            other, known = rates.setdefault(run.method, (run.name, rate))
            if known != rate:
                raise UserError(
                    f"{run.name} was trained at a rate of {rate:g}, {other} at {known:g}; remove one of them"
                )
    found = []
    for run in done:
        folder = plan.run_folder(run)
        entry = {"scores": read_scores(folder / SCORES), "folder": folder, "drawn": folder / DRAWN}
        if run.stage != PRETRAINED:
            if not (folder / METRICS).exists():
                raise UserError(f"{folder / METRICS}: is gone; remove {SCORES} beside it to finish the run anew")
            log = read_log(folder / LOG)
            entry |= {
                "training": _read(folder / METRICS)["training"],
                "environment": _read(folder / "env.json"),
                "settings": read_yaml(folder / CONFIG),
                "peft_config": _read(folder / ADAPTER / "adapter_config.json"),
                "adapter_bytes": sum(path.stat().st_size for path in folder.glob("*.safetensors")),
                "losses": [(line["step"], line["loss"]) for line in log],
                "steady_seconds": steady_seconds([line["seconds"] for line in log]),
            }
        found.append(entry)
    return found


def steady_seconds(clock: Sequence[float]) -> float | None:
    """What a training's steps take at their median, so that no pause and no busy hour of the machine counts.

    clock: seconds since the start at the end of each step. None where the log is gone or, of an old version, has none.
    """
    if not any(clock):
        return None
    took = [end - start for start, end in pairwise([0.0, *clock])]
    return median(took) * len(took)


def _read(path: Path) -> Any:
    """A JSON file of a run; None where there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    except ValueError as error:
        raise UserError(f"{path}: cannot be read ({error})") from error

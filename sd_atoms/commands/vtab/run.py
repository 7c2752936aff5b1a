"""Tunes the base on image sets by every method, generates, scores against the test splits, and shows it on one page.

Each run is an ordinary run folder below output_dir. Stopped at any moment, the same command goes on; a finished run is
never repeated (docs/vtab.md, docs/cluster.md).
"""

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from sd_atoms.commands import runs
from sd_atoms.commands.classify import compare
from sd_atoms.errors import UserError
from sd_atoms.evaluation.networks import open_network
from sd_atoms.files import write_text
from sd_atoms.jobs.classifiers import ClassifierExperiment
from sd_atoms.jobs.cluster import ClusterSettings, do_jobs
from sd_atoms.jobs.experiment import FORCED
from sd_atoms.jobs.plan import PRETRAINED, Run
from sd_atoms.jobs.queue import HOW, Job, QueueSettings, status_text
from sd_atoms.jobs.results import QUEUE
from sd_atoms.jobs.set_cost import plan_text
from sd_atoms.jobs.set_drawing import draw_set, reference_of, score_set
from sd_atoms.jobs.set_report import set_comparison
from sd_atoms.jobs.sets import SetExperiment, SetPlan, read_set_plan
from sd_atoms.report.sets import write_set_report
from sd_atoms.settings import (
    add_flags,
    fields_of,
    read_config,
    replaced,
    resolve,
    section,
    setting,
    to_yaml,
    unmet_needs,
)

KINDS = ("generate", "classify")


@dataclass(frozen=True)
class Working:
    """How an experiment is worked through."""

    kind: str | None = setting(
        None,
        HOW,
        "what is trained on each data set, Stable Diffusion or classifiers; none = classifiers where the file's "
        "settings name a model",
        choices=KINDS,
    )
    queue: QueueSettings = section(QueueSettings)
    cluster: ClusterSettings = section(ClusterSettings)
    dry_run: bool = setting(False, HOW, "only list the runs, and what they will cost")
    run: str | None = setting(
        None, HOW, "do this one run here and now, as every executor does", needs=["kind=generate"]
    )
    report: bool = setting(True, HOW, "write the report at the end")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds every flag."""
    parser.usage = "%(prog)s --config FILE [--FLAG VALUE …]"
    parser.add_argument("--config", metavar="FILE", default="", help="YAML file of the experiment, or a packaged one")
    parser.add_argument(
        "--methods", default=argparse.SUPPRESS, help="of the file, or, of kind=generate, any by name; comma-separated"
    )
    add_flags(parser, Working)
    add_flags(parser, SetExperiment)


def run(arguments: argparse.Namespace) -> None:
    """Works through an experiment, or says what there is to say of it.

    Raises:
        UserError: the file or the flags are wrong, or no run could be finished.
        KeyboardInterrupt: Ctrl-C or SIGTERM; the same command goes on.
        SystemExit: 1, if a run failed.
    """
    flags = vars(arguments)
    file = flags.pop("config")
    working = resolve(Working, {name: flags.pop(name) for name in fields_of(Working) if name in flags})
    if working.kind is None:
        working = replaced(working, kind=_kind_of(file))
    if problems := unmet_needs(working):
        raise UserError("; ".join(problems))
    if working.kind == "classify":
        classify(file, flags, working)
        return
    plan = read_set_plan(file, flags)
    if working.run is not None:
        runs.run_one(plan, working.run, do_run)
    elif working.dry_run:
        print(plan_text(plan))
    elif working.queue.status:
        jobs = jobs_of(plan, file, flags)
        print(status_text(jobs, plan.folder / QUEUE, runs.seconds_of, lambda job: runs.step_of(plan, job)))
    else:
        check_plan(plan)
        write_text(plan.folder / "experiment.yaml", experiment_yaml(plan))
        jobs, words = jobs_of(plan, file, flags), (*command(file, flags), "--no-report")
        failed = do_jobs(jobs, plan.folder / QUEUE, working.queue.slots(), working.cluster, words)
        if working.report:
            report(plan, failed)
        if failed:
            raise SystemExit(1)


def _kind_of(file: str) -> str:
    shared = read_config(file).get("settings") if file else None
    return "classify" if isinstance(shared, dict) and "model" in shared else "generate"


def classify(file: str, flags: Mapping[str, Any], working: Working) -> None:
    """The same sets with classifiers: as `classify compare`; raises as `run`."""
    known = {*fields_of(ClassifierExperiment), "methods"}
    foreign = [name for name, value in flags.items() if name not in known and value is not None]
    if foreign:
        raise UserError(f"{', '.join(foreign)}: of kind=generate alone")
    if not file:
        raise UserError("config is required with kind=classify, such as configs/vtab/classify_demo.yaml")
    compare.compare(file, flags, working, (*command(file, flags), "--kind=classify"))


def check_plan(plan: SetPlan) -> None:
    """Refuses, before anything is trained, what no run could end with: data or networks that are not there, folders
    that hold something else.

    Raises:
        UserError: so it is.
    """
    for run in plan.runs:
        if run.stage == PRETRAINED:  # one of each set
            reference_of(plan, run)
    runs.check_runs(plan)
    for name in plan.networks:
        open_network(name)


def do_run(plan: SetPlan, run: Run) -> None:
    """Trains, generates and scores one run, as far as that is not done; raises as `runs.finish`."""

    def scored(config, accelerator):
        reference = reference_of(plan, run)
        generated = draw_set(plan, run, config, reference, accelerator)
        return score_set(plan, run, config, generated, reference, accelerator)

    runs.finish(plan, run, scored)


def report(plan: SetPlan, failed: Mapping[str, str]) -> None:
    """Writes the report of all runs that are done, and says where it is.

    Raises:
        UserError: none is, or they cannot stand side by side.
    """
    comparison, folder = set_comparison(plan, failed), plan.folder / "report"
    if not comparison.runs:
        raise UserError(f"{plan.folder}: no run could be finished; the first: {next(iter(failed.values()))}")
    results = write_set_report(comparison, folder)
    print("\n" + "\n".join(results["sentences"]))
    print(f"{folder / 'index.html'} shows it; {folder / 'table.md'} has the numbers")
    for name, why in failed.items():
        print(f"failed: {name}: {why}")


def jobs_of(plan: SetPlan, file: str, flags: Mapping[str, Any]) -> list[Job]:
    """Every run as a process of its own."""
    return runs.jobs_of(plan, command(file, flags))


def command(file: str, flags: Mapping[str, Any]) -> tuple[str, ...]:
    """The words that start this experiment again, on any machine with the same folders."""
    words = [sys.executable, "-m", "sd_atoms", "vtab", "run", f"--config={file}"]
    return (*words, *(f"--{name}={value}" for name, value in flags.items() if value is not None))


def experiment_yaml(plan: SetPlan) -> str:
    """The experiment with everything filled in, for the record."""
    shared = {key: value for key, value in plan.runs[0].values.items() if key not in FORCED}
    for name in ("dataset_name", "dataset_dir"):
        del shared[name]
    parts = {"settings": shared, "methods": dict(plan.methods)}
    return to_yaml(plan.experiment) + yaml.safe_dump(parts, sort_keys=False, allow_unicode=True, width=119)

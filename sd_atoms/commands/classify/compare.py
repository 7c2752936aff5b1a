"""Trains classifiers by several methods on the same images and seeds, and sets their accuracy against their size.

Accuracy, and the gap between training and test, against the number of trained parameters: as a table and as the
paper's Figures 6 and 7; on tasks of VTAB, as Table 6. Stopped at any moment, the same command goes on; started twice,
the work is divided.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sd_atoms.commands.classify.train import is_here, opened_set
from sd_atoms.data.labelled import task_folder
from sd_atoms.data.vtab import Task
from sd_atoms.errors import UserError, refuse
from sd_atoms.files import replacing, write_json, write_text
from sd_atoms.jobs.classifiers import (
    QUEUE,
    ClassifierExperiment,
    ClassifierPlan,
    check_folder,
    jobs_of,
    metrics_in,
    read_classifier_plan,
    rows_of,
)
from sd_atoms.jobs.cluster import ClusterSettings, do_jobs
from sd_atoms.jobs.queue import HOW, Job, QueueSettings, status_text
from sd_atoms.progress import followed
from sd_atoms.report.classifier import accuracy_figure, rows_csv, rows_markdown
from sd_atoms.report.classifier_tasks import group_means, mean_rows, tasks_csv, tasks_markdown
from sd_atoms.settings import add_flags, fields_of, resolve, section, setting, unmet_needs
from sd_atoms.training.run_folder import METRICS

UNUSABLE = "images that cannot be used:"


@dataclass(frozen=True)
class Working:
    """How a comparison is worked through."""

    queue: QueueSettings = section(QueueSettings)
    cluster: ClusterSettings = section(ClusterSettings)
    dry_run: bool = setting(False, HOW, "only list the runs, and check the images that are here")
    report: bool = setting(True, HOW, "write the report at the end")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the file, and every flag."""
    parser.usage = "%(prog)s FILE [--FLAG VALUE …]"
    parser.add_argument("file", metavar="FILE", help="YAML file of the comparison, or a packaged one")
    parser.add_argument("--methods", default=argparse.SUPPRESS, help="only these of the file; comma-separated")
    add_flags(parser, Working)
    add_flags(parser, ClassifierExperiment)


def run(arguments: argparse.Namespace) -> None:
    """Works through a comparison, or says what there is to say of it.

    Raises:
        UserError: the file is wrong, or a folder holds something else.
        SystemExit: 1, if a run failed.
        KeyboardInterrupt: Ctrl-C or SIGTERM; the same command goes on.
    """
    flags = vars(arguments)
    file = flags.pop("file")
    working = resolve(Working, {name: flags.pop(name) for name in fields_of(Working) if name in flags})
    if problems := unmet_needs(working):
        raise UserError("; ".join(problems))
    words = [sys.executable, "-m", "sd_atoms", "classify", "compare", file]
    words += [f"--{name}={value}" for name, value in flags.items() if value is not None]
    compare(file, flags, working, words)


def compare(file: str, flags: Mapping[str, Any], working: Working, words: Sequence[str]) -> None:
    """`run`, and `sd-atoms vtab run --kind classify`.

    Args:
        file: of the comparison.
        flags: that win over it.
        working: how and where; that of `vtab run` has the same fields and more.
        words: that start it again, for workers elsewhere.

    Raises:
        UserError, SystemExit, KeyboardInterrupt: as `run`.
    """
    plan = read_classifier_plan(file, flags)
    jobs = jobs_of(plan.folder, plan.runs)
    if working.dry_run:
        for own in plan.runs:
            loop = own.config.loop
            length = f"{loop.num_train_epochs} epochs" if loop.num_train_epochs else f"{loop.max_train_steps} steps"
            print(f"{own.name}: {length}")
        print(f"{len(plan.runs)} runs")
        wrong, absent = image_problems(plan)
        for problem in absent:
            print(f"not here: {problem}")
        refuse(wrong, UNUSABLE)
        return
    if working.queue.status:
        print(status_text(jobs, plan.folder / QUEUE, _seconds, lambda job: ""))
        return
    check_folder(plan.runs)
    wrong, absent = image_problems(plan)  # said once, before any run
    refuse([*wrong, *absent], UNUSABLE)
    failed = do_jobs(jobs, plan.folder / QUEUE, working.queue.slots(), working.cluster, [*words, "--no-report"])
    if working.report:
        # of all methods of the file, those that another call has done too
        report(read_classifier_plan(file, {**flags, "methods": None}), failed)
    if failed:
        raise SystemExit(1)


def image_problems(plan: ClassifierPlan) -> tuple[list[str], list[str]]:
    """What is wrong with the images of all runs that are not done: of those that are here, and where none are.

    Lists, labels and the presence of files are looked at, no image is decoded.
    """
    sources, wrong, absent, lacking = {}, [], [], []
    for run in plan.runs:
        data = run.config.data
        if not (Path(run.config.output.output_dir) / METRICS).exists():
            # another seed splits the same images
            sources.setdefault((data.data, data.dataset_dir, data.test_data, data.test_share), run)
    tasks = {task.name: task for task in plan.tasks}
    for run in followed(sources.values(), len(sources), "Checking images", "data set"):
        data = run.config.data
        try:
            if run.task and not _is_there(tasks[run.task], data.dataset_dir):
                lacking.append(run.task)
            else:
                opened_set(run.config)
        except UserError as error:
            (wrong if is_here(run.config) else absent).append(str(error))
    if lacking:
        place = plan.runs[0].config.data.dataset_dir
        problem = f"data_dir: {place}: lacks {len(lacking)} of {len(tasks)} tasks: {', '.join(lacking)}"
        (wrong if is_here(plan.runs[0].config) else absent).append(problem)
    return wrong, absent


def _is_there(task: Task, place: str) -> bool:
    try:
        task_folder(task, place)
    except UserError:
        return False
    return True


def report(plan: ClassifierPlan, failed: Mapping[str, str]) -> None:
    """Writes tables and figures of all runs that are done."""
    network, folder = plan.runs[0].config.network.model, plan.folder / "report"
    if plan.tasks:
        by_task = {task.name: rows_of([run for run in plan.runs if run.task == task.name]) for task in plan.tasks}
        groups = {task.name: task.group for task in plan.tasks}
        rows, title = mean_rows(by_task, groups), f"VTAB, {network}"
        markdown, table = tasks_markdown(title, by_task, groups, failed), tasks_csv(by_task)
        results = {"tasks": {name: [asdict(row) for row in own] for name, own in by_task.items()}}
        results["means"] = group_means(by_task, groups)
    else:
        rows, title = rows_of(plan.runs), f"{plan.runs[0].config.data.data}, {network}"
        markdown, table = rows_markdown(title, rows, failed) if rows else "", rows_csv(rows)
        results = {"rows": [asdict(row) for row in rows]}
    if not (any(by_task.values()) if plan.tasks else rows):
        return
    write_text(folder / "table.md", markdown)
    write_text(folder / "table.csv", table)
    write_json(folder / "results.json", {**results, "failed": dict(failed)})
    notes = []
    if rows:  # of tasks, the means of methods that are done with all
        figure, notes = accuracy_figure(title, rows)
        with replacing(folder / "accuracy.png") as temporary:
            figure.savefig(temporary, format="png")
    print("\n".join(["", markdown, f"{folder} has it{', with accuracy.png' * bool(rows)}", *notes]))


def _seconds(job: Job) -> float | None:
    metrics = metrics_in(job.done)
    return None if metrics is None else metrics["training"]["seconds"]

"""Trains classifiers by several methods on the same images and seeds: accuracy and the gap between training and test
against the number of trained parameters, as a table and as the paper's Figures 6 and 7.

Stopped at any moment, the same command goes on; started twice, the work is divided.
"""

import argparse
import json
from dataclasses import asdict, dataclass

from sd_atoms.files import replacing, write_json, write_text
from sd_atoms.jobs.classifiers import QUEUE, check_folder, jobs_of, read_runs, rows_of
from sd_atoms.jobs.queue import HOW, QueueSettings, run_jobs, status_text
from sd_atoms.report.classifier import accuracy_figure, rows_csv, rows_markdown
from sd_atoms.settings import add_flags, fields_of, resolve, section, setting


@dataclass(frozen=True)
class Working:
    """How a comparison is worked through."""

    queue: QueueSettings = section(QueueSettings)
    output_dir: str | None = setting(None, HOW, "where it goes; none = as the file says")
    dry_run: bool = setting(False, HOW, "only list the runs")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the file, and every flag."""
    parser.usage = "%(prog)s FILE [--FLAG VALUE …]"
    parser.add_argument("file", metavar="FILE", help="YAML file of the comparison, or a packaged one")
    add_flags(parser, Working)


def run(arguments: argparse.Namespace) -> None:
    """Works through a comparison, or says what there is to say of it.

    Raises:
        UserError: the file is wrong, or a folder holds something else.
        SystemExit: 1, if a run failed.
        KeyboardInterrupt: Ctrl-C or SIGTERM; the same command goes on.
    """
    flags = vars(arguments)
    working = resolve(Working, {name: flags[name] for name in fields_of(Working) if name in flags})
    folder, runs = read_runs(flags["file"], working.output_dir)
    jobs = jobs_of(folder, runs)
    if working.dry_run:
        for own in runs:
            loop = own.config.loop
            length = f"{loop.num_train_epochs} epochs" if loop.num_train_epochs else f"{loop.max_train_steps} steps"
            print(f"{own.name}: {length}")
        return
    if working.queue.status:
        print(status_text(jobs, folder / QUEUE, _seconds, lambda job: ""))
        return
    check_folder(folder, runs)
    failed = run_jobs(jobs, folder / QUEUE, working.queue.slots(), lambda text: print(text, flush=True))
    rows, report = rows_of(runs), folder / "report"
    if rows:
        title = f"{runs[0].config.data.data}, {runs[0].config.network.model}"
        write_text(report / "table.md", rows_markdown(title, rows, failed))
        write_text(report / "table.csv", rows_csv(rows))
        write_json(report / "results.json", {"rows": [asdict(row) for row in rows], "failed": failed})
        with replacing(report / "accuracy.png") as temporary:
            accuracy_figure(title, rows).savefig(temporary, format="png")
        print(f"\n{rows_markdown(title, rows, failed)}\n{report} has it, with accuracy.png")
    if failed:
        raise SystemExit(1)


def _seconds(job) -> float | None:
    return json.loads(job.done.read_text(encoding="utf-8"))["training"].get("seconds") if job.done.exists() else None

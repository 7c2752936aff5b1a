"""Trains methods on concepts alike, scores them alike, and shows them on one page.

FILE says what is compared: settings of all runs, concepts, methods, seeds (docs/compare.md). Each run is an ordinary
run folder below output_dir. Stopped at any moment, the same command goes on; started twice, on one machine or on
several that share the folder, the work is divided.
"""

import argparse
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sd_atoms.commands import runs
from sd_atoms.errors import UserError, plural
from sd_atoms.evaluation.networks import open_network
from sd_atoms.files import write_text
from sd_atoms.jobs.drawing import check_surroundings, draw_run, score_drawn
from sd_atoms.jobs.experiment import FORCED, read_plan
from sd_atoms.jobs.plan import PRETRAINED, Experiment, Plan, Run
from sd_atoms.jobs.queue import HOW, Job, QueueSettings, run_jobs, status_text
from sd_atoms.jobs.results import QUEUE, SCORES, collected, judges, merge_from, read_scores
from sd_atoms.report.comparison import Comparison, report_text, write_report
from sd_atoms.settings import add_flags, fields_of, resolve, section, setting, to_yaml, unmet_needs
from sd_atoms.sources import public_name


@dataclass(frozen=True)
class Working:
    """How an experiment is worked through."""

    queue: QueueSettings = section(QueueSettings)
    dry_run: bool = setting(False, HOW, "only list the runs and their cost")
    step_seconds: float | None = setting(
        None,
        HOW,
        "seconds of a training step, for the hours that dry_run tells before a run is done",
        low=0,
        needs=("dry_run",),
    )
    image_seconds: float | None = setting(
        None, HOW, "seconds of drawing a picture, for the same", low=0, needs=("dry_run",)
    )
    run: str | None = setting(None, HOW, "do this one run here and now, for a scheduler's jobs")
    merge: str | None = setting(
        None, HOW, "other folders of the same experiment, comma-separated; their finished runs are copied"
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the file, and every flag."""
    parser.usage = "%(prog)s FILE [--FLAG VALUE …]"
    parser.add_argument("file", metavar="FILE", help="YAML file of the experiment, or a packaged one")
    add_flags(parser, Working)
    add_flags(parser, Experiment)


def run(arguments: argparse.Namespace) -> None:
    """Works through an experiment, or says what there is to say of it.

    Raises:
        UserError: the file or the flags are wrong, or no run could be finished.
        KeyboardInterrupt: Ctrl-C or SIGTERM; the same command goes on.
    """
    flags = vars(arguments)
    file = flags.pop("file")
    working = resolve(Working, {name: flags.pop(name) for name in fields_of(Working) if name in flags})
    if problems := unmet_needs(working):
        raise UserError("; ".join(problems))
    if not (working.run or working.dry_run or working.queue.status):
        results, folder = work_through(file, flags, working)
        print(report_text(results, folder))
        if results["failed"]:
            raise SystemExit(1)
        return
    plan = read_plan(file, flags)
    if working.run is not None:
        runs.run_one(plan, working.run, do_run)
    elif working.dry_run:
        print(plan_text(plan, working.step_seconds, working.image_seconds))
    else:
        jobs = jobs_of(plan, file, flags)
        print(status_text(jobs, plan.folder / QUEUE, runs.seconds_of, lambda job: runs.step_of(plan, job)))


def compare(
    file: str,
    *,
    jobs: int = 1,
    devices: str | None = None,
    threads: int | None = None,
    merge: str | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """`sd-atoms compare` as a call: works through all runs that are not finished, and writes the report.

    Args:
        file: the experiment, or a packaged one such as "compare/pocket_quick".
        jobs, devices, threads, merge: as the flags.
        settings: of the experiment, over those of the file: output_dir, seeds, networks, …

    Returns:
        what is in report/results.json.

    Raises:
        UserError: the file or the settings are wrong, a folder holds something else, or no run could be finished.
        KeyboardInterrupt: Ctrl-C or SIGTERM.
    """
    working = Working(QueueSettings(jobs=jobs, devices=devices, threads=threads), merge=merge)
    return work_through(file, settings, working)[0]


def work_through(file: str, flags: Mapping[str, Any], working: Working) -> tuple[dict[str, Any], Path]:
    """The results of an experiment and the folder of its report; raises as `compare` does."""
    plan = read_plan(file, flags)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("compare starts its runs itself; start it without accelerate launch")
    slots = working.queue.slots()
    check_networks(plan)  # what is not there is said now, not after a training
    check_surroundings(plan)
    runs.check_runs(plan)
    for folder in (working.merge or "").split(","):
        if folder.strip():
            merge_from(plan, Path(folder.strip()))
    write_text(plan.folder / "experiment.yaml", experiment_yaml(plan))
    failed = run_jobs(jobs_of(plan, file, flags), plan.folder / QUEUE, slots, lambda text: print(text, flush=True))
    runs.check_runs(read_plan(file, flags))  # somebody may have changed the file meanwhile
    comparison = comparison_of(plan, failed)
    if not comparison.runs:
        raise UserError(f"{plan.folder}: no run could be finished; the first: {next(iter(failed.values()))}")
    return write_report(comparison, plan.folder / "report"), plan.folder / "report"


def do_run(plan: Plan, run: Run) -> None:
    """Trains, draws and scores one run, as far as that is not done; raises as `runs.finish`."""

    def scored(config, accelerator):
        return score_drawn(plan, run, config, draw_run(plan, run, config, accelerator), accelerator)

    runs.finish(plan, run, scored)


def jobs_of(plan: Plan, file: str, flags: Mapping[str, Any]) -> list[Job]:
    """Every run as a process of its own."""
    words = [sys.executable, "-m", "sd_atoms", "compare", file]
    return runs.jobs_of(plan, [*words, *(f"--{name}={_word(own)}" for name, own in flags.items() if own is not None)])


def check_networks(plan: Plan) -> None:
    """Opens every network of an experiment once.

    Raises:
        UserError: one cannot be opened, or none that is to judge the text knows texts.
    """
    knowing = [name for name in plan.networks if open_network(name).of_texts is not None]
    if plan.experiment.text is not None and plan.experiment.text not in knowing:
        raise UserError(f"text: {plan.experiment.text!r} knows no texts; a CLIP does")
    if plan.rates is not None and not knowing:
        raise UserError(f"networks: rates are chosen by text too, and none of {', '.join(plan.networks)} knows texts")


def comparison_of(plan: Plan, failed: Mapping[str, str]) -> Comparison:
    """What a report is made of."""
    entries = collected(plan)
    fidelity, text = judges(plan, entries[0]["scores"]["networks"]) if entries else (plan.networks[0], None)
    return Comparison(
        base=public_name(str(next(iter(plan.concepts.values()))["pretrained_model_name_or_path"])),
        methods=(PRETRAINED, *plan.methods),
        concepts=tuple(plan.concepts),
        prompts=plan.prompts,
        shown_prompts=tuple(plan.shown_prompts),
        scales=tuple(plan.scales),
        scale_prompts=tuple(plan.shown_prompts[: plan.experiment.scale_prompts]),
        images_per_prompt=plan.experiment.images_per_prompt,
        fidelity=fidelity,
        text=text,
        against=plan.against,
        runs=tuple(entry for entry in entries if entry["scores"]["stage"] != "rate"),
        rate_runs=tuple(entry for entry in entries if entry["scores"]["stage"] == "rate"),
        failed=dict(failed),
    )


def plan_text(plan: Plan, step_seconds: float | None = None, image_seconds: float | None = None) -> str:
    """The runs, and what they cost, as far as that can be said.

    Args:
        plan: the runs; those that are done tell what others of their stage take.
        step_seconds, image_seconds: of a training step and of a picture, where none is done yet.
    """
    lines, hours, gigabytes, unknown = [run.name for run in plan.runs], 0.0, 0.0, []
    lines.append("")
    for stage in (PRETRAINED, "rate", "scored"):
        own = [run for run in plan.runs if run.stage == stage]
        if not own:
            continue
        pictures = sum(_picture_count(plan, run) for run in own)
        loops = [] if stage == PRETRAINED else [plan.config(run).loop for run in own]
        # how many steps num_train_epochs means only the photos tell
        steps = None if any(loop.num_train_epochs for loop in loops) else sum(loop.max_train_steps for loop in loops)
        length = "passes over the photos" if steps is None else f"{steps:,} training steps"
        lines.append(f"{plural(len(own), 'run'):>10}: {stage}; {length}, {pictures:,} pictures")
        done = [plan.run_folder(run) for run in own if (plan.run_folder(run) / SCORES).exists()]
        if done:
            seconds = sum(read_scores(folder / SCORES)["seconds"] for folder in done) / len(done)
            size = sum(path.stat().st_size for folder in done for path in folder.rglob("*") if path.is_file())
            hours += seconds * len(own) / 3600
            gigabytes += size / len(done) * len(own) / 1e9
        elif image_seconds is not None and (steps == 0 or None not in (step_seconds, steps)):
            hours += (steps * (step_seconds or 0) + pictures * image_seconds) / 3600
            unknown.append(f"disk of {stage}")
        else:
            unknown += [f"hours and disk of {stage}"]
    if hours:
        lines.append(f"about {hours:.1f} hours at one run at a time and {gigabytes:.2f} GB on disk")
    if unknown:
        lines.append(
            f"told once one of each is done, hours also by --step_seconds and --image_seconds: {', '.join(unknown)}"
        )
    return "\n".join(lines)


def _picture_count(plan: Plan, run: Run) -> int:
    count = len(plan.templates(run)) * plan.experiment.images_per_prompt + (2 if run.stage != PRETRAINED else 0)
    if run.stage != "rate":
        count += len(plan.unrelated)
    if run.stage == "scored":
        strengths = [scale for scale in plan.scales if scale != 1]
        count += len(strengths) * len(plan.shown_prompts[: plan.experiment.scale_prompts])
    return count


def experiment_yaml(plan: Plan) -> str:
    """The experiment with everything filled in, for the record."""
    concepts = {
        name: {key: value for key, value in own.items() if key not in FORCED} for name, own in plan.concepts.items()
    }
    parts = {"concepts": concepts, "methods": plan.methods} | ({"rates": vars(plan.rates)} if plan.rates else {})
    return to_yaml(plan.experiment) + yaml.safe_dump(parts, sort_keys=False, allow_unicode=True, width=119)


def _word(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)

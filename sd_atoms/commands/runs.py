"""What `compare` and `vtab run` have in common: the runs of an experiment, each a process of its own."""

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from sd_atoms.commands import train
from sd_atoms.errors import UserError
from sd_atoms.files import write_json
from sd_atoms.jobs.plan import PRETRAINED, Run, Runs, chosen_rate
from sd_atoms.jobs.queue import TAKEN, Job, Taken, held, note_failure
from sd_atoms.jobs.results import (
    QUEUE,
    SCORES,
    check_rates_settled,
    check_same,
    check_scored_as_planned,
    read_scores,
    selection_score,
)
from sd_atoms.machine import forget_accelerator, make_accelerator
from sd_atoms.settings import replaced
from sd_atoms.training.config import TrainConfig
from sd_atoms.training.optimiser import with_defaults
from sd_atoms.training.run_folder import CONFIG, LOG, METRICS, read_log


def jobs_of(plan: Runs, words: Sequence[str]) -> list[Job]:
    """Every run as a process of its own; `words` start the experiment again."""
    return [
        Job(run.name, plan.run_folder(run) / SCORES, (*words, f"--run={run.name}"), run.needs, run.rate_runs)
        for run in plan.runs
    ]


def run_one(plan: Runs, name: str, do_run: Callable[[Any, Run], None]) -> None:
    """One run, here and now; how it fails is left for the queue, whichever that is.

    Raises:
        UserError: there is none of that name, or as `finish`.
        SystemExit: TAKEN, if another process works at it.
    """
    run = plan.named(name)
    try:
        do_run(plan, run)
    except Taken:
        print(f"{name}: another process works at it", file=sys.stderr)
        raise SystemExit(TAKEN) from None
    except UserError as error:
        note_failure(plan.folder / QUEUE, name, str(error))
        raise


def finish(plan: Runs, run: Run, scored: Callable[[TrainConfig, Any], dict[str, Any]]) -> None:
    """Trains, draws and scores one run, as far as that is not done.

    Args:
        plan: the experiment.
        run: of it.
        scored: (its settings, accelerator) -> what scores.json holds besides the seconds; draws what is missing.

    Raises:
        Taken: another process does it.
        UserError: something in it is wrong, or what it needs is not there.
        Interrupted: Ctrl-C or SIGTERM while it trained; a checkpoint is on disk.
    """
    with held(plan.folder / QUEUE, run.name):
        folder = plan.run_folder(run)
        if (folder / SCORES).exists():
            return
        started = time.monotonic()
        check_rates_settled(plan, run)
        config = with_defaults(plan.config(run, chosen_rate(plan, run, lambda other: selection_score(plan, other))))
        if run.stage != PRETRAINED:
            check_same(config, folder)
            if not (folder / METRICS).exists():
                train.run(replaced(config, resume_from_checkpoint="latest"))
                forget_accelerator()
        result = scored(config, make_accelerator())
        write_json(folder / SCORES, result | {"seconds": time.monotonic() - started})


def check_runs(plan: Runs) -> None:
    """Refuses, before anything is trained, to go on with runs of other settings, pictures or scores.

    Raises:
        UserError: a run folder holds such a run, or the folder is none of an experiment.
    """
    if (plan.folder / CONFIG).exists():
        raise UserError(f"output_dir: {plan.folder} holds a run, and an experiment needs a folder of its own")
    if plan.folder.exists() and not plan.folder.is_dir():
        raise UserError(f"output_dir: {plan.folder} is a file")
    for run in plan.runs:
        if run.stage != PRETRAINED:
            # the rate that a run was given is settled when it begins
            check_same(with_defaults(plan.config(run)), plan.run_folder(run), bool(run.rate_runs))
    check_scored_as_planned(plan)


def seconds_of(job: Job) -> float | None:
    """What a finished run took; None of the base, which is not trained and so says nothing of the others."""
    scores = read_scores(job.done)
    return None if scores["stage"] == PRETRAINED else scores.get("seconds")


def step_of(plan: Runs, job: Job) -> str:
    """How far a run has come that is worked at."""
    run = plan.named(job.name)
    log = read_log(plan.run_folder(run) / LOG)
    if not log:  # such as of the base
        return ""
    if (plan.run_folder(run) / METRICS).exists():
        return "generates and scores"
    loop = plan.config(run).loop
    return f"step {log[-1]['step']}" + ("" if loop.num_train_epochs else f" of {loop.max_train_steps}")

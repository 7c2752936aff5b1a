"""The same jobs on a cluster: workers in a Slurm job array, or a Ray task for each job.

Neither is asked how far it is: a job is done when its file is there, and runs while its lock is held. The folders have
to lie on a disk that all machines see, whose locks hold between them.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from sd_atoms.errors import UserError
from sd_atoms.jobs.queue import (
    HOW,
    TAKEN,
    Job,
    Slot,
    failure_of,
    forget_failure,
    interruptible,
    log_of,
    note_failure,
    run_jobs,
    start_logged,
    state_of,
    why_ended,
)
from sd_atoms.machine import GIVEN_CORES
from sd_atoms.progress import progress_bar
from sd_atoms.settings import setting

EXECUTORS = ("local", "slurm", "ray")
TIMEOUTS = 100  # how often a worker may run into its time limit and begin again
WATCH_SECONDS = 2.0  # between looks at the files of a shared disk
TAKEN_SECONDS = 2.0  # between tries at a job that another process still holds
STOP_SECONDS = 60.0  # for a run to save a checkpoint when its task is called off


@dataclass(frozen=True)
class ClusterSettings:
    """Where the runs are worked through."""

    executor: str = setting("local", HOW, "where: on this machine, by Slurm or by Ray", choices=EXECUTORS)
    workers: int = setting(1, HOW, "array tasks of Slurm, each doing one run after the other", low=1, high=10_000,
                           needs=["executor=slurm"])  # fmt: skip
    cpus: int = setting(1, HOW, "cores of a worker or task", low=1, needs=["executor=slurm|ray"])
    gpus: float = setting(
        0.0, HOW, "GPUs of a worker or task; with Ray also a fraction", low=0.0, needs=["executor=slurm|ray"]
    )
    hours: float = setting(24.0, HOW, "time limit of a worker", low=0.01, needs=["executor=slurm"])
    partition: str | None = setting(None, HOW, "of Slurm; none = its own default", needs=["executor=slurm"])
    slurm_options: str | None = setting(
        None, HOW, "further ones of sbatch, such as account=me,constraint=a100", needs=["executor=slurm"]
    )
    ray_address: str = setting("auto", HOW, "of the cluster; auto = the one on this machine", needs=["executor=ray"])


def do_jobs(
    jobs: Sequence[Job],
    folder: Path,
    slots: Sequence[Slot],
    settings: ClusterSettings,
    words: Sequence[str],
) -> dict[str, str]:
    """Does all jobs that are not done, wherever the settings say, and prints a line on each that ended.

    Args:
        jobs: without needs.
        folder: of locks and logs; for a cluster on the shared disk.
        slots: of this machine.
        settings: where.
        words: that start the same work again, for workers elsewhere.

    Returns:
        name -> why it failed, of those that did.

    Raises:
        UserError: the cluster cannot be used.
        KeyboardInterrupt: Ctrl-C or SIGTERM; the same words go on.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("a comparison starts its runs itself; start it without accelerate launch")
    told = partial(print, flush=True)
    if settings.executor == "local":
        return run_jobs(jobs, folder, slots, told)
    if settings.executor == "ray":
        return run_on_ray(jobs, folder, settings, told)
    if all(job.done.exists() for job in jobs):
        return {}
    for job in jobs:
        forget_failure(folder, job.name)
    number = submit_workers(words, folder / "slurm", settings)
    told(f"Slurm job {number}: {settings.workers} workers; --status tells how far they are")
    try:
        return watch_jobs(jobs, folder, told)
    except KeyboardInterrupt:
        print(f"The workers go on. They stop by: scancel {number}", file=sys.stderr)
        raise


class Worker:
    """What an array task does: the words of a queue. Before its time is up, or its place is taken, it stops that by
    SIGTERM, which saves checkpoints, and is queued again."""

    def __call__(self, words: Sequence[str]) -> int:
        """The exit code of the queue."""
        # Slurm sends the signal that announces the end to all processes of the step
        self.process = subprocess.Popen(
            words,
            env={**os.environ, GIVEN_CORES: os.environ.get("SLURM_CPUS_PER_TASK", "1")},
            preexec_fn=lambda: signal.signal(signal.SIGUSR2, signal.SIG_IGN),
        )
        return self.process.wait()

    def checkpoint(self, words: Sequence[str]) -> Any:
        """What is to be queued again."""
        from submitit.helpers import DelayedSubmission

        self.process.terminate()
        self.process.wait()
        return DelayedSubmission(Worker(), words)


def submit_workers(words: Sequence[str], folder: Path, settings: ClusterSettings) -> str:
    """Submits a job array whose tasks run a queue with these words; returns its number.

    Args:
        words: of a command that works until no job is left.
        folder: for scripts and logs; on the shared disk.
        settings: how many and how large.

    Raises:
        UserError: submitit or Slurm is not there, or Slurm refuses.
    """
    try:
        import submitit
    except ImportError as error:
        raise UserError('executor=slurm needs `pip install "sd-atoms[cluster]"`') from error
    if settings.gpus != int(settings.gpus):
        raise UserError(f"gpus: {settings.gpus:g}: whole cards are allowed with executor=slurm")
    options = _options(settings.slurm_options)
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster="slurm", slurm_max_num_timeout=TIMEOUTS)
        executor.update_parameters(
            name="sd-atoms",
            timeout_min=max(1, round(60 * settings.hours)),
            cpus_per_task=settings.cpus,
            slurm_partition=settings.partition,
            slurm_array_parallelism=settings.workers,
            slurm_additional_parameters=options,
            **({"gpus_per_node": int(settings.gpus)} if settings.gpus else {}),
        )
        submitted = executor.map_array(Worker(), [list(words)] * settings.workers)
    except (RuntimeError, OSError, submitit.core.utils.FailedJobError) as error:
        raise UserError(f"executor=slurm: {' '.join(str(error).split())[:400]}") from error
    return submitted[0].job_id.split("_")[0]


def watch_jobs(jobs: Sequence[Job], folder: Path, told: Callable[[str], None] = print) -> dict[str, str]:
    """Waits until others have done every job or failed in it, by their files and locks alone.

    Args:
        jobs: what others work at.
        folder: of locks and logs.
        told: gets a line on each job that ended.

    Returns:
        name -> why it failed, of those that did.

    Raises:
        KeyboardInterrupt: Ctrl-C or SIGTERM; the others work on.
    """
    ended = {job.name: "done" for job in jobs if job.done.exists()}
    with interruptible(), progress_bar(len(jobs), "Runs", "run", initial=len(ended)) as bar:
        while True:
            states = {job.name: state_of(job, folder) for job in jobs}
            for name, state in states.items():
                if state in ("done", "failed") and ended.get(name) != state:
                    bar.update(name not in ended)
                    ended[name] = state
                    told(f"{name}: {state}{': ' if state == 'failed' else ''}{failure_of(folder, name)}")
            if all(state in ("done", "failed") for state in states.values()):
                return {name: failure_of(folder, name) for name, state in states.items() if state == "failed"}
            time.sleep(WATCH_SECONDS)


def run_on_ray(
    jobs: Sequence[Job], folder: Path, settings: ClusterSettings, told: Callable[[str], None] = print
) -> dict[str, str]:
    """Works until every job is done or has failed, each as a task of Ray; a task whose node is lost starts elsewhere.

    Args:
        jobs: without needs.
        folder: of locks and logs.
        settings: address of the cluster, size of a task.
        told: gets a line on each job that ended.

    Returns:
        name -> why it failed, of those that did.

    Raises:
        UserError: Ray is not there, no cluster answers, or no node is large enough for a task.
        KeyboardInterrupt: the tasks were called off.
    """
    try:
        import ray
    except ImportError as error:
        raise UserError('executor=ray needs `pip install "sd-atoms[ray]"`') from error
    # the address of a cluster on this machine alone is not what Ray would guess
    here = {"_node_ip_address": host} if (host := settings.ray_address.split(":")[0]).startswith("127.") else {}
    try:
        ray.init(address=settings.ray_address, log_to_driver=False, **here)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(f"ray_address: {settings.ray_address}: {' '.join(str(error).split())[:300]}") from error
    failed, tasks = {}, {}
    try:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if not any(own.get("CPU", 0) >= settings.cpus and own.get("GPU", 0) >= settings.gpus for own in nodes):
            raise UserError(f"executor=ray: no node has cpus={settings.cpus} and gpus={settings.gpus:g}")
        task = ray.remote(num_cpus=settings.cpus, num_gpus=settings.gpus, max_retries=-1)(_run_job)
        for job in jobs:
            if not job.done.exists():
                forget_failure(folder, job.name)
                tasks[task.remote(list(job.command), str(job.done.absolute()), str(log_of(job, folder).absolute()),
                                  os.getcwd(), settings.cpus)] = job  # fmt: skip
        with interruptible(), progress_bar(len(jobs), "Runs", "run", initial=len(jobs) - len(tasks)) as bar:
            while tasks:
                (ended,), _ = ray.wait(list(tasks), num_returns=1)
                job = tasks.pop(ended)
                why = ray.get(ended)
                if why:
                    failed[job.name] = why
                    note_failure(folder, job.name, why)
                bar.update()
                told(f"{job.name}: failed: {why}" if why else f"{job.name}: done")
        return failed
    except KeyboardInterrupt:
        for ended in tasks:
            ray.cancel(ended)
        raise
    finally:
        ray.shutdown()


def _run_job(command: list[str], done: str, log: str, folder: str, cpus: int) -> str:
    """Runs on a node of Ray: why a job failed, or "". What a lost node left running is waited for, not repeated."""
    while not Path(done).exists():
        process = start_logged(command, Path(log), {GIVEN_CORES: str(cpus)}, folder)
        try:
            code = process.wait()
        except BaseException:  # called off
            process.terminate()
            process.wait(STOP_SECONDS)
            raise
        if code == TAKEN:
            time.sleep(TAKEN_SECONDS)
        elif not Path(done).exists():
            return why_ended(Path(log), code)
    return ""


def _options(text: str | None) -> dict[str, str]:
    """name=value,name=value as a mapping; raises UserError for anything else."""
    pairs = [part.split("=", 1) for part in (text or "").split(",") if part.strip()]
    if not all(len(pair) == 2 and pair[0].strip() for pair in pairs):
        raise UserError(f"slurm_options: {text!r}: name=value is allowed, with commas between")
    return {name.strip(): value.strip() for name, value in pairs}

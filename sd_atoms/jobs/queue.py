"""A queue of jobs, each a process of its own; several queues on one folder, or machines that share it, divide them.

A job is done when its file is there. Whoever works at it holds its lock, which the system takes back however the
process ends; so nothing is done twice, and a killed queue goes on where it was. What a job needs to run is its command
alone: another executor (a scheduler's array, say) starts the same commands.
"""

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from sd_atoms.errors import UserError
from sd_atoms.files import write_text
from sd_atoms.progress import progress_bar
from sd_atoms.settings import setting

TAKEN = 75  # exit code of a job that another process holds (EX_TEMPFAIL)
POLL_SECONDS = 0.2
HOW = "how it is worked through"
LAST_BYTES = 4000  # of a log


@dataclass(frozen=True)
class Job:
    """One piece of work.

    name: names its log and lock, may hold slashes. done: the file that it ends with. command: its process, which must
    hold its lock. needs: jobs that must be done before. after: those that must have ended, done or failed.
    """

    name: str
    done: Path
    command: tuple[str, ...]
    needs: tuple[str, ...] = ()
    after: tuple[str, ...] = ()


def locked_job(folder: Path, name: str, done: Path, words: Sequence[str]) -> Job:
    """A job of the queue in `folder` that runs a command of `sd-atoms` which takes no lock itself."""
    command = (sys.executable, "-m", "sd_atoms.jobs.locked", str(lock_of(folder, name)), *words)
    return Job(name, done, command)


@dataclass(frozen=True)
class QueueSettings:
    """How a queue is worked through."""

    jobs: int = setting(1, HOW, "runs at once", low=1, high=1000)
    devices: str | None = setting(None, HOW, "cuda:0,cuda:1 or cpu: runs take them in turn; none = as each finds it")
    threads: int | None = setting(None, HOW, "cores of each run; none = all, divided", low=1)
    status: bool = setting(False, HOW, "only say how far it has come")

    def slots(self) -> list["Slot"]:
        """Places for its jobs, over the devices in turn, each with cores of its own as far as there are any.

        Raises:
            UserError: a device is none, or threads are wanted where no process can be bound to cores.
        """
        names = [name.strip() for name in (self.devices or "").split(",") if name.strip()] or [""]
        wrong = [name for name in names if name and not re.fullmatch(r"cpu|cuda:\d+", name)]
        if wrong:
            raise UserError(f"devices: {', '.join(wrong)}: cpu and cuda:NUMBER are allowed, with commas between")
        own: list[tuple[int, ...]] = [()] * self.jobs
        if hasattr(os, "sched_getaffinity"):
            cores = sorted(os.sched_getaffinity(0))
            share = min(self.threads or max(1, len(cores) // self.jobs), len(cores))
            own = [tuple(cores[(n * share + core) % len(cores)] for core in range(share)) for n in range(self.jobs)]
        elif self.threads is not None:
            raise UserError("threads: this system binds no process to cores; leave it out")
        return [Slot(names[place % len(names)], bound) for place, bound in enumerate(own)]


@dataclass(frozen=True)
class Slot:
    """A place for one job at a time.

    device: cpu, cuda:0, or "" for whatever the job finds. cores: those that it is bound to, where a system does that.
    """

    device: str = ""
    cores: tuple[int, ...] = ()

    def environment(self) -> dict[str, str]:
        """What a job's process is told of its place."""
        if self.device == "cpu":
            return {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
        if not self.device:
            return {}
        number = int(self.device.removeprefix("cuda:"))
        ours = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        return {"CUDA_VISIBLE_DEVICES": ours[number] if number < len(ours) else str(number)}


class Taken(Exception):
    """Another process works at the job."""


@contextlib.contextmanager
def held(folder: Path, name: str) -> Iterator[None]:
    """Holds the lock of a job for a while.

    Raises:
        Taken: another process does.
    """
    path = lock_of(folder, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise Taken(name) from error
    try:
        yield
    finally:
        lock.release()


def lock_of(folder: Path, name: str) -> Path:
    """The lock of a job."""
    return folder / f"{name}.lock"


def state_of(job: Job, folder: Path) -> str:
    """done, running, failed or waiting; failed: it ended with an error and was not begun again."""
    if job.done.exists():
        return "done"
    path = lock_of(folder, job.name)
    if path.exists():
        try:
            with FileLock(path, timeout=0):
                pass
        except Timeout:
            return "running"
    return "failed" if failure_of(folder, job.name) else "waiting"


def failure_of(folder: Path, name: str) -> str:
    """Why a job failed the last time; empty where it did not, or was begun again since."""
    path = folder / f"{name}.failed"
    return path.read_text(encoding="utf-8") if path.exists() else ""


def note_failure(folder: Path, name: str, why: str) -> None:
    """Leaves word of a failure for `failure_of`."""
    write_text(folder / f"{name}.failed", why)


def forget_failure(folder: Path, name: str) -> None:
    """A job is to be begun again."""
    (folder / f"{name}.failed").unlink(missing_ok=True)


def log_of(job: Job, folder: Path) -> Path:
    """What a job prints goes there."""
    return folder / f"{job.name}.log"


def run_jobs(
    jobs: Sequence[Job], folder: Path, slots: Sequence[Slot], told: Callable[[str], None] = print
) -> dict[str, str]:
    """Works until every job is done or has failed, beside other queues; what failed elsewhere is tried once here.

    Args:
        jobs: a job comes after those that it needs, whatever their order.
        folder: of locks and logs.
        slots: as many jobs run at once.
        told: gets a line on each job that ended.

    Returns:
        name -> why it failed, of those that did, and of those that need one of them.

    Raises:
        KeyboardInterrupt: Ctrl-C or SIGTERM; the jobs that ran were asked to stop, and have.
    """
    running: dict[int, tuple[Job, subprocess.Popen, float]] = {}  # number of the slot -> what it works at, since when
    failed: dict[str, str] = {}
    finished = {job.name for job in jobs if job.done.exists()}
    with interruptible(), progress_bar(len(jobs), "Runs", "run", initial=len(finished)) as bar:
        try:
            while True:
                _collect(running, folder, failed, told)
                ended = {job.name for job in jobs if job.name not in finished and job.done.exists()}
                finished |= ended
                if ended:
                    bar.update(len(ended))
                # what failed here may have been done by another queue since
                failed = {name: why for name, why in failed.items() if name not in finished}
                lost = _lost(jobs, finished, failed)
                at_work = {job.name for job, _, _ in running.values()}
                left = [job for job in jobs if job.name not in finished | failed.keys() | lost.keys() | at_work]
                if not left and not running:
                    return failed | lost
                for job in left:
                    free = set(range(len(slots))) - running.keys()
                    ready = set(job.needs) <= finished and set(job.after) <= finished | failed.keys() | lost.keys()
                    # one that runs here already is another queue's
                    if free and ready and state_of(job, folder) != "running":
                        running[min(free)] = (job, _start(job, folder, slots[min(free)]), time.monotonic())
                time.sleep(POLL_SECONDS)
        except BaseException:
            _stop([process for _, process, _ in running.values()])
            raise


def _lost(jobs: Sequence[Job], finished: set[str], failed: dict[str, str]) -> dict[str, str]:
    """name -> why it cannot be done, of jobs that need one that failed, directly or not."""
    lost: dict[str, str] = {}
    while True:
        more = {
            job.name: f"it needs {missing[0]}, which failed"
            for job in jobs
            if job.name not in finished | lost.keys()
            and (missing := [name for name in job.needs if name in failed or name in lost])
        }
        if not more:
            return lost
        lost |= more


def status_text(jobs: Sequence[Job], folder: Path, seconds_of: Callable[[Job], float | None], step_of) -> str:
    """How far a queue has come: a line for each state, what is running, what failed, and the time left.

    Args:
        jobs: all of it.
        folder: of locks and logs.
        seconds_of: what a finished job took, None where that is not known.
        step_of: what there is to say of a running one.
    """
    states = {job.name: state_of(job, folder) for job in jobs}
    lines = [
        f"{sum(state == kind for state in states.values()):>5} {kind}"
        for kind in ("done", "running", "waiting", "failed")
    ]
    lines += [f"running: {job.name} {step_of(job)}".rstrip() for job in jobs if states[job.name] == "running"]
    lines += [f"failed:  {job.name}: {failure_of(folder, job.name)}" for job in jobs if states[job.name] == "failed"]
    known = [seconds for job in jobs if states[job.name] == "done" and (seconds := seconds_of(job)) is not None]
    left = [name for name, state in states.items() if state in ("running", "waiting")]
    if known and left:
        at_once = max(1, sum(state == "running" for state in states.values()))
        lines.append(f"about {_duration(sum(known) / len(known) * len(left) / at_once)} left, {at_once} at once")
    return "\n".join(lines)


def _collect(running: dict, folder: Path, failed: dict[str, str], told: Callable[[str], None]) -> None:
    """Takes out what has ended."""
    for place, (job, process, started) in list(running.items()):
        code = process.poll()
        if code is None:
            continue
        del running[place]
        if job.done.exists():
            told(f"{job.name}: done in {_duration(time.monotonic() - started)}")
        elif code != TAKEN:
            failed[job.name] = why_ended(log_of(job, folder), code)
            note_failure(folder, job.name, failed[job.name])
            told(f"{job.name}: failed: {failed[job.name]}")


def _start(job: Job, folder: Path, slot: Slot) -> subprocess.Popen:
    forget_failure(folder, job.name)
    process = start_logged(job.command, log_of(job, folder), slot.environment())
    if slot.cores:
        with contextlib.suppress(ProcessLookupError):  # it has ended already
            os.sched_setaffinity(process.pid, slot.cores)
    return process


def start_logged(
    command: Sequence[str], log: Path, environment: Mapping[str, str], folder: str | None = None
) -> subprocess.Popen:
    """A process whose command and output go to the end of a log; `environment` is added to this one's."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as file:
        file.write(f"$ {shlex.join(command)}\n".encode())
        file.flush()
        # a session of its own: Ctrl-C reaches the queue alone, which hands it on once
        return subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def why_ended(log: Path, code: int) -> str:
    """What a log says of a failure since its job was begun: the line of an error, or the last one of a traceback; else
    the exit code."""
    with open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - LAST_BYTES))
        text = file.read().decode("utf-8", "replace").rpartition("\n$ ")[2]
    lines = [line for line in text.split("\n") if line.strip()]
    told = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    told += lines[-1:] if not told and lines and re.match(r"[\w.]*Error\b", lines[-1]) else []
    return told[-1] if told else f"it ended with code {code}, see {log}"


def _stop(processes: Sequence[subprocess.Popen]) -> None:
    """Asks them to stop, by SIGTERM since a background job may ignore Ctrl-C, and waits; a second one ends them."""
    try:
        for process in processes:
            process.terminate()
        if processes:
            print(f"Stopping {len(processes)} runs after their step; again to stop at once", file=sys.stderr)
        for process in processes:
            process.wait()
        print("Stopped; the same command (without --overwrite) goes on", file=sys.stderr)
    except KeyboardInterrupt:
        for process in processes:
            process.kill()


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM as Ctrl-C, for a while."""

    def interrupt(number, frame):
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"

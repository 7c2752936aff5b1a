"""The queue: every job once, in the order of its needs, whoever is killed and however many queues there are."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from sd_atoms.errors import UserError
from sd_atoms.jobs.queue import TAKEN, Job, QueueSettings, Slot, Taken, held, run_jobs, state_of, status_text

# what a job does: takes its lock, says that it began, works, says that it ended
WORK = f"""
import sys, time, pathlib, filelock
folder, name, seconds = pathlib.Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
lock = filelock.FileLock(folder / "queue" / (name + ".lock"), timeout=0)
try:
    lock.acquire()
except filelock.Timeout:
    sys.exit({TAKEN})
if (folder / (name + ".done")).exists():
    sys.exit(0)
with open(folder / "begun", "a") as file:
    file.write(name + "\\n")
print("working", flush=True)
time.sleep(seconds)
if name.startswith("wrong"):
    sys.exit("error: " + name + " cannot be done")
(folder / (name + ".done")).write_text("")
"""


def job(folder, name, needs=(), seconds=0.05):
    return Job(name, folder / f"{name}.done", (sys.executable, "-c", WORK, str(folder), name, str(seconds)), needs)


def begun(folder):
    return (folder / "begun").read_text().split()


def quiet(text):
    pass


def test_a_job_comes_after_those_it_needs_and_never_twice(tmp_path):
    jobs = [job(tmp_path, "last", ("a", "b")), job(tmp_path, "b", ("a",)), job(tmp_path, "a"), job(tmp_path, "old")]
    jobs[-1].done.write_text("")
    assert run_jobs(jobs, tmp_path / "queue", QueueSettings(2).slots(), quiet) == {}
    assert begun(tmp_path) == ["a", "b", "last"]
    assert run_jobs(jobs, tmp_path / "queue", QueueSettings(2).slots(), quiet) == {}
    assert begun(tmp_path) == ["a", "b", "last"]


def test_a_failure_is_told_with_its_reason_and_stops_only_what_needs_it(tmp_path):
    jobs = [job(tmp_path, "wrong"), job(tmp_path, "after", ("wrong",)), job(tmp_path, "later", ("after",))]
    jobs += [job(tmp_path, "other")]
    told = []
    failed = run_jobs(jobs, tmp_path / "queue", [Slot()], told.append)
    assert failed == {
        "wrong": "wrong cannot be done",
        "after": "it needs wrong, which failed",
        "later": "it needs after, which failed",
    }
    assert "wrong: failed: wrong cannot be done" in told
    states = {each.name: state_of(each, tmp_path / "queue") for each in jobs}
    assert states == {"wrong": "failed", "after": "waiting", "later": "waiting", "other": "done"}
    text = status_text(jobs, tmp_path / "queue", lambda each: 90.0, lambda each: "")
    assert "failed:  wrong: wrong cannot be done" in text
    assert "about 3 min left" in text  # two wait, 90 s each


def test_what_comes_after_another_does_not_need_its_success(tmp_path):
    wrong = job(tmp_path, "wrong")
    after = job(tmp_path, "after")
    jobs = [
        Job(after.name, after.done, after.command, after=("wrong", "late")),
        wrong,
        job(tmp_path, "late", seconds=0.5),
    ]
    assert run_jobs(jobs, tmp_path / "queue", QueueSettings(3).slots(), quiet).keys() == {"wrong"}
    assert begun(tmp_path)[-1] == "after"


def test_what_failed_here_and_was_done_elsewhere_is_done(tmp_path):
    wrong, slow = job(tmp_path, "wrong"), job(tmp_path, "slow", seconds=1.5)

    def told(text):
        if text.startswith("wrong: failed"):
            wrong.done.write_text("")  # by another queue

    jobs = [wrong, job(tmp_path, "needs", ("wrong",)), slow]
    assert run_jobs(jobs, tmp_path / "queue", QueueSettings(2).slots(), told) == {}
    assert slow.done.exists()


def test_two_queues_divide_the_work_and_both_see_its_end(tmp_path):
    jobs = [job(tmp_path, f"j{number}", seconds=0.2) for number in range(8)]
    outcomes = []

    def work():  # signal handlers belong to the main thread, so queues of a test in threads go without
        outcomes.append(run_jobs(jobs, tmp_path / "queue", [Slot()], quiet))

    from unittest import mock

    with mock.patch.object(signal, "signal"):
        queues = [threading.Thread(target=work) for _ in range(2)]
        for queue in queues:
            queue.start()
        for queue in queues:
            queue.join()
    assert outcomes == [{}, {}]
    assert sorted(begun(tmp_path)) == sorted(each.name for each in jobs)


def test_a_killed_job_is_free_at_once(tmp_path):
    own = job(tmp_path, "long", seconds=60)
    process = subprocess.Popen(own.command)
    try:
        while state_of(own, tmp_path / "queue") != "running":
            time.sleep(0.05)
        with pytest.raises(Taken), held(tmp_path / "queue", "long"):
            pass
    finally:
        process.kill()
        process.wait()
    assert state_of(own, tmp_path / "queue") == "waiting"
    with held(tmp_path / "queue", "long"):
        pass


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_queue_takes_its_jobs_with_it_and_goes_on_later(tmp_path, number):
    script = f"""
import signal
import sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background ignores it
from test_queue import job, run_jobs, Slot
folder = Path({str(tmp_path)!r})
run_jobs([job(folder, "long", seconds=60)], folder / "queue", [Slot()])
"""
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE)
    own = job(tmp_path, "long")
    while state_of(own, tmp_path / "queue") != "running":
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    os.kill(process.pid, number)
    assert b"KeyboardInterrupt" in process.communicate(timeout=20)[1]
    assert state_of(own, tmp_path / "queue") == "waiting"
    assert run_jobs([own], tmp_path / "queue", [Slot()], quiet) == {}


def test_a_slot_says_where_its_job_runs(tmp_path):
    slots = QueueSettings(3, "cuda:0, cuda:1").slots()
    assert [slot.environment() for slot in slots] == [{"CUDA_VISIBLE_DEVICES": number} for number in "010"]
    assert QueueSettings(1).slots()[0].environment() == {}
    assert QueueSettings(1, "cpu").slots()[0].environment()["ACCELERATE_USE_CPU"] == "true"
    with pytest.raises(UserError, match="devices: gpu0: cpu and cuda:NUMBER are allowed"):
        QueueSettings(1, "gpu0").slots()


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system binds no process to cores")
def test_jobs_side_by_side_have_cores_of_their_own(tmp_path):
    cores = sorted(os.sched_getaffinity(0))
    (alone,) = QueueSettings(1).slots()
    assert alone.cores == tuple(cores)
    assert [len(slot.cores) for slot in QueueSettings(len(cores)).slots()] == [1] * len(cores)
    assert sorted(core for slot in QueueSettings(len(cores)).slots() for core in slot.cores) == cores
    done = tmp_path / "cores"
    code = f"import os, time; time.sleep(0.3); open({str(done)!r}, 'w').write(str(os.sched_getaffinity(0)))"
    run_jobs(
        [Job("one", done, (sys.executable, "-c", code))], tmp_path / "queue", QueueSettings(9, None, 1).slots(), quiet
    )
    assert done.read_text() == str({cores[0]})

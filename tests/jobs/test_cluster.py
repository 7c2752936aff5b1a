"""The executors of a cluster: a real Slurm and a real Ray on this machine, their workers killed on the way."""

import importlib.util
import subprocess
import sys
import time

import pytest
from clusters import lacking, ray_nodes, said, slurm, until
from test_set_runs import experiment, outcome

from sd_atoms.commands.vtab.run import jobs_of
from sd_atoms.errors import UserError
from sd_atoms.jobs.cluster import ClusterSettings, run_on_ray, submit_workers, watch_jobs
from sd_atoms.jobs.queue import Job, held, note_failure, state_of
from sd_atoms.jobs.results import QUEUE, SCORES
from sd_atoms.jobs.sets import read_set_plan

WORDS = [sys.executable, "-m", "sd_atoms", "vtab", "run", "--config"]
END_SECONDS = 1500


def done_in(folder):
    return {path: path.stat().st_mtime_ns for path in (folder / "out/runs").rglob(SCORES)}


def finished(process, folder):
    """Waits for the end of an experiment; its output, whatever it is, on failure."""
    out, _ = process.communicate(timeout=END_SECONDS)
    logs = "\n".join(path.read_text(errors="replace")[-2000:] for path in (folder / "out/queue").rglob("*.log"))
    assert process.returncode == 0, f"{out}\n{logs}"


def started(folder, *words):
    settings = STEPS | {"pretrained_model_name_or_path": str(folder / "base")}
    file = experiment(folder, settings=settings, methods=["atoms"])
    return subprocess.Popen([*WORDS, file, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


STEPS = dict(max_train_steps=30, train_batch_size=1, checkpointing_steps=1, num_inference_steps=1)


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """The same experiment by the local queue."""
    folder = tmp_path_factory.mktemp("local")
    finished(started(folder, "--threads", "1"), folder)
    return folder


@pytest.mark.slow
@pytest.mark.skipif(bool(lacking()), reason=lacking())
def test_slurm_loses_no_run_when_jobs_are_requeued_or_cancelled(local, tmp_path):
    pytest.importorskip("submitit")
    with slurm(tmp_path / "slurm"):
        folder = tmp_path / "by_slurm"
        words = ("--executor", "slurm", "--workers", "2", "--hours", "1", "--partition", "main")
        process = started(folder, *words)
        until(lambda: len(said("squeue", "-h", "-r", "-t", "R").splitlines()) == 2, "two workers", END_SECONDS)
        until(lambda: any((folder / "out/runs").rglob("checkpoint-*")), "a checkpoint", END_SECONDS)
        first, second = said("squeue", "-h", "-r", "-t", "R", "-o", "%i").split()
        said("scontrol", "requeue", first)
        until(lambda: len(list((folder / "out/runs").rglob(SCORES))) >= 2, "two runs", END_SECONDS)
        kept = done_in(folder)
        said("scancel", second)
        finished(process, folder)
        assert kept.items() <= done_in(folder).items()  # nothing is done twice
    assert outcome(folder) == outcome(local)


@pytest.mark.slow
@pytest.mark.skipif(bool(lacking()), reason=lacking())
def test_slurm_s_refusal_and_a_cancelled_array_are_told_and_the_command_goes_on(tmp_path):
    pytest.importorskip("submitit")
    with slurm(tmp_path / "slurm"):
        with pytest.raises(UserError, match="executor=slurm: .*partition"):
            submit_workers(["true"], tmp_path / "q", ClusterSettings(executor="slurm", partition="none"))
        folder = tmp_path / "one"
        words = ("--executor", "slurm", "--tasks", "patch_camelyon")
        process = started(folder, *words)
        until(lambda: any((folder / "out/runs").rglob("checkpoint-*")), "a checkpoint", END_SECONDS)
        said("scancel", *said("squeue", "-h", "-r", "-o", "%i").split())
        until(lambda: not said("squeue", "-h"), "no worker", END_SECONDS)
        process.terminate()  # nobody works any more, and only the folders are asked
        assert "They stop by: scancel" in process.communicate()[0]
        finished(started(folder, *words), folder)
        assert len(done_in(folder)) == 2


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="no ray")
def test_ray_loses_no_run_when_a_node_is_killed(local, tmp_path):
    with ray_nodes() as (address, kill_node):
        folder = tmp_path / "by_ray"
        process = started(folder, "--executor", "ray", "--ray_address", address)
        until(lambda: len(list((folder / "out/queue").rglob("*.log"))) >= 2, "two tasks", END_SECONDS)
        until(lambda: any((folder / "out/runs").rglob("checkpoint-*")), "a checkpoint", END_SECONDS)
        kept = done_in(folder)
        kill_node()
        finished(process, folder)
        assert kept.items() <= done_in(folder).items()
        with pytest.raises(UserError, match="no node has cpus=64 and gpus=0"):
            run_on_ray([], tmp_path, ClusterSettings(executor="ray", ray_address=address, cpus=64))
    assert outcome(folder) == outcome(local)


def test_watching_ends_when_others_have_done_or_failed_all(tmp_path, monkeypatch):
    jobs = [Job(name, tmp_path / f"{name}.done", ()) for name in ("a", "b", "c")]
    jobs[0].done.touch()
    told, looks = [], []

    def later(seconds):
        looks.append(seconds)
        if len(looks) == 2:
            with held(tmp_path, "b"):
                assert state_of(jobs[1], tmp_path) == "running"
            jobs[1].done.touch()
        if len(looks) == 3:
            note_failure(tmp_path, "c", "it broke")

    monkeypatch.setattr(time, "sleep", later)
    assert watch_jobs(jobs, tmp_path, told.append) == {"c": "it broke"}
    assert told == ["b: done", "c: failed: it broke"]


def test_settings_of_other_executors_and_wrong_options_are_refused(tmp_path, capsys, monkeypatch):
    from sd_atoms.cli import main

    file = experiment(tmp_path)
    for words, why in (
        (["--workers", "3"], "workers needs executor=slurm"),
        (["--gpus", "0.5"], "gpus needs executor=slurm or ray"),
        (["--executor", "slurm", "--ray_address", "x"], "ray_address needs executor=ray"),
        (["--executor", "moon"], "'moon' is not one of local, slurm, ray"),
    ):
        assert main(["vtab", "run", "--config", file, *words]) == 2
        assert why in capsys.readouterr().err
    pytest.importorskip("submitit")
    for settings, why in (
        (dict(gpus=0.5), "gpus: 0.5: whole cards are allowed"),
        (dict(slurm_options="account"), "slurm_options: 'account': name=value is allowed"),
    ):
        monkeypatch.setenv("PATH", "/nowhere")
        with pytest.raises(UserError, match=why):
            submit_workers(["true"], tmp_path, ClusterSettings(executor="slurm", **settings))
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="executor=slurm: "):
        submit_workers(["true"], tmp_path, ClusterSettings(executor="slurm"))


def test_the_command_of_a_run_needs_nothing_but_the_folders(tmp_path):
    file = experiment(tmp_path)
    plan = read_set_plan(file, {"images": "9"})
    job = jobs_of(plan, file, {"images": "9"})[1]
    assert job.command[1:] == ("-m", "sd_atoms", "vtab", "run", f"--config={file}", "--images=9",
                               "--run=patch_camelyon/atoms/seed-0")  # fmt: skip
    assert job.done == plan.folder / "runs/patch_camelyon/atoms/seed-0" / SCORES
    assert not (plan.folder / QUEUE).exists()

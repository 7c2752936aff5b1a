"""Training that is killed outright, again and again, ends as if nobody had touched it."""

import json
import os
import random
import subprocess
import sys
import time

import psutil
import pytest
import torch
import yaml
from helpers import CASTLE
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import write_tiny_base

from sd_atoms.cli import train_main
from sd_atoms.files import leftovers, replacing

KILLS = {1: 12, 2: 8}  # processes -> how often they are killed
STEPS = 150
SETTINGS = dict(
    **CASTLE,
    train_token_embedding=True,
    prior="teacher",
    class_prompt="photo of a castle.",
    caption_dropout=0.3,
    random_flip=True,
    train_batch_size=1,
    gradient_accumulation_steps=2,
    checkpointing_steps=2,
    checkpoints_total_limit=3,
    lr_warmup_steps=5,
    ema_decay=0.9,
    validation_loss_steps=3,
    holdout_images=1,
    keep="best",
    num_instance_images=8,
    num_inference_steps=20,
    report_to="none",
)
# dies half-way through writing the tensors of the file whose name argv[1] says
KILLER = """
import os, signal, sys
from pathlib import Path
import sd_atoms.pipeline.artefact_files, sd_atoms.training.checkpoint
from sd_atoms.cli import train_main

name, sys.argv = sys.argv[1], [sys.argv[2], *sys.argv[3:]]

def deadly(save_file):
    def save(tensors, path, metadata=None):
        save_file(tensors, path, metadata=metadata)
        if Path(path).name.startswith(f".{name}."):
            whole = Path(path).read_bytes()
            Path(path).write_bytes(whole[: len(whole) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
    return save

for module in (sd_atoms.pipeline.artefact_files, sd_atoms.training.checkpoint):
    module.save_file = deadly(module.save_file)
sys.exit(train_main())
"""


class Runner:
    """Starts one training over and over, as a user of one or of several processes would."""

    def __init__(self, folder, processes=1, **settings):
        self.folder, self.run, self.processes = folder, folder / "run", processes
        self.config, self.killer = folder / "c.yaml", folder / "killer.py"
        self.config.write_text(yaml.safe_dump({**SETTINGS, **settings, "output_dir": str(self.run)}))
        self.killer.write_text(KILLER)
        self.kills = 0

    def start(self, dies_writing=None):
        """A new process; it goes on from the last checkpoint, or from the start where there is none yet."""
        script = ["train_dreambooth_atoms.py"] if dies_writing is None else [str(self.killer), dies_writing, "train"]
        if self.processes > 1:
            script = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={self.processes}", *script]
        going_on = ["--resume_from_checkpoint", "latest"] if self.step() else ["--overwrite"]
        return subprocess.Popen(
            [sys.executable, *script, "--config", str(self.config), *going_on],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=dict(
                os.environ, PYTHONPATH=os.getcwd(), **({"ACCELERATE_USE_CPU": "true"} if self.processes > 1 else {})
            ),
            start_new_session=True,
        )

    def step(self):
        """Of the newest checkpoint; 0 if there is none."""
        found = (self.run / "checkpoints").glob("checkpoint-*.safetensors")
        return max((int(path.stem.partition("-")[2]) for path in found), default=0)

    def logged(self):
        log = self.run / "log.jsonl"
        return log.read_text().count("\n") if log.exists() else 0

    def kill_starting(self, seconds):
        """Kills it that long after its start: before its first step, or before what it goes on from is read."""
        process = self.start()
        time.sleep(seconds)
        self.kill(process)

    def kill_encoding(self, cache):
        """Kills it as soon as it has written latents that were not in the cache."""
        before = shards(cache)
        process = self.start()
        self.wait(process, lambda: shards(cache).keys() - before.keys())
        assert not self.logged(), "it trains already"
        self.kill(process)

    def kill_training(self, seconds):
        """Kills it that long after its first step of its own."""
        log, step = self.run / "log.jsonl", self.step()
        before = log.stat().st_mtime_ns if log.exists() else None
        process = self.start()
        self.wait(process, lambda: self.logged() > step and log.stat().st_mtime_ns != before)
        time.sleep(seconds)
        self.kill(process)

    def kill_drawing(self, seconds):
        """Kills it that long after its first picture."""
        picture = self.run / "images" / "instance-00.png"
        before = picture.stat().st_mtime_ns if picture.exists() else None
        process = self.start()
        self.wait(process, lambda: picture.exists() and picture.stat().st_mtime_ns != before)
        time.sleep(seconds)
        assert process.poll() is None, "it was at its end already"
        self.kill(process)

    def kill_writing(self, name):
        """Lets it run until it dies half-way through writing the file of that name."""
        process = self.start(name)
        message = process.communicate(timeout=600)[1]
        assert process.returncode not in (0, 2), message
        if self.processes == 1:
            assert process.returncode == -9, message
        assert any(path.name.startswith(f".{name}.") for path in leftovers(self.run))
        self.kills += 1

    def kill(self, process):
        kill(process)
        self.kills += 1

    def wait(self, process, seen):
        deadline = time.monotonic() + 600
        while not seen():
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def finish(self):
        process = self.start()
        message = process.communicate(timeout=600)[1]
        assert process.returncode == 0, message


def shards(cache):
    """Files of latents and when each was written."""
    return {
        path: path.stat().st_mtime_ns for path in (cache / "latents").glob("*/*.safetensors") if path.name[0] != "."
    }


def kill(process):
    """SIGKILL for all of its processes; those of `torch.distributed.run` are in sessions of their own."""
    try:
        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    except psutil.NoSuchProcess:
        family = []
    for member in family:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(family, timeout=60)
    process.communicate(timeout=60)


def contents(path):
    """Tensors and, of a checkpoint, what its header says."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    return load_file(path), {key: value for key, value in metadata.items() if key != "sd_atoms"}


def assert_same_run(run, whole, steps):
    """Every number and picture that the run made is the same bit for bit, and nothing else lies about."""
    assert leftovers(run) == []
    names = {path.relative_to(run) for path in run.rglob("*") if path.is_file()}
    assert names == {path.relative_to(whole) for path in whole.rglob("*") if path.is_file()}
    files = [name for name in names if name.suffix == ".safetensors"]
    assert len(files) == 3 + 3  # checkpoints, and the adapter as a file and as a folder of two
    for name in files:
        (ours, about), (theirs, their_about) = contents(run / name), contents(whole / name)
        assert about == their_about
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert torch.equal(ours[key], theirs[key]), f"{name}: {key}"
    for name in names:
        assert name.suffix != ".png" or (run / name).read_bytes() == (whole / name).read_bytes(), name
    logs = [[json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()] for folder in (run, whole)]
    assert [entry["step"] for entry in logs[0]] == list(range(1, steps + 1))
    for ours, theirs in zip(*logs, strict=True):
        assert {**ours, "seconds": 0} == {**theirs, "seconds": 0}
    last = load_file(run / "checkpoints" / f"checkpoint-{steps}.safetensors")
    kinds = {key.partition(".")[0] for key in last}
    assert kinds == {"parameter", "mean", "best", "optimizer"}


@pytest.mark.slow
@pytest.mark.parametrize("processes", KILLS)
def test_a_run_killed_at_random_moments_equals_one_that_was_not(tmp_path, processes):
    rng, base = random.Random(processes), str(write_tiny_base(tmp_path / "tiny"))
    (tmp_path / "whole").mkdir()
    whole, runner = (
        Runner(folder, processes, pretrained_model_name_or_path=base, max_train_steps=STEPS)
        for folder in (tmp_path / "whole", tmp_path)
    )
    whole.finish()
    for number in range(KILLS[processes] - 3):
        if number % 3 == 0:
            runner.kill_training(rng.uniform(0, 1))
        elif number % 3 == 1:
            runner.kill_writing(f"checkpoint-{runner.step() + rng.choice([2, 4])}.safetensors")
        else:
            runner.kill_starting(rng.uniform(0, 10))
    runner.kill_writing("adapter_model.safetensors")
    runner.kill_writing("castle.safetensors")
    runner.kill_drawing(rng.uniform(0, 0.5))
    assert runner.kills == KILLS[processes]
    runner.finish()
    assert_same_run(runner.run, whole.run, STEPS)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_killed_while_encoding_encodes_what_is_missing(tmp_path, processes):
    base, photos, rng = str(write_tiny_base(tmp_path / "tiny")), tmp_path / "photos", random.Random(processes)
    photos.mkdir()
    for number in range(2100):
        Image.frombytes("RGB", (32, 32), rng.randbytes(3072)).save(photos / f"{number}.png")
    (tmp_path / "whole").mkdir()
    cache = tmp_path / "cache"
    whole, runner = (
        Runner(
            folder,
            processes,
            pretrained_model_name_or_path=base,
            instance_data_dir=str(photos),
            cache_dir=str(folder / "cache"),
            max_train_steps=6,
        )
        for folder in (tmp_path / "whole", tmp_path)
    )
    whole.finish()
    runner.kill_encoding(cache)
    first = shards(cache)
    runner.kill_encoding(cache)
    assert first.items() <= shards(cache).items()
    assert len(shards(cache)) < len(shards(tmp_path / "whole" / "cache"))
    runner.finish()
    assert first.items() <= shards(cache).items(), "what was there was encoded again"
    assert_same_run(runner.run, whole.run, 6)


def test_only_the_temporary_files_of_a_killed_process_are_cleared_away(tmp_path):
    kept = [
        tmp_path / name for name in (".a.png", ".env", ".a.b12345678.png", ".notes.txt.of_today", "a.b.txt", ".git")
    ]
    for path in kept:
        path.touch()
    (tmp_path / "deep").mkdir()
    with replacing(tmp_path / "deep" / "checkpoint-2.safetensors") as one, replacing(tmp_path / "c.yaml") as other:
        assert sorted(leftovers(tmp_path)) == sorted([one, other])
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("left", ["nothing", "a temporary file", "half of the old run"])
def test_overwrite_works_on_whatever_a_killed_start_left(tmp_path, left):
    runner = Runner(tmp_path, max_train_steps=1, num_instance_images=1, num_inference_steps=1)
    config = str(runner.config)
    runner.run.mkdir()
    if left == "a temporary file":
        (runner.run / ".config.yaml.abcd_123.yaml").write_text("pretrained")
    if left == "half of the old run":
        (runner.run / "config.yaml").write_text(runner.config.read_text())
        (runner.run / "images").mkdir()
    assert train_main(["--config", config, "--overwrite"]) == 0
    assert leftovers(runner.run) == []

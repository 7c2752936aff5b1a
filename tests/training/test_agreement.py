"""What does not depend on how many threads and processes there are. Sums in float32 come out otherwise in their last
bits, so this is what stays the same to 1e-6: the loss of every step, and the adapted filters (atoms with their change;
of the change alone, which is small against them, some more)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import train, write_photos, write_tiny_base

from sd_atoms import machine

CLOSE = 1e-6
SCRIPT = Path(__file__).parents[2] / "train_dreambooth_atoms.py"


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A run of three steps on the tiny base."""
    folder = tmp_path_factory.mktemp("agreement")
    base, photos = write_tiny_base(folder / "base"), write_photos(folder / "photos")
    text = (
        f"--pretrained_model_name_or_path {base} --instance_data_dir {photos} --placeholder_token <castle> "
        "--initializer_token castle --train_token_embedding --max_train_steps 3 --lr_warmup_steps 0 "
        "--num_instance_images 1 --num_inference_steps 1 --report_to none"
    )
    return [*text.split(), "--instance_prompt", "a <castle>"]


def trained_on(threads, words, monkeypatch):
    """Trains in this process on so many threads."""
    before = torch.get_num_threads()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(machine, "usable_cores", lambda: threads)
            train(words)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def assert_close(run, other):
    """The same losses, adapted filters and embedding rows to `CLOSE`."""
    ours, theirs = (load_file(folder / "castle.safetensors") for folder in (run, other))
    assert torch.equal(ours["atoms_initial.9x9"], theirs["atoms_initial.9x9"])  # bit for bit
    pairs = [[found["atoms_initial.9x9"] + found["atoms_delta.9x9"] for found in (ours, theirs)]]
    pairs.append([found["token.<castle>"] for found in (ours, theirs)])
    logs = [[json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()] for folder in (run, other)]
    pairs.append([torch.tensor([entry["loss"] for entry in log], dtype=torch.float64) for log in logs])
    for one, two in pairs:
        assert (one - two).norm() <= CLOSE * two.norm()
    change, other_change = ours["atoms_delta.9x9"], theirs["atoms_delta.9x9"]
    assert change.norm() > 0
    assert (change - other_change).norm() <= 1e-4 * other_change.norm()


def test_training_agrees_on_one_and_two_threads(words, tmp_path, monkeypatch):
    for threads in (1, 2):
        trained_on(
            threads, [*words, "--train_batch_size", "2", "--output_dir", str(tmp_path / str(threads))], monkeypatch
        )
    assert_close(tmp_path / "1", tmp_path / "2")


def test_training_agrees_on_one_and_two_processes(words, tmp_path, monkeypatch):
    trained_on(1, [*words, "--train_batch_size", "2", "--output_dir", str(tmp_path / "one")], monkeypatch)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(SCRIPT)]
    run = subprocess.run(
        [sys.executable, *launch, *words, "--train_batch_size", "1", "--output_dir", str(tmp_path / "two")],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env=dict(os.environ, ACCELERATE_USE_CPU="true"),
    )
    assert run.returncode == 0, run.stderr
    assert json.loads((tmp_path / "two" / "env.json").read_text())["processes"] == 2
    assert_close(tmp_path / "two", tmp_path / "one")

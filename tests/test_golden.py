"""What a checkout of the past made, made again: the same losses, numbers, pictures and files.

`golden/README.md` says what the files are and how they were made. Only command lines, `load_atoms`, `save_atoms` and
plain diffusers are used here, so that these tests outlast any move of modules.

Bits differ between processors: with other vector instructions than the machine's that made them, losses were within
6e-7, numbers within 9e-6 of their norm and pictures within 1 grey level; in bf16 2e-3, 3e-2 and 12 grey levels.
"""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import DDIMScheduler, StableDiffusionPipeline
from golden import make
from PIL import Image
from safetensors import safe_open
from tiny import one_core, train

from sd_atoms import load_atoms, save_atoms

GOLDEN = Path(__file__).parent / "golden" / "eab832a"
SLOW = ("bf16", "resume")  # the one by its tolerances tells little, the other is finished below
CASES = [pytest.param(case, marks=pytest.mark.slow if case in SLOW else ()) for case in make.CASES]
MADE_ELSEWHERE = ("versions", "fingerprint")  # entries of a header that tell of libraries, or have rounded sums


@pytest.fixture(scope="module", autouse=True)
def _one_core():
    """As the golden runs were made."""
    with one_core():
        yield


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """The folder that the golden runs were made in."""
    folder = tmp_path_factory.mktemp("golden")
    make.write_inputs(folder)
    return folder


def opened(inputs, case):
    """The tiny base by plain diffusers, in the precision of a case."""
    dtype = torch.bfloat16 if case == "bf16" else torch.float32
    pipe = StableDiffusionPipeline.from_pretrained(inputs / "tiny", dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe, about):
    """The first picture of a run, from what the header of its adapter says."""
    sampling = about["sampling"]
    own = pipe.scheduler
    if sampling["scheduler"] == "ddim":
        pipe.scheduler = DDIMScheduler.from_config(own.config)
    image = pipe(
        about["instance_prompt"],
        height=about["resolution"],
        width=about["resolution"],
        num_inference_steps=sampling["num_inference_steps"],
        guidance_scale=sampling["guidance_scale"],
        generator=torch.Generator().manual_seed(0),
    ).images[0]
    pipe.scheduler = own
    return np.asarray(image, dtype=int)


def grey(path):
    return np.asarray(Image.open(path), dtype=int)


def header(path):
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["sd_atoms"])


def at_least(entry, old):
    """The same as in the older header; of a text encoder's adapter all settings are told now."""
    return old.items() <= entry.items() if isinstance(old, dict) and "peft_type" in old else entry == old


def tensors(path):
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)


def check_run(made, case):
    """A run folder against what is kept of the golden one."""
    golden = GOLDEN / case
    rough = case == "bf16"

    # losses
    log, old_log = make.read_log(made / "log.jsonl"), make.read_log(golden / "log.jsonl")
    assert [entry.keys() for entry in log] == [entry.keys() for entry in old_log]
    near = {"loss": 1e-5, "validation_loss": 1e-5, "grad_norm": 1e-4, "learning_rate": 1e-12, "step": 0}
    if rough:
        near |= {"loss": 1e-2, "grad_norm": 5e-2}
    for key, apart in near.items():
        values, old_values = ([entry[key] for entry in entries if key in entry] for entries in (log, old_log))
        assert values == pytest.approx(old_values, rel=apart, abs=0), key

    # the adapter
    (file,) = made.glob("*.safetensors")
    numbers, old_numbers = tensors(file), tensors(golden / "adapter.safetensors")
    assert numbers.keys() == old_numbers.keys()
    for key, old in old_numbers.items():
        assert (numbers[key].dtype, numbers[key].shape) == (old.dtype, old.shape)
        assert (numbers[key] - old).norm() <= (0.1 if rough else 1e-4) * old.norm(), key
    about, old_about = header(file), header(golden / "adapter.safetensors")
    assert about.keys() == old_about.keys()
    for key in about.keys() - set(MADE_ELSEWHERE):
        assert at_least(about[key], old_about[key]), key

    # the rest of the folder; settings may be added, but none may go or change
    old_run = json.loads((golden / "run.json").read_text(encoding="utf-8"))
    assert sorted(path.relative_to(made).as_posix() for path in made.rglob("*") if path.is_file()) == old_run["files"]
    settings = yaml.safe_load((made / "config.yaml").read_text(encoding="utf-8"))
    old_settings = yaml.safe_load("\n".join(old_run["config"]))
    assert old_settings.pop("with_prior_preservation") is False  # the other name of prior: images is written no more
    assert {key: settings.get(key, "gone") for key in old_settings} == old_settings
    metrics = json.loads((made / "metrics.json").read_text(encoding="utf-8"))
    del metrics["training"]["seconds"], metrics["training"]["peak_memory_bytes"]
    old_training = old_run["metrics"]["training"]
    assert metrics.keys() == old_run["metrics"].keys()
    assert metrics["training"].pop("kept_step") == old_training.pop("kept_step")
    assert metrics["training"].pop("method") == "atoms"  # is said since there are others
    assert metrics["training"].pop("relative_change") > 0  # is said since this is measured
    assert metrics["training"] == pytest.approx(old_training, rel=1e-2 if rough else 1e-5)
    for who, scores in old_run["metrics"].get("clip", {}).items():
        assert metrics["clip"][who].keys() == scores.keys(), who  # their values are of the CLIP of that time

    if not rough:
        assert np.abs(grey(made / "images" / "instance-00.png") - grey(golden / "picture.png")).max() <= 1


def test_the_inputs_are_those_of_the_golden_runs(inputs):
    # if this fails, so does all below: the packaged tokenizer or tests/tiny.py has changed
    assert make.inputs_told(inputs) == json.loads((GOLDEN / make.INPUTS).read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", CASES)
def test_training_anew_gives_the_same_run(case, inputs, monkeypatch):
    monkeypatch.chdir(inputs)
    for words in make.commands(case):
        train(words)
    check_run(inputs / case, case)
    shutil.rmtree(inputs / case)


def test_a_run_that_was_stopped_then_is_finished_now(inputs, monkeypatch):
    monkeypatch.chdir(inputs)
    shutil.copytree(GOLDEN / "resume" / make.STOPPED, "resume")
    train(make.commands("resume")[1])
    check_run(inputs / "resume", "resume")
    old, new = (make.read_tensors(inputs / "resume" / "checkpoints" / f"checkpoint-{n}.safetensors") for n in (4, 8))
    assert new[0].keys() == old[0].keys() | {"data"}  # which the older version does not look at
    assert new[1] == old[1]  # so that the older version could go on with it as well
    shutil.rmtree("resume")


@pytest.mark.parametrize("case", make.CASES)
def test_a_golden_adapter_draws_its_picture(case, inputs):
    pipe = opened(inputs, case)
    about = load_atoms(pipe, GOLDEN / case / "adapter.safetensors").about
    golden = grey(GOLDEN / case / "picture.png")
    apart = np.abs(drawn(pipe, about) - golden)
    pipe.disable_lora()
    without = np.abs(drawn(pipe, about) - golden)
    assert without.max() > 10
    if case == "bf16":
        assert apart.mean() < 1.5 < without.mean()
    else:
        assert apart.max() <= 1


@pytest.mark.parametrize("case", make.CASES)
def test_a_golden_adapter_read_and_written_again_is_the_same(case, inputs, tmp_path):
    golden = GOLDEN / case / "adapter.safetensors"
    source = golden
    for place in ("folder", "again.safetensors"):  # by way of a folder, which has to hold all of it too
        pipe = opened(inputs, "any")
        artefact = load_atoms(pipe, source, "concept")
        source = save_atoms(pipe, tmp_path / place, "concept", tokens=list(artefact.tokens), about=artefact.about)
    entries, places, content = make.read_tensors(source)
    old_entries, old_places, old_content = make.read_tensors(golden)
    assert entries.keys() == old_entries.keys()
    assert places == old_places
    assert content == old_content
    about, old_about = header(source), header(golden)
    assert list(about) == list(old_about)
    for entry in about.keys() - {*MADE_ELSEWHERE}:
        assert at_least(about[entry], old_about[entry]), entry


def test_every_number_of_the_golden_runs_is_a_number():
    for case in make.CASES:
        for key, value in tensors(GOLDEN / case / "adapter.safetensors").items():
            assert value.isfinite().all(), key
        assert all(math.isfinite(entry["loss"]) for entry in make.read_log(GOLDEN / case / "log.jsonl"))

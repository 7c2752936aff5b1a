"""`bench step`: methods are measured alike, on UNets and classifiers, and one that fails fails alone."""

import json
import re
import sys

import pytest
import torch
from tiny_unet import TINY

from sd_atoms.bench import architectures, step, worker
from sd_atoms.bench.classifiers import CLASSIFIERS, build_classifier
from sd_atoms.bench.methods import OTHERS, attach
from sd_atoms.classify.config import NOT_OFFERED
from sd_atoms.cli import main
from sd_atoms.methods import all_methods
from sd_atoms.pipeline.architectures import build_unet
from sd_atoms.tuner import named_targets


def measure(method, **changes):
    job = dict(method=method, resolution_px=32, batch_size=2, steps=2, threads=1, device="cpu", dtype="fp32")
    return worker.measure({"config": TINY, **job, **changes})


def test_step_compares_methods_and_a_failing_one_fails_alone(bench, monkeypatch, tmp_path):
    usual = step.worker_command

    def out_of_memory(job, result):
        if job["method"] == "naive":
            return [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]
        if job["method"] == "locon:rank=2":
            return [sys.executable, "-c", "raise RuntimeError('no memory left on the card')"]
        return usual(job, result)

    monkeypatch.setattr(step, "worker_command", out_of_memory)
    file = tmp_path / "step.json"
    methods = "naive,floor,locon:rank=2,atoms"
    sizes = ["--resolution", "32", "--rounds", "1", "--steps", "1"]
    printed = bench("step", "--methods", methods, *sizes, "--json", str(file))

    result = json.loads(file.read_text())
    entries = {entry["method"]: entry for entry in result["methods"]}
    assert list(entries) == ["naive", "floor", "locon:rank=2", "atoms"]
    assert entries["floor"]["seconds_to_floor"] == entries["floor"]["memory_to_floor"] == 1
    assert entries["atoms"]["seconds_to_floor"] > 0
    assert entries["atoms"]["trainable_numbers"] == 81 * len(named_targets(build_unet(TINY, "meta"), "conv3x3"))
    assert "SIGKILL" in entries["naive"]["failure"]
    assert entries["locon:rank=2"]["failure"] == "RuntimeError: no memory left on the card"
    assert "locon:rank=2 failed: RuntimeError: no memory left on the card" in printed
    assert result["settings"]["resolution_px"] == 32
    assert result["machine"]["threads"] == 1
    assert result["machine"]["torch"] == torch.__version__


@pytest.mark.parametrize("method", [*OTHERS, *(name for name in all_methods() if name != "token")])
def test_every_method_takes_its_steps(method):
    result = measure(method)
    assert len(result["seconds"]) == 2
    assert min(result["seconds"]) > 0
    assert result["peak_bytes"] > 2**20
    assert (result["trainable_numbers"] == 0) == (method == "floor")


# PEFT's OFT cannot take ConvNeXt's channels-last Linear layers, and ResNet has none besides the head
CLASSIFIER_METHODS = [*OTHERS, *(name for name in all_methods() if name not in (*NOT_OFFERED, "oft"))]
RESNET = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}


@pytest.mark.parametrize(
    "config",
    [{"model_type": "convnext", "hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}, RESNET],
    ids=lambda config: config["model_type"],
)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("method", CLASSIFIER_METHODS)
def test_every_method_takes_its_steps_in_a_classifier(method, dtype, config):
    result = measure(method, config=config, dtype=dtype)
    assert min(result["seconds"]) > 0
    assert (result["trainable_numbers"] == 0) == (method == "floor")


def test_a_classifier_takes_no_images_but_those_of_its_steps_size(monkeypatch):
    """The trial of an adapted network, one image, is no larger than what is measured."""
    shapes, build = [], worker.build_classifier

    def watched(*arguments):
        classifier = build(*arguments)
        classifier.network.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape)))
        return classifier

    monkeypatch.setattr(worker, "build_classifier", watched)
    measure("atoms", config=RESNET, steps=1)
    assert shapes == [(1, 3, 32, 32), (2, 3, 32, 32), (2, 3, 32, 32)]


def test_classifiers_have_the_published_sizes():
    sizes = {"convnext-b": 88_591_464, "resnet50": 25_557_032}
    for arch, size in sizes.items():
        with torch.device("meta"):
            classifier = build_classifier(CLASSIFIERS[arch], 224, "meta")
        assert sum(parameter.numel() for parameter in classifier.parameters()) == size


def test_a_classifier_is_measured_by_the_command(bench, monkeypatch):
    monkeypatch.setitem(step.CLASSIFIERS, "resnet50", RESNET)
    words = ["--resolution", "36", "--rounds", "1", "--steps", "1", "--methods", "floor,atoms"]
    printed = bench("step", "--arch", "resnet50", *words)
    assert "resnet50, 36 px" in printed
    assert "1.00×" in printed


@pytest.mark.parametrize("method", ["floor", "atoms", "naive"])
def test_steps_run_in_bfloat16(method):
    assert len(measure(method, dtype="bf16", steps=1)["seconds"]) == 1


def test_naive_computes_what_atoms_compute():
    gradients = {}
    for method in ("naive", "atoms:form=weight"):
        unet = build_unet(TINY, "cpu")
        trained = attach(unet, method)
        inputs = architectures.step_inputs(TINY, 1, 32, "cpu", torch.float32)
        unet(*inputs).sample.square().mean().backward()
        gradients[method] = torch.stack([parameter.grad for parameter in trained])
    assert gradients["naive"].abs().max() > 0
    torch.testing.assert_close(gradients["naive"], gradients["atoms:form=weight"], rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--methods", "floor,dora"], "--methods: 'dora' is unknown; floor, naive, atoms"),
        (["--methods", "locon:rank=0"], "locon:rank=0: rank: 0 is out of range"),
        (["--methods", "locon:m=9"], "locon:m=9: m: locon has rank, alpha, target"),
        (["--methods", "naive:m=6"], "naive:m=6: m: naive has no settings"),
        (["--methods", "floor:rank=3"], "floor:rank=3: rank: floor has no settings"),
        (["--methods", "atoms:method=lora"], "atoms:method=lora: method: atoms has m, m1"),
        (["--methods", "difffit:target=conv"], "difffit:target=conv: target: difffit has no settings"),
        (["--methods", "floor,floor"], "--methods: 'floor' comes twice"),
        (["--resolution", "100"], "--resolution 100: a multiple of 8"),
    ],
)
def test_bad_settings_are_refused_before_anything_runs(capsys, words, message):
    assert main(["bench", "step", *words]) == 2
    assert re.search(message, capsys.readouterr().err)

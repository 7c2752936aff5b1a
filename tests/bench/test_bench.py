"""`sd-atoms bench`: methods are measured alike, one that fails fails alone, the architectures are the real ones."""

import json
import re
import sys

import pytest
import torch
from PIL import Image
from torch import nn

from sd_atoms.bench import architectures, decompose, forms, pocket, serve, step, worker
from sd_atoms.bench.architectures import conv3x3_calls
from sd_atoms.bench.classifiers import CLASSIFIERS, build_classifier
from sd_atoms.bench.methods import OTHERS, attach
from sd_atoms.classify.config import NOT_OFFERED
from sd_atoms.cli import main
from sd_atoms.methods import all_methods
from sd_atoms.pipeline.architectures import SD_V1_4, build_unet, unet_config
from sd_atoms.tuner import AtomsConfig, named_targets

TINY = {
    **SD_V1_4,
    "sample_size": 4,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "block_out_channels": [16, 32],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 8,
    "attention_head_dim": 2,
}


@pytest.fixture
def bench(monkeypatch, capsys):
    """Runs a bench command line on a tiny UNet and returns what it printed."""
    for module in (step, serve, decompose, forms):
        monkeypatch.setattr(module, "unet_config", lambda arch: TINY)

    def run(*words):
        assert main(["bench", *words, "--threads", "1"]) == 0
        return capsys.readouterr().out

    threads = torch.get_num_threads()
    yield run
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def sd_unet():
    return build_unet(SD_V1_4, "meta")


def measure(method, **changes):
    job = dict(method=method, resolution=32, batch_size=2, steps=2, threads=1, device="cpu", dtype="fp32")
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


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "convnext", "hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
        {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
    ],
    ids=lambda config: config["model_type"],
)
@pytest.mark.parametrize("method", CLASSIFIER_METHODS)
def test_every_method_takes_its_steps_in_a_classifier(method, config):
    result = measure(method, config=config)
    assert min(result["seconds"]) > 0
    assert (result["trainable_numbers"] == 0) == (method == "floor")


def test_classifiers_have_the_published_sizes():
    sizes = {"convnext-b": 88_591_464, "resnet50": 25_557_032}
    for arch, size in sizes.items():
        with torch.device("meta"):
            classifier = build_classifier(CLASSIFIERS[arch], "meta")
        assert sum(parameter.numel() for parameter in classifier.parameters()) == size


def test_a_classifier_is_measured_by_the_command(bench, monkeypatch):
    tiny = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    monkeypatch.setitem(step.CLASSIFIERS, "resnet50", tiny)
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


def test_sd_architecture_has_the_published_size(sd_unet):
    assert sum(parameter.numel() for parameter in sd_unet.parameters()) == 859_520_964
    assert len(named_targets(sd_unet, "conv3x3")) == 52
    assert len(named_targets(sd_unet, "conv")) == 98
    assert sum(type(module) is nn.Linear for module in sd_unet.modules()) == 184


@pytest.mark.parametrize(("m", "numbers"), [(9, 4_212), (6, 2_808)])
def test_atoms_of_the_sd_architecture(m, numbers):
    unet = build_unet(SD_V1_4, "meta")
    # in inference mode nothing is decomposed, so that weights without values will do
    unet.add_adapter(AtomsConfig(m=m, target_modules="conv3x3", inference_mode=True))
    changes = [parameter for name, parameter in unet.named_parameters() if ".atoms_delta." in name]
    assert sum(change.numel() for change in changes) == numbers


def test_more_atoms_than_taps_are_refused(sd_unet):
    with pytest.raises(ValueError, match="9 taps, fewer than m=12"):
        sd_unet.add_adapter(AtomsConfig(m=12, target_modules="conv3x3", inference_mode=True))


@pytest.mark.parametrize(("method", "numbers"), [("lora", 797_184), ("loha", 4_377_920)])
def test_baselines_of_the_sd_architecture(method, numbers):
    assert sum(parameter.numel() for parameter in attach(build_unet(SD_V1_4, "meta"), method)) == numbers


def test_conv_calls_of_the_sd_architecture():
    calls = conv3x3_calls(SD_V1_4, batch_size=1, resolution_px=512)
    assert sum(call.count for call in calls) == 52
    assert sum(call.count * call.in_channels * call.out_channels for call in calls) * 9 == 541_002_240
    assert calls[0][:3] == (4, 320, (64, 64))
    halving = [call for call in calls if call.geometry.stride == (2, 2)]
    assert [call.output_size for call in halving] == [(32, 32), (16, 16), (8, 8)]


def test_decompose_covers_every_convolution(bench, tmp_path):
    file = tmp_path / "decompose.json"
    bench("decompose", "--rounds", "2", "--json", str(file))
    result = json.loads(file.read_text())
    assert result["layers"] == len(named_targets(build_unet(TINY, "meta"), "conv"))
    assert sum(result["layers_by_kernel"].values()) == result["layers"]
    assert set(result["layers_by_kernel"]) == {"1×1", "3×3"}
    assert result["largest_relative_error"]["error"] < 1e-5
    assert 0 < result["slowest"]["seconds_median"] < result["seconds_median"]


def test_serve_times_every_way_and_the_swap(bench, tmp_path):
    file = tmp_path / "serve.json"
    printed = bench("serve", "--resolution", "32", "--rounds", "2", "--steps", "1", "--json", str(file))
    result = json.loads(file.read_text())
    assert [entry["way"] for entry in result["ways"]] == ["base", "atoms unmerged", "LoRA unmerged", "atoms merged"]
    assert result["ways"][0]["to_base"] == 1
    assert 0 < result["hotswap"]["seconds_min"] <= result["hotswap"]["seconds_median"]
    assert "hot-swap of a file" in printed


def test_what_serve_draws_with_is_adapted_and_shares_the_base():
    base = build_unet(TINY, "cpu").eval()
    adapted = serve._adapted(base, TINY, "atoms")
    inputs = architectures.step_inputs(TINY, 2, 32, "cpu", torch.float32)
    with torch.no_grad():
        assert not torch.equal(base(*inputs).sample, adapted(*inputs).sample)
    assert base.conv_in.weight.data_ptr() == adapted.conv_in.base_layer.weight.data_ptr()


def test_sparse_compares_both_solvers_on_the_same_rows(bench, tmp_path):
    file = tmp_path / "sparse.json"
    printed = bench("sparse", "--channels", "16", "--m", "6", "--rounds", "1", "--json", str(file))
    result = json.loads(file.read_text())
    ours, theirs = result["solvers"]["ours"], result["solvers"]["coordinate descent"]
    assert result["rows"] == 256
    assert ours["objective"] <= theirs["objective"]
    assert f"coordinate descent takes {result['ratio']:.1f} times as long" in printed


def test_forms_times_every_shape_and_adds_up(bench, tmp_path):
    file = tmp_path / "forms.json"
    printed = bench("forms", "--resolution", "32", "--rounds", "1", "--json", str(file))
    result = json.loads(file.read_text())
    assert sum(layer["count"] for layer in result["layers"]) == len(named_targets(build_unet(TINY, "meta"), "conv3x3"))
    total = result["seconds_total"]
    assert total["best of each"] <= min(total["auto"], total["weight"], total["activation"])
    assert f"{total['floor']:.2f}" in printed
    assert result["best_reach"]["seconds"] >= total["best of each"]


def test_best_reach_is_where_the_forms_cross():
    def layer(positions_per_channel, weight, activation):
        seconds = {"floor": 1.0, "weight": weight, "activation": activation}
        return dict(count=2, positions_per_channel=positions_per_channel, beyond_reach="weight", seconds=seconds)

    layers = [layer(4.0, 1.0, 3.0), layer(0.5, 3.0, 1.0), layer(1.5, 2.0, 1.5)]
    assert forms.best_reach(layers) == {"from": 1.5, "below": 4.0, "seconds": 2 * (1.0 + 1.0 + 1.5)}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["step", "--methods", "floor,dora"], "--methods: 'dora' is unknown; floor, naive, atoms"),
        (["step", "--methods", "locon:rank=0"], "locon:rank=0: rank: 0 is out of range"),
        (["step", "--methods", "floor,floor"], "--methods: 'floor' comes twice"),
        (["step", "--resolution", "100"], "--resolution 100: a multiple of 8"),
        (["forms", "--resolution", "100"], "--resolution 100: a multiple of 8"),
    ],
)
def test_bad_settings_are_refused_before_anything_runs(capsys, words, message):
    assert main(["bench", *words]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_pocket_is_a_unet_of_its_own():
    config = unet_config("pocket")
    assert sum(parameter.numel() for parameter in build_unet(config, "meta").parameters()) < 20e6


@pytest.mark.slow
def test_data_measures_sets_and_their_draws(bench, tmp_path):
    printed = bench("data", "--sizes", "6", "--folder", str(tmp_path), "--json", str(tmp_path / "data.json"))
    (entry,) = json.loads((tmp_path / "data.json").read_text())["sets"]
    assert entry["pictures"] == len(list((tmp_path / "6").iterdir())) == 6
    assert min(entry[key] for key in entry if key.endswith(("_per_second", "_per_draw"))) > 0
    assert "check + encode s" in printed


@pytest.mark.parametrize("sizes", ["", "5,", "0", "many", "-1"])
def test_sizes_that_are_none_are_refused(sizes, capsys):
    assert main(["bench", "data", "--sizes", sizes]) == 2
    assert "integers from 1 on" in capsys.readouterr().err


def test_pocket_counts_pictures_whose_best_prompt_is_their_own(bench, monkeypatch, tmp_path):
    """Grey pictures all have the same best prompt: their own once in twenty, or forty; the renderer's have others."""
    grey = Image.new("RGB", (128, 128), "grey")
    monkeypatch.setattr(pocket, "generate", lambda pipe, requests, sampling: [(request, grey) for request in requests])
    told = bench("pocket", "--seeds", "2", "--json", str(tmp_path / "a.json"), "--sheet", str(tmp_path / "a.png"))
    assert re.search("castle.*canal.*held_out", told, re.DOTALL)
    match = json.loads((tmp_path / "a.json").read_text())["match"]
    for name, share, count in (("castle", 1 / 20, 40), ("canal", 1 / 20, 40), ("held_out", 1 / 40, 40)):
        assert (match[name]["base"]["value"], match[name]["base"]["n"]) == (pytest.approx(share), count)
        assert match[name]["base"]["low"] <= share <= match[name]["base"]["high"]
        assert match[name]["renderer"]["value"] > 0.7
    with Image.open(tmp_path / "a.png") as sheet:
        assert sheet.width > 8 * 160  # four pairs in each of ten lines
        assert sheet.height > 10 * 160


def test_pocket_sheet_is_not_written_over(bench, tmp_path, capsys):
    (tmp_path / "a.png").write_bytes(b"kept")
    assert main(["bench", "pocket", "--sheet", str(tmp_path / "a.png")]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (tmp_path / "a.png").read_bytes() == b"kept"

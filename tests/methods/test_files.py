"""What a run of every method leaves behind, taken by the other commands, by plain diffusers, by plain PEFT."""

import json
import os
import shlex
import subprocess
import sys

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from runs import (
    METHODS,
    PLAIN_PROMPT,
    PROMPT,
    PUT_IN,
    command_line,
    drawn,
    opened,
    parameters,
    pixels,
    predicted,
    run,
    same,
    words,
)
from safetensors.torch import load_file

import sd_atoms
from sd_atoms.bench.methods import attach, parse_methods
from sd_atoms.cli import train_main
from sd_atoms.errors import UserError
from sd_atoms.methods import all_methods
from sd_atoms.methods.adapters import merge_adapters, set_adapters
from sd_atoms.pipeline import add_placeholder_tokens, read_artefact

pytestmark = pytest.mark.usefixtures("on_one_core")


def loaded(place, source, **settings):
    """A new pipeline with an adapter."""
    pipe = opened(place, **settings)
    sd_atoms.load_adapter(pipe, source)
    return pipe


# The other commands


@pytest.mark.parametrize("method", METHODS)
def test_inspect_measures_what_merging_adds(place, trained, tmp_path, method, capsys):
    code = command_line("inspect", trained(method).folder, "--json", tmp_path / "numbers.json", "--top", "0")
    printed = capsys.readouterr()
    if method == "token":
        assert code == 2
        assert printed.err.endswith("it has tokens alone and changes no layer\n")
        return
    assert code == 0
    pipe = loaded(place, trained(method).file)
    before = {name: value.clone() for name, value in pipe.unet.named_parameters()}
    merge_adapters(pipe.unet)
    changes = {name: (value - before[name], before[name]) for name, value in pipe.unet.named_parameters()
               if ".base_layer." in name}  # fmt: skip
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    for layer in numbers["layers"]:
        change, weight = changes[f"{layer['layer']}.base_layer.weight"]
        relative = float(change.norm() / weight.norm())
        assert layer["relative_change"] == pytest.approx(relative, rel=1e-3, abs=1e-6), layer["layer"]
    biases = [pair for name, pair in changes.items() if name.endswith(".bias") and pair[0].any()]
    assert (numbers["bias_change"] is not None) == (method in ("difffit", "bitfit", "norm", "full"))
    if biases:
        moved, whole = (sum(float(pair[place].square().sum()) for pair in biases) for place in (0, 1))
        assert numbers["bias_change"] == pytest.approx((moved / whole) ** 0.5, rel=0.2)
        assert "over the trained biases" in printed.out
    assert max(numbers["relative_change"], numbers["bias_change"] or 0) > 1e-3
    assert f"\n{'atoms     m=9' if method == 'atoms' else f'method    {method}'}" in printed.out
    assert numbers["trained_numbers"] == trained(method).outcome.trainable_params


@pytest.mark.parametrize("method", METHODS)
def test_what_is_shared_loads_and_its_card_says_how(place, trained, method, capsys):
    made = trained(method)
    assert command_line("share", made.folder) == 0
    load = "load_atoms" if method == "atoms" else "load_adapter"
    assert f"\nTo load it: {load}(pipe, '{made.folder / 'share'}')\n" in capsys.readouterr().out
    card = (made.folder / "share" / "README.md").read_text()
    name = "filter atoms" if method == "atoms" else method
    assert f"\n# castle: {name} for tiny\n" in card
    assert f"\nfrom sd_atoms import {load}\n" in card
    assert f'\n{load}(pipe, "castle.safetensors")' in card
    assert ("filter" in card) == (method == "atoms")
    assert f"| Learning rates | {'0.001' if method == 'full' else '0.02'} ({name.removeprefix('filter ')})" in card
    for source in (made.folder / "share", made.folder / "share" / "castle.safetensors"):
        assert read_artefact(source).digest() == read_artefact(made.file).digest()
        assert (drawn(loaded(place, source)) == made.picture()).all()


@pytest.mark.parametrize("method", METHODS)
def test_doctor_counts_what_is_trained(place, trained, tmp_path, method, capsys):
    made = trained(method)
    assert command_line("doctor", "--config", made.folder / "config.yaml", "--output_dir", tmp_path / "new") == 0
    count = made.outcome.trainable_params
    expected = "16 of embedding rows" if method == "token" else f"{count:,} of {method} and 16 of embedding rows"
    assert f"trained numbers: {expected}\n" in capsys.readouterr().out
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("method", METHODS)
def test_drift_is_of_the_adapter(place, trained, tmp_path, method):
    numbers = tmp_path / "drift.json"
    drift = ["drift", "--adapter", trained(method).file, "--prompts", place / "unrelated.txt", "--seeds", "0"]
    assert command_line(*drift, "--clip_model_name_or_path", "pocket:clip", "--json", numbers) == 0
    value = json.loads(numbers.read_text())["drift"]
    assert value == 0 if method == "token" else value > 0


def test_the_printed_next_step_works(place, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for method in ("atoms", "lokr"):
        made = run(place, method, tmp_path / method)
        line = next(line for line in capsys.readouterr().out.splitlines() if line.strip().startswith("python -c"))
        exec(shlex.split(line)[2], {})
        assert (pixels("night.png").shape) == (64, 64, 3)
        assert made.file.exists()


# Others' programs


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("lora", {}),
        ("lora", dict(alpha=1.0)),
        ("lora", dict(train_text_encoder=True, text_adapter="lora", text_learning_rate=0.3)),
        ("locon", {}),
        ("locon", dict(alpha=8.0, rank=2)),
    ],
)
def test_plain_diffusers_reads_a_lora_file(place, tmp_path, method, settings):
    made = run(place, method, tmp_path / "run", **settings)
    plain = StableDiffusionPipeline.from_pretrained(place / "tiny", safety_checker=None)
    plain.set_progress_bar_config(disable=True)
    base = drawn(plain, PLAIN_PROMPT)
    plain.load_lora_weights(str(made.folder), weight_name="castle.safetensors")
    assert (drawn(plain, PLAIN_PROMPT) != base).any()
    add_placeholder_tokens(plain, read_artefact(made.file).tokens)
    assert (drawn(plain) == made.picture()).all()
    assert (drawn(loaded(place, made.file)) == made.picture()).all()


@pytest.mark.parametrize("method", PUT_IN)
def test_plain_peft_reads_the_adapter_folder(place, trained, method):
    made, plain = trained(method), opened(place)
    before = predicted(plain.unet)
    unet = PeftModel.from_pretrained(plain.unet, str(made.folder / "adapter"))
    assert not torch.equal(predicted(unet), before)
    assert torch.equal(predicted(unet), predicted(loaded(place, made.file).unet))


@torch.no_grad()
@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_k"], rank_pattern={"to_k": 2},
                   alpha_pattern={"to_q": 1}),
        LoraConfig(r=2, target_modules=r".*\.to_[qv]", use_rslora=True),
        IA3Config(target_modules=["to_v", "net.2"], feedforward_modules=["net.2"]),
    ],
    ids=["lora", "rslora", "ia3"],
)  # fmt: skip
def test_folders_of_plain_peft_load(place, tmp_path, config):
    pipe, plain = opened(place), opened(place)
    before = predicted(pipe.unet)
    adapted = get_peft_model(plain.unet, config)
    generator = torch.Generator().manual_seed(1)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(tmp_path / "plain")
    artefact = sd_atoms.load_adapter(pipe, tmp_path / "plain", "plain")
    assert artefact.method == f"peft-{config.peft_type.value.lower()}"
    assert torch.equal(predicted(pipe.unet), predicted(adapted))
    assert not torch.equal(predicted(pipe.unet), before)
    again = sd_atoms.save_adapter(pipe, tmp_path / "again.safetensors", "plain")
    assert torch.equal(predicted(loaded(place, again).unet), predicted(adapted))
    pipe.delete_adapters("plain")
    assert torch.equal(predicted(pipe.unet), before)


# Tuners that are in no table


CONFIGS = {
    "ia3": dict(peft_type="IA3", target_modules=["to_k", "to_v"], feedforward_modules=[]),
    "fourierft": dict(peft_type="FOURIERFT", target_modules=["to_k"], n_frequency=20, init_weights=True),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_any_tuner_of_peft_trains_by_its_config(place, tmp_path, capsys, kind):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(CONFIGS[kind]))
    made = run(place, "atoms", tmp_path / "run", peft_config=config)
    assert made.outcome.method == f"peft-{kind}"
    assert (made.picture() != made.picture("base-instance-00")).any()
    for source in (made.file, made.folder / "adapter"):
        assert (drawn(loaded(place, source)) == made.picture()).all()
    (made.folder / "checkpoints" / "checkpoint-4.safetensors").unlink()
    whole = load_file(made.file)
    again = run(place, "atoms", made.folder, peft_config=config, resume_from_checkpoint="latest")
    assert same(load_file(again.file), whole)
    assert command_line("share", made.folder) == 0
    card = (made.folder / "share" / "README.md").read_text()
    assert f"\n# castle: peft-{kind} for tiny\n" in card
    assert 'load_adapter(pipe, "castle.safetensors")' in card
    assert "load_atoms" not in card
    assert str(tmp_path) not in card
    capsys.readouterr()
    for settings, message in (
        (dict(learning_rate=None), f"error: learning_rate is required: method peft-{kind} has no usual one"),
        (dict(m=4), f"m: a setting of atoms, not of method peft-{kind}; it has none"),
    ):
        assert train_main(words(place, "atoms", tmp_path / "other", peft_config=config, **settings)) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
    assert train_main(words(place, "lora", tmp_path / "other", peft_config=config)) == 2
    assert "peft_config stands in place of method=lora" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


GAIN = """
import torch
from dataclasses import dataclass
from enum import Enum
from torch import nn
from sd_atoms.methods import Method
from sd_atoms.methods.config import TargetConfig
from sd_atoms.methods.layer import DeltaLayer
from sd_atoms.tuner.tuned import TunedModel, register_tuner

Kind = Enum("Kind", {"GAIN": "OUTSIDE_GAIN"}, type=str)

@dataclass
class GainConfig(TargetConfig):
    def __post_init__(self):
        self.peft_type = Kind.GAIN
        super().__post_init__()

class GainLayer(DeltaLayer):
    adapter_layer_names = ("gain_of",)

    def __init__(self, base_layer, adapter_name):
        super().__init__(base_layer, adapter_name)
        self.gain_of = nn.ParameterDict()

    def update_layer(self, adapter_name, config, name):
        self.gain_of[adapter_name] = self._new(torch.zeros(len(self.original("weight"))))
        self._added(adapter_name, config)

    def delta(self, adapter):
        weight = self.original("weight")
        return weight * self.gain_of[adapter].view(-1, *(1,) * (weight.dim() - 1))

class GainModel(TunedModel):
    prefix, tuner_layer_cls = "gain_", GainLayer

register_tuner(GainConfig, GainModel, "OUTSIDE_GAIN")
METHOD = Method(
    name="gain", help="a factor for every output",
    build=lambda model, settings, target: GainConfig(target_modules=target),
    kind=lambda name: "scale", main_kinds=("scale",), rates={"scale": 1e-3}, default_target="conv+linear",
)
"""


def test_a_method_of_another_package_trains_saves_loads_and_compares(place, tmp_path, monkeypatch, capsys):
    site = tmp_path / "site"
    (site / "gain-1.0.dist-info").mkdir(parents=True)
    (site / "gain.py").write_text(GAIN)
    (site / "gain-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: gain\nVersion: 1.0\n")
    (site / "gain-1.0.dist-info" / "entry_points.txt").write_text("[sd_atoms.methods]\ngain = gain:METHOD\n")
    monkeypatch.syspath_prepend(site)
    assert len(GAIN.strip().splitlines()) <= 45
    assert "gain" in all_methods()

    made = run(place, "gain", tmp_path / "run")
    assert (made.picture() != made.picture("base-instance-00")).any()
    for source in (made.file, made.folder / "adapter"):
        assert (drawn(loaded(place, source)) == made.picture()).all()
    assert parse_methods("floor,gain") == ["floor", "gain"]
    assert sum(p.numel() for p in attach(opened(place).unet, "gain")) == made.outcome.trainable_params
    assert train_main(words(place, "gain", tmp_path / "other", rank=4)) == 2
    assert "not of method gain; it has none" in capsys.readouterr().err

    draw = ["generate", "--adapter", made.file, "--prompts", place / "one.txt", "--seeds", "0", "--compare_base"]
    command = [sys.executable, "-m", "sd_atoms", *map(str, draw), "--out", str(tmp_path / "out")]
    # a new process, which has imported neither the package nor its tuner
    environment = os.environ | {"PYTHONPATH": f"{site}:{sd_atoms.__path__[0]}/.."}
    subprocess.run(command, check=True, env=environment)
    assert (pixels(tmp_path / "out" / "base-prompt00-seed0.png") == drawn(opened(place), "a castle in snow")).all()
    assert (
        pixels(tmp_path / "out" / "prompt00-seed0.png") == drawn(loaded(place, made.file), "a <castle> in snow")
    ).all()


@pytest.mark.parametrize("method", ["lora", "full", "gain"])
def test_a_method_that_is_not_there_is_one_line(place, trained, tmp_path, method):
    config = tmp_path / "adapter" / "adapter_config.json"
    config.parent.mkdir()
    config.write_text(json.dumps({"peft_type": f"{method}-of-another-package", "target_modules": ["to_q"]}))
    source = trained("lora").folder / "adapter" / "adapter_model.safetensors"
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(source.read_bytes())
    pipe = opened(place)
    before = parameters(pipe)
    with pytest.raises(UserError, match="peft_type is '.*-of-another-package'; one of ") as error:
        sd_atoms.load_adapter(pipe, config.parent)
    assert "\n" not in str(error.value)
    assert same(parameters(pipe), before)


def test_bench_takes_every_method_by_the_same_door(place, trained):
    for method in PUT_IN:
        assert parse_methods(f"floor,{method}") == ["floor", method]
        pipe = opened(place)
        assert sum(p.numel() for p in attach(pipe.unet, method)) == trained(method).outcome.trainable_params
    with pytest.raises(UserError, match="--methods: 'token' is unknown"):
        parse_methods("token")


def test_the_learning_rate_of_the_token_method_is_that_of_its_rows(place, tmp_path):
    rates = dict(max_train_steps=1, lr_scheduler="constant", token_learning_rate=None)
    starts = opened(place)
    start = starts.text_encoder.get_input_embeddings().weight[starts.tokenizer.convert_tokens_to_ids("castle</w>")]
    moved = {}
    for rate in (None, 0.5):
        made = run(place, "token", tmp_path / f"{rate}", **rates, learning_rate=rate)
        moved[rate] = float((read_artefact(made.file).tokens["<castle>"] - start.detach()).abs().max())
    assert moved[None] == pytest.approx(1e-3, rel=1e-3)  # Adam's first step is the rate
    assert moved[0.5] == pytest.approx(0.5, rel=1e-3)


def test_strengths_are_those_of_the_whole_adapter(place, trained):
    pipe = loaded(place, trained("lokr").file)
    on = predicted(pipe.unet)
    set_adapters(pipe.unet, ["default"], [0.0])
    assert torch.equal(predicted(pipe.unet), predicted(opened(place).unet))
    pipe.set_adapters(["default"], [1.0])
    assert torch.equal(predicted(pipe.unet), on)
    assert PROMPT

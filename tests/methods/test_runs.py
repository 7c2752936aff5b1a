"""Every method through the door: trained by the command, saved, loaded, resumed, merged, drawn, on a tiny base."""

import dataclasses
import json
import shutil
import subprocess
import sys

import pytest
import torch
from runs import (
    METHODS,
    PLAIN_PROMPT,
    PUT_IN,
    TEACHER,
    command_line,
    drawn,
    opened,
    parameters,
    pixels,
    predicted,
    run,
    same,
    without_wrappers,
    words,
)
from safetensors.torch import load_file

import sd_atoms
from sd_atoms.cli import train_main
from sd_atoms.errors import AtomsWarning, UserError
from sd_atoms.methods import all_methods
from sd_atoms.methods.adapters import adapters_off, merge_adapters, set_adapters, tuner_layers, unmerge_adapters
from sd_atoms.pipeline import read_artefact, save_adapter

pytestmark = pytest.mark.usefixtures("on_one_core")


@pytest.mark.parametrize("method", METHODS)
def test_training_moves_the_named_parameters_and_no_others(place, trained, method):
    made, base = trained(method), opened(place)
    after = parameters(made.pipe)
    own = {name for name, value in after.items() if value.requires_grad}
    table = "text_encoder.embeddings.token_embedding.weight"
    moved = {name for name, value in after.items() if not torch.equal(value, made.before[name])}
    assert moved == own | {table}
    assert all("default" in name.split(".") for name in own)
    known = all_methods()[method]
    assert {known.kind(name) for name in own} <= set(known.rates)
    assert set(known.main_kinds) <= {known.kind(name) for name in own} | {"row", "block"}
    numbers = json.loads((made.folder / "metrics.json").read_text())["training"]
    assert numbers["trained_numbers"] == sum(after[name].numel() for name in own)
    bare, expected = without_wrappers(after), parameters(base)
    assert all(torch.equal(bare[name], value) for name, value in expected.items() if name != table)
    rows, word = len(expected[table]), base.tokenizer.convert_tokens_to_ids("castle</w>")
    assert torch.equal(bare[table][:rows], expected[table])
    assert not torch.equal(bare[table][rows], expected[table][word])


@pytest.mark.parametrize("method", METHODS)
def test_what_is_saved_draws_what_the_training_drew_and_off_is_the_base(place, trained, method):
    made, base = trained(method), opened(place)
    expected, plain = made.picture(), drawn(base, PLAIN_PROMPT)
    assert (made.picture("base-instance-00") == plain).all()
    assert (expected != plain).any()
    for source in (made.file, made.folder / "adapter"):
        pipe = opened(place)
        artefact = sd_atoms.load_adapter(pipe, source, "castle")
        assert artefact.method == method
        assert (drawn(pipe) == expected).all(), source
        with adapters_off(pipe.unet, pipe.text_encoder):
            assert (drawn(pipe, PLAIN_PROMPT) == plain).all()
        if method != "token":
            assert (drawn(pipe, PLAIN_PROMPT) != plain).any()
            pipe.delete_adapters("castle")
        assert (drawn(pipe, PLAIN_PROMPT) == plain).all()
        assert same(without_wrappers(pipe.unet.state_dict()), base.unet.state_dict())


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_is_one_that_never_stopped(place, trained, tmp_path, method, capsys):
    whole = trained(method)
    stopped = tmp_path / "run"
    shutil.copytree(whole.folder, stopped, ignore=shutil.ignore_patterns("adapter", "castle*", "*-4.*", "images"))
    again = run(place, method, stopped, resume_from_checkpoint="latest")
    assert "Resuming checkpoint-2.safetensors at step 2" in capsys.readouterr().out
    assert same(load_file(again.file), load_file(whole.file))
    assert (again.picture() == whole.picture()).all()
    assert [json.loads(line)["step"] for line in (stopped / "log.jsonl").read_text().splitlines()] == [1, 2, 3, 4]


@pytest.mark.parametrize("method", METHODS)
def test_the_teacher_is_the_base(place, taught, method):
    made, base = taught(method), opened(place)
    ids = base.tokenizer(TEACHER["class_prompt"], padding="max_length", return_tensors="pt").input_ids
    assert len(made.teacher) == 4
    with torch.no_grad():
        states = base.text_encoder(ids)[0]
        for noisy, timestep, prediction, target in made.teacher:
            assert torch.equal(base.unet(noisy, timestep, states).sample, target)
            assert torch.isfinite(prediction).all()
    assert not torch.equal(*made.teacher[-1][2:])  # the student has moved by then


@pytest.mark.parametrize("method", METHODS)
def test_base_pictures_are_of_a_base_that_never_saw_an_adapter(place, taught, tmp_path, method):
    made, base = taught(method), opened(place)
    draw = ["generate", "--adapter", made.file, "--prompts", place / "one.txt", "--seeds", "0", "--compare_base"]
    assert command_line(*draw, "--out", tmp_path / "out") == 0
    ours, plain = (pixels(tmp_path / "out" / f"{name}prompt00-seed0.png") for name in ("", "base-"))
    assert (plain == drawn(base, "a castle in snow")).all()
    pipe = opened(place)
    sd_atoms.load_adapter(pipe, made.folder)
    assert (ours == drawn(pipe, "a <castle> in snow")).all()
    with adapters_off(pipe.unet):  # the text encoder's part alone shows, so it must have been off above
        assert (drawn(pipe, "a castle in snow") != plain).any()
    assert (made.picture("base-instance-00") == drawn(base, PLAIN_PROMPT)).all()


def two(place, trained, taught, method):
    """A pipeline with two adapters of a method in its UNet."""
    pipe = opened(place)
    for name, made in (("one", trained(method)), ("two", taught(method))):
        artefact = read_artefact(made.file)
        sd_atoms.load_adapter(pipe, dataclasses.replace(artefact, tokens={}, text_config=None, text_state={}), name)
    return pipe


def merged_change(pipe, names, weights):
    """What adapters with weights add to each parameter of the base."""
    pipe.set_adapters(names, weights)
    names = [name for name, _ in pipe.unet.named_parameters() if ".base_layer." in name]
    before = {name: pipe.unet.get_parameter(name).clone() for name in names}
    originals = merge_adapters(pipe.unet)
    change = {name: pipe.unet.get_parameter(name) - before[name] for name in names}
    unmerge_adapters(pipe.unet, originals)
    return change


@torch.no_grad()
@pytest.mark.parametrize("method", [name for name in PUT_IN if all_methods()[name].linear])
def test_changes_of_two_adapters_add_up_by_their_weights(place, trained, taught, method):
    pipe = two(place, trained, taught, method)
    one, other = (merged_change(pipe, [name], [1.0]) for name in ("one", "two"))
    both = merged_change(pipe, ["one", "two"], [0.5, -1.5])
    assert any(change.any() for change in both.values())
    for name, change in both.items():
        expected = 0.5 * one[name] - 1.5 * other[name]
        size = expected.norm() + pipe.unet.get_parameter(name).norm()
        assert (change - expected).norm() <= 1e-5 * size, name


@pytest.mark.parametrize("method", [name for name in PUT_IN if not all_methods()[name].linear])
def test_two_adapters_whose_changes_do_not_add_up_work_side_by_side(place, trained, taught, method):
    pipe, alone = two(place, trained, taught, method), opened(place)
    sd_atoms.load_adapter(alone, trained(method).file)
    set_adapters(pipe.unet, ["one"], [1.0])
    assert torch.equal(predicted(pipe.unet), predicted(alone.unet))
    set_adapters(pipe.unet, ["one", "two"], [1.0, 1.0])
    assert not torch.equal(predicted(pipe.unet), predicted(alone.unet))


def test_oft_takes_no_strength_and_says_so_in_one_line(place, trained, taught, tmp_path, capsys):
    pipe = two(place, trained, taught, "oft")
    with pytest.raises(UserError, match=r"^weight=0.5 for 'one': OFT has no strength, only 1 is allowed$"):
        set_adapters(pipe.unet, ["one", "two"], [0.5, 1.0])
    draw = ["generate", "--prompts", place / "one.txt", "--seeds", "0", "--adapter_scale", "0.5"]
    capsys.readouterr()
    for method, message in (
        ("oft", "error: weight=0.5 for 'default': OFT has no strength, only 1 is allowed\n"),
        ("token", f"error: adapter_scale=0.5: {trained('token').file} has tokens alone, which have no strength\n"),
    ):
        assert command_line(*draw, "--adapter", trained(method).file, "--out", tmp_path / method) == 2
        assert capsys.readouterr().err.endswith(message)
        assert not (tmp_path / method).exists()


@torch.no_grad()
@pytest.mark.parametrize("method", PUT_IN)
def test_merged_is_unmerged_and_comes_back_bit_for_bit(place, trained, method):
    pipe = opened(place)
    sd_atoms.load_adapter(pipe, trained(method).folder)
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    plain = predicted(pipe.unet)
    originals = merge_adapters(pipe.unet)
    assert not same(pipe.unet.state_dict(), before)
    assert (predicted(pipe.unet) - plain).norm() <= 1e-5 * plain.norm()
    unmerge_adapters(pipe.unet, originals)
    assert same(pipe.unet.state_dict(), before)
    assert torch.equal(predicted(pipe.unet), plain)
    pipe.fuse_lora()  # diffusers' own pair, whose way back may round
    assert not same(pipe.unet.state_dict(), before)
    assert (predicted(pipe.unet) - plain).norm() <= 1e-5 * plain.norm()
    pipe.unfuse_lora()
    assert (predicted(pipe.unet) - plain).norm() <= 1e-5 * plain.norm()


@pytest.mark.parametrize("method", METHODS)
def test_half_precision_bases_train_and_save_float32(place, tmp_path, method):
    made = run(place, method, tmp_path / "run", mixed_precision="bf16", max_train_steps=2)
    assert made.pipe.unet.dtype == made.pipe.text_encoder.dtype == torch.bfloat16
    own = {name: value for name, value in parameters(made.pipe).items() if value.requires_grad}
    assert {value.dtype for value in own.values()} <= {torch.float32}
    saved = load_file(made.file)
    artefact = read_artefact(made.file)
    assert {value.dtype for value in saved.values()} <= {torch.float32}
    # more than bfloat16 can hold
    trained = [value for key, value in artefact.state.items() if "initial" not in key] + [*artefact.tokens.values()]
    assert trained
    assert not any(torch.equal(value, value.bfloat16().float()) for value in trained)

    pipe, base = opened(place, dtype=torch.bfloat16), opened(place, dtype=torch.bfloat16)
    sd_atoms.load_adapter(pipe, made.folder)
    parts = [p for layer in tuner_layers(pipe.unet).values() for part in layer.adapter_layer_names
             for p in getattr(layer, part).parameters()]  # fmt: skip
    assert {parameter.dtype for parameter in parts} <= {torch.float32}
    assert (drawn(pipe) == made.picture()).all()
    assert (drawn(base, PLAIN_PROMPT) == made.picture("base-instance-00")).all()
    if method == "token":
        return
    again = save_adapter(pipe, tmp_path / "again.safetensors")
    assert same(read_artefact(again).state, artefact.state)
    full, plain = opened(place), opened(place)
    sd_atoms.load_adapter(full, made.folder)
    change = predicted(full.unet) - predicted(plain.unet)
    rounded = predicted(pipe.unet, torch.bfloat16) - predicted(base.unet, torch.bfloat16)
    noise = predicted(base.unet, torch.bfloat16) - predicted(plain.unet)
    assert (rounded - change).norm() <= 2 * noise.norm()  # one rounding of the base, one of the adapted base


@pytest.mark.parametrize("method", PUT_IN)
def test_another_base_is_refused_or_warned_of(place, trained, method, recwarn):
    half, pipe = opened(place, dtype=torch.bfloat16), opened(place)
    sd_atoms.load_adapter(half, trained(method).file)
    assert not [warning for warning in recwarn if issubclass(warning.category, AtomsWarning)]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in pipe.unet.parameters():
            parameter.mul_(1 + 0.3 * torch.rand(parameter.shape, generator=generator))
    before = {name: value.clone() for name, value in parameters(pipe).items()}
    if all_methods()[method].portable:
        with pytest.warns(AtomsWarning, match=r"trained on tiny, whose weights differ .* by about \d"):
            sd_atoms.load_adapter(pipe, trained(method).file)
    else:
        with pytest.raises(UserError, match=f"whose weights differ .*what method {method} trains means nothing there"):
            sd_atoms.load_adapter(pipe, trained(method).file)
        assert same(parameters(pipe), before)
        assert "<castle>" not in pipe.tokenizer.get_vocab()


TRAINING = (
    "import json, sys; from sd_atoms.cli import train_main; [train_main(words) for words in json.loads(sys.argv[1])]"
)
DRAWING = (
    "import sys, torch, sd_atoms; from sd_atoms.pipeline import open_base; from sd_atoms.generation import *; "
    "from sd_atoms.pipeline.sampling import Sampling; torch.set_num_threads(1)\n"
    "for run in sys.argv[2:]:\n"
    "    pipe = open_base(sys.argv[1]); sd_atoms.load_adapter(pipe, run)\n"
    "    [(_, image)] = generate(pipe, [Request('photo of a <castle>', 0, '')], Sampling(7.5, 2))\n"
    "    image.save(run + '/again.png')\n"
)


@pytest.mark.parametrize(
    "methods", [("lora", "bitfit"), pytest.param(METHODS, marks=pytest.mark.slow)], ids=["two", "all"]
)
def test_new_processes_train_and_draw_the_same(place, trained, tmp_path, methods):
    all_words = json.dumps([words(place, method, tmp_path / method) for method in methods])
    subprocess.run([sys.executable, "-c", TRAINING, all_words], check=True)
    subprocess.run([sys.executable, "-c", DRAWING, place / "tiny", *(tmp_path / m for m in methods)], check=True)
    for method in methods:
        assert same(load_file(tmp_path / method / "castle.safetensors"), load_file(trained(method).file))
        assert (pixels(tmp_path / method / "again.png") == trained(method).picture()).all()


def test_load_atoms_takes_atoms_alone(place, trained):
    assert sd_atoms.load_atoms(opened(place), trained("atoms").file).is_atoms
    with pytest.raises(UserError, match="its method is lora, not atoms; load_adapter takes it"):
        sd_atoms.load_atoms(opened(place), trained("lora").file)


def test_a_budget_chooses_the_size_and_the_same_flags_go_on(place, trained, tmp_path, capsys):
    budget = dict(budget="3k", max_train_steps=2, lr_scheduler="constant")
    first = run(place, "lora", tmp_path / "run", **budget)
    assert "budget: {'rank': 4} of method lora" in capsys.readouterr().out
    assert first.outcome.trainable_params == trained("lora").outcome.trainable_params == 2752
    again = {**budget, "max_train_steps": 4, "resume_from_checkpoint": "latest"}
    assert run(place, "lora", tmp_path / "run", **again).outcome.steps == 4
    for method, settings, message in (
        ("lora", dict(budget="3"), "error: budget=3: method lora comes no nearer than 688 (rank=1)"),
        ("bitfit", dict(budget="1M"), "error: budget=1000000: method bitfit comes no nearer than 1412"),
        ("lora", dict(budget="many"), "budget: 'many' is no number of parameters"),
        ("lora", dict(budget="3k", rank=4), "error: rank: is what budget=3000 chooses"),
    ):
        assert train_main(words(place, method, tmp_path / "other", **settings)) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
        assert not (tmp_path / "other").exists()


def test_settings_of_another_method_are_refused_by_name(place, tmp_path, capsys):
    for method, settings, message in (
        ("lora", dict(m1=4), "m1: a setting of atoms, not of method lora; it has rank, alpha"),
        ("full", dict(rank=4), "not of method full; it has none"),
        ("difffit", dict(target="attn"), "method difffit has no target to choose"),
        ("oft", dict(target="conv3x3"), "is a Conv2d, OFT is right for Linear"),
        ("nothing", {}, "method='nothing': one of atoms, lora, "),
    ):
        assert train_main(words(place, method, tmp_path / "run", **settings)) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
        assert not (tmp_path / "run").exists()

"""Several adapters in one pipeline: their changes add up, whatever kinds meet in a layer, and every word is one."""

from pathlib import Path

import pytest
import torch
from adapters import TOKEN, write_adapter
from files import CONV, LINEAR, TEXT, draw, kohya_file, lora
from helpers import tiny_base

import sd_atoms
from sd_atoms.errors import UserError
from sd_atoms.methods.adapters import adapters_off, merge_adapters, set_adapters, tuner_layers, unmerge_adapters
from sd_atoms.pipeline import open_base, placeholder_rows, read_artefact
from sd_atoms.pipeline.changes import network_changes
from sd_atoms.pipeline.together import adapter_names, load_together, split_strength

BASE = tiny_base()
OTHER = "<canal>"


@pytest.fixture
def pipe():
    return open_base(BASE)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Atoms in every convolution, LoCon there too, LoRA files of another program in both places, OFT."""
    folder = tmp_path_factory.mktemp("together")
    unet, text = open_base(BASE).unet, open_base(BASE).text_encoder
    conv, linear = (lora(unet.get_submodule(name).weight.detach())[0] for name in (CONV, LINEAR))
    return {
        "atoms": write_adapter(folder / "atoms.safetensors", BASE, "atoms"),
        "more atoms": write_adapter(folder / "more.safetensors", BASE, "atoms", size=0.2, tokens=(OTHER,)),
        "locon": write_adapter(folder / "locon.safetensors", BASE, "locon", tokens=()),
        "style": kohya_file(folder / "style.safetensors", {LINEAR: linear}),
        "in a conv": kohya_file(
            folder / "conv.safetensors",
            {CONV: conv, LINEAR: linear},
            {TEXT: lora(text.get_submodule(TEXT).weight.detach())[0]},
        ),
        "oft": write_adapter(folder / "oft.safetensors", BASE, "oft", tokens=(), size=0.01),
    }


def changes_of(source, strength):
    pipe = open_base(BASE)
    sd_atoms.load_adapter(pipe, source)
    for part in (pipe.unet, pipe.text_encoder):
        set_adapters(part, ["default"], [strength])
    return {
        (part, name): change.values["weight"]
        for part in ("unet", "text_encoder")
        for name, change in network_changes(getattr(pipe, part), "default")
    }


@torch.no_grad()
def total_changes(pipe):
    """layer -> what all active adapters together add to its weight, by merging."""
    plain, found = open_base(BASE), {}
    for part in ("unet", "text_encoder"):
        model = getattr(pipe, part)
        originals = merge_adapters(model)
        for name, layer in tuner_layers(model).items():
            before = getattr(plain, part).get_submodule(name).weight
            found[part, name] = layer.get_base_layer().weight.detach() - before
        unmerge_adapters(model, originals)
    return found


@pytest.mark.parametrize(
    "names",
    [
        ("atoms", "more atoms"),
        ("atoms", "style"),
        ("style", "atoms"),
        ("atoms", "in a conv"),
        ("in a conv", "atoms", "more atoms"),
        ("atoms", "locon"),
        ("locon", "style", "more atoms"),
    ],
    ids=" + ".join,
)
def test_changes_add_up_at_their_strengths(pipe, files, names):
    strengths = [0.8, 0.6, -0.3][: len(names)]
    expected = {}
    for name, strength in zip(names, strengths, strict=True):
        for layer, change in changes_of(files[name], strength).items():
            expected[layer] = expected.get(layer, 0) + change
    load_together(pipe, [read_artefact(files[name]) for name in names], strengths)
    found = {layer: change for layer, change in total_changes(pipe).items() if change.any()}
    assert found.keys() == expected.keys()
    for layer, change in expected.items():
        assert torch.allclose(found[layer], change, atol=2e-6), layer


@torch.no_grad()
@pytest.mark.parametrize("names", [("atoms", "style"), ("atoms", "in a conv"), ("in a conv", "locon")])
def test_the_network_computes_with_all_of_them_and_with_none(pipe, files, names):
    load_together(pipe, [read_artefact(files[name]) for name in names], [0.8, 0.6])
    inputs = draw(2, 4, 8, 8), torch.tensor([10, 700]), draw(2, 77, 16)
    adapted = pipe.unet(*inputs).sample
    merge_adapters(pipe.unet)
    assert torch.allclose(pipe.unet(*inputs).sample, adapted, atol=1e-4)
    with adapters_off(pipe.unet):
        assert torch.equal(pipe.unet(*inputs).sample, open_base(BASE).unet(*inputs).sample)


def test_words_stay_apart(pipe, files):
    load_together(pipe, [read_artefact(files[name]) for name in ("atoms", "more atoms")], [1.0, 1.0])
    rows = placeholder_rows(pipe, [TOKEN, OTHER])
    for name, token in (("atoms", TOKEN), ("more atoms", OTHER)):
        assert torch.equal(rows[token], read_artefact(files[name]).tokens[token])
    assert len(pipe.tokenizer(f"{TOKEN} beside {OTHER}").input_ids) == 5


@pytest.mark.parametrize("token", [TOKEN, TOKEN.upper()])
def test_a_word_of_two_meanings_is_named(pipe, files, tmp_path, token):
    clash = write_adapter(tmp_path / "clash.safetensors", BASE, "token", tokens=("<x>", token))
    with pytest.raises(UserError) as error:
        load_together(pipe, [read_artefact(files["atoms"]), read_artefact(clash)], [1.0, 1.0])
    assert f"adapter: {files['atoms']} and {clash} both bring the word {token}, each with its own" in str(error.value)
    assert "\n" not in str(error.value)
    assert not hasattr(pipe.unet, "peft_config")


def test_the_same_word_twice_is_one(pipe, files):
    load_together(pipe, [read_artefact(files["atoms"])] * 2, [0.5, 0.5])
    ours = total_changes(pipe)
    for layer, change in changes_of(files["atoms"], 1.0).items():
        assert torch.allclose(ours[layer], change, atol=1e-6)


def test_changes_that_do_not_add_up_are_refused_where_kinds_meet(pipe, files):
    with pytest.raises(UserError, match="changes of oft do not add up with those of an adapter of another kind"):
        load_together(pipe, [read_artefact(files["oft"]), read_artefact(files["style"])], [1.0, 1.0])


def test_strengths_are_read_from_the_end(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a=b.safetensors").touch()
    Path("x=0.5").mkdir()
    for text, expected in (
        ("castle.safetensors", ("castle.safetensors", 0.7)),
        ("castle.safetensors=0.8", ("castle.safetensors", 0.8)),
        ("runs/castle=-1", ("runs/castle", -1.0)),
        ("a=b.safetensors", ("a=b.safetensors", 0.7)),
        ("a=b.safetensors=1e-1", ("a=b.safetensors", 0.1)),
        ("x=0.5", ("x=0.5", 0.7)),
    ):
        assert split_strength(text, 0.7) == expected
    for text in ("castle=strong", "castle=", "castle=nan", "=0.5"):
        with pytest.raises(UserError, match=r"is no strength; PATH or PATH=0\.8 is allowed"):
            split_strength(text, 1.0)


def test_adapters_go_by_their_files():
    assert adapter_names(["a/castle.safetensors"]) == ["default"]
    assert adapter_names(["castle v1.2.safetensors", "me/canal", "b/canal"]) == ["castle_v1_2", "canal_2", "canal_3"]
    assert adapter_names(["a/canal", "b/canal", "c/canal_2"]) == ["canal_1", "canal_2", "canal_2_3"]

"""A strength folded into an adapter, of every method: what it does at 1 is what it did at that strength."""

from dataclasses import replace

import pytest
import torch
from peft import get_peft_model_state_dict
from runs import METHODS, command_line, opened, predicted, same
from safetensors.torch import load_file

import sd_atoms
from sd_atoms.errors import UserError
from sd_atoms.methods.adapters import set_adapters
from sd_atoms.pipeline import Artefact, read_artefact
from sd_atoms.pipeline.artefact import layer_and_part
from sd_atoms.pipeline.strength import folded
from sd_atoms.training.adapter import open_adapter
from sd_atoms.tuner.plan import matching

pytestmark = pytest.mark.usefixtures("on_one_core")
FIXED = ("oft", "token")  # no strength, or nothing that could have one


def moves(pipe):
    return predicted(pipe.unet), pipe.text_encoder(torch.arange(9).unsqueeze(0))[0].detach()


@pytest.mark.parametrize("method", METHODS)
def test_a_picked_step_does_at_one_what_the_checkpoint_did_at_its_strength(place, taught, tmp_path, method, capsys):
    folder, out = taught(method).folder, tmp_path / "picked.safetensors"
    words = ["pick", folder, "--step", 2, "--out", out]
    capsys.readouterr()
    if method == "oft":
        assert command_line(*words, "--strength", 0.7) == 2
        assert "strength=0.7: OFT has none that can be folded" in capsys.readouterr().err
        assert not out.exists()
        return
    assert command_line(*words, "--strength", 0.7) == 0
    pipe, expected = opened(place), opened(place)
    artefact = sd_atoms.load_adapter(pipe, out)
    assert artefact.about["training"]["strength"] == 0.7
    assert artefact.about["training"]["steps"] == 2
    assert artefact.method == method
    checkpoint = open_adapter(str(folder / "checkpoints" / "checkpoint-2.safetensors"))
    assert artefact.digest() != checkpoint.digest()
    sd_atoms.load_adapter(expected, checkpoint)
    full = moves(expected)
    for part in (expected.unet, expected.text_encoder):
        if hasattr(part, "peft_config"):
            set_adapters(part, ["default"], [0.7])
    for got, wanted, at_one in zip(moves(pipe), moves(expected), full, strict=True):
        assert (got - wanted).norm() <= 1e-5 * wanted.norm()
        if method != "token" or at_one is full[1]:
            assert (at_one - wanted).norm() > 1e-5 * wanted.norm()  # the strength shows


@pytest.mark.parametrize("method", METHODS)
def test_at_strength_one_a_pick_is_the_checkpoint_bit_for_bit(trained, tmp_path, method):
    folder = trained(method).folder
    assert command_line("pick", folder, "--step", 4, "--out", tmp_path / "a.safetensors") == 0
    picked, final = read_artefact(tmp_path / "a.safetensors"), read_artefact(folder / "castle.safetensors")
    assert same(picked.state, final.state)
    assert same(picked.tokens, final.tokens)


def test_what_a_pick_is_exported_to_has_its_strength_too(place, trained, tmp_path):
    folder = trained("atoms").folder
    mixings = []
    for strength in (1, 0.5):
        file = tmp_path / f"{strength}.safetensors"
        assert command_line("pick", folder, "--step", 4, "--strength", strength, "--out", file) == 0
        to = ("--to", "comfy", "--base", place / "tiny", "--out", tmp_path, "--name", f"x{strength}")
        assert command_line("export", file, *to) == 0
        mixings.append(load_file(tmp_path / f"x{strength}-comfy.safetensors"))
    full, half = mixings
    assert full.keys() == half.keys()
    assert all(torch.allclose(half[key], 0.5 * full[key], rtol=1e-6) for key in full)


def test_overcomplete_atoms_and_patterns_are_folded_too(place, unet, moved):
    for settings in (dict(m=4, m1=2), dict(kc=2, target_modules="conv", scale_pattern={"conv_in": 0.5})):
        artefact = _artefact(moved(unet(), sd_atoms.AtomsConfig(**settings)))
        pipe = opened(place)
        half = folded(artefact, 0.5, pipe)
        assert _strengths(half) == {layer: 0.5 * scale for layer, scale in _strengths(artefact).items()}
        assert _strengths(folded(half, 0.5, pipe)) == {n: 0.25 * scale for n, scale in _strengths(artefact).items()}
        in_order = replace(half.config, scale_pattern=dict(sorted(half.config.scale_pattern.items())))
        assert _strengths(replace(half, config=in_order)) == _strengths(half)  # as a JSON file may have it
        assert same(half.state, artefact.state)
        assert half.digest() != artefact.digest()


def test_tokens_alone_and_unknown_tuners_are_one_line(place, trained):
    pipe = opened(place)
    token = read_artefact(trained("token").file)
    assert folded(token, 1, pipe) is token
    with pytest.raises(UserError, match=r"strength=0\.5: .* has tokens alone, which have no strength"):
        folded(token, 0.5, pipe)


def _artefact(model):
    return Artefact(model.peft_config["default"], get_peft_model_state_dict(model))


def _strengths(artefact):
    """Layer -> what its change is multiplied by."""
    layers = {layer_and_part(key)[0] for key in artefact.state}
    found = {layer: matching(artefact.config.scale_pattern, layer) for layer in layers}
    return {layer: 1 if scale is None else scale for layer, scale in found.items()}

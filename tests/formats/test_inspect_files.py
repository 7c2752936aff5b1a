"""`sd-atoms inspect FILE` and `sd-atoms import FILE`, of files of other programs."""

import json

import peft
import pytest
import torch
from adapters import write_adapter
from files import CONV, LINEAR, NORM, TEXT, diff, dora, draw, kohya_file, loha, lokr, lora, tucker
from helpers import tiny_base
from safetensors.torch import load_file, save_file

import sd_atoms
from sd_atoms.cli import main
from sd_atoms.formats.keys import parse_keys
from sd_atoms.formats.names import mangled
from sd_atoms.formats.programs import contents_of, programs
from sd_atoms.methods.adapters import add_adapter
from sd_atoms.pipeline import open_base, read_artefact
from sd_atoms.pipeline.description import describe_file
from sd_atoms.tuner import AtomsConfig

CROSS = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
# of Stable Diffusion v1
CONV_WEIGHT, LINEAR_WEIGHT, CROSS_WEIGHT = torch.zeros(320, 320, 3, 3), torch.zeros(320, 320), torch.zeros(320, 768)
PROGRAMS = ["ComfyUI", "A1111", "Forge", "InvokeAI", "stable-diffusion.cpp", "diffusers", "sd_atoms"]


def described(folder, layers, text_layers=(), metadata=None, **more):
    return describe_file(kohya_file(folder / "a.safetensors", layers, text_layers, metadata, **more))


def test_what_a_lora_is(tmp_path):
    layers = {LINEAR: lora(LINEAR_WEIGHT)[0], CONV: lora(CONV_WEIGHT, rank=3, alpha=8.0)[0]}
    layers[CROSS] = lora(CROSS_WEIGHT)[0]
    found = described(tmp_path, layers, {TEXT: lora(torch.zeros(32, 16))[0]})
    assert found["kind"] == "adapter: lora"
    assert found["base"] == "Stable Diffusion v1"
    assert found["layers"] == {"unet": {"Linear or 1×1": 2, "3×3": 1}, "text_encoder": {"Linear or 1×1": 1}}
    assert found["ranks"] == {2: 3, 3: 1}
    assert found["alphas"] == {1.0: 3, 8.0: 1}
    assert found["programs"] == dict.fromkeys(PROGRAMS)


@pytest.mark.parametrize(
    ("layers", "more", "refusing"),
    [
        ({CONV: lora(CONV_WEIGHT)[0]}, {}, {"InvokeAI": "attn2.to_k"}),
        ({CONV: tucker(CONV_WEIGHT)[0], CROSS: lora(CROSS_WEIGHT)[0]}, {}, {"diffusers": "lora_mid"}),
        ({CROSS: loha(CROSS_WEIGHT)[0]}, {}, {"diffusers": "LoRA alone", "stable-diffusion.cpp": "computes loha"}),
        ({CROSS: lokr(CROSS_WEIGHT)[0]}, {}, {"diffusers": "LoRA alone", "stable-diffusion.cpp": "computes lokr"}),
        ({CROSS: diff(CROSS_WEIGHT)[0]}, {}, {"diffusers": "LoRA alone"}),
        ({f"{CROSS[:-4]}out.0": {"diff_b": draw(320)}, CROSS: lora(CROSS_WEIGHT)[0]}, {},
         {"A1111": "a bias without", "diffusers": "LoRA alone"}),
        ({CROSS: lora(CROSS_WEIGHT)[0], NORM: {"w_norm": draw(320), "b_norm": draw(320)}}, {}, {"diffusers": "norm"}),
        ({"conv_in": lora(torch.zeros(320, 4, 3, 3))[0], CROSS: lora(CROSS_WEIGHT)[0]}, {},
         {"stable-diffusion.cpp": "passes over conv_in"}),
        ({CROSS: lora(CROSS_WEIGHT)[0]}, {"x.y": draw(1)}, {"InvokeAI": "unknown parts", "diffusers": "other keys"}),
        ({CROSS: lora(CROSS_WEIGHT)[0]}, {f"lora_unet_{mangled(CROSS)}.what": draw(1)},
         {"A1111": "whole file", "InvokeAI": "unknown parts", "diffusers": "other keys"}),
        ({CROSS: lora(CROSS_WEIGHT)[0]}, {f"x.{number}": draw(1) for number in range(13)},
         {"Forge": "(13)", "InvokeAI": "unknown parts", "diffusers": "other keys"}),
        ({CROSS: lora(CROSS_WEIGHT)[0]}, {"bundle_emb.a.emb_params": draw(1, 8)}, {"diffusers": "other keys"}),
    ],
)  # fmt: skip
def test_who_takes_a_file_and_who_not(tmp_path, layers, more, refusing):
    found = described(tmp_path, layers, **more)["programs"]
    assert {name for name, why in found.items() if why} == set(refusing)
    for name, why in refusing.items():
        assert why in found[name]


@pytest.mark.parametrize(
    ("tensors", "kind", "base"),
    [
        ({"emb_params": draw(3, 1024)}, "word: embedding of 3 rows", "Stable Diffusion v2"),
        ({"model.diffusion_model.input_blocks.0.0.weight": draw(320, 9, 3, 3),
          "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": draw(8, 768)},
         "whole model under LDM's names", "Stable Diffusion v1, for inpainting"),
        ({"down_blocks.0.resnets.0.conv1.weight": draw(4, 4, 3, 3)}, "UNet of a diffusers folder", None),
        ({"base_model.model.a.lora_A.weight": draw(1, 4)}, "weights of a PEFT folder", None),
        ({"transformer.h.0.weight": draw(4)}, "unknown: no keys of Stable Diffusion (transformer.h.0.weight)", None),
        ({"lora_unet_conv_in.atoms_b": draw(9, 9)}, "filter atoms for ComfyUI", None),
        ({"lora_te2_x.alpha": draw(1), f"lora_unet_{mangled(CROSS)}.diff": draw(8, 2048)}, "adapter: diff", "SDXL"),
    ],
)  # fmt: skip
def test_what_other_files_are(tmp_path, tensors, kind, base):
    save_file(tensors, tmp_path / "a.safetensors")
    found = describe_file(tmp_path / "a.safetensors")
    assert found["kind"].startswith(kind)
    assert found["base"] == base


def test_the_command_prints_and_writes_it(tmp_path, capsys):
    small = torch.zeros(8, 8)  # of the tiny base
    file = kohya_file(tmp_path / "a.safetensors", {LINEAR: lora(small)[0]}, **{"what.is": draw(1)})
    assert main(["inspect", str(file), "--json", str(tmp_path / "a.json")]) == 0
    said = capsys.readouterr().out
    assert "kind         adapter: lora\n" in said
    assert "left over    1 keys that say nothing known (what.is)\n" in said
    assert "base         unknown\n" in said
    assert "  ComfyUI               no: no Stable Diffusion v1 or v2 has layers of these shapes\n" in said
    assert "  sd_atoms              yes\n" in said
    assert json.loads((tmp_path / "a.json").read_text())["ranks"] == {"2": 1}
    assert main(["inspect", str(file), "--base", tiny_base()]) == 0
    assert "|ΔF|" in capsys.readouterr().out
    assert main(["inspect", str(file), "--top", "3"]) == 2
    (tmp_path / "b.safetensors").write_bytes(file.read_bytes()[:100])
    assert main(["inspect", str(tmp_path / "b.safetensors")]) == 2
    assert capsys.readouterr().err.count("\n") == 2


def _by_keys(file):
    """What programs say of a file whatever its shapes."""
    return programs(contents_of(*parse_keys(load_file(file))))


def test_what_we_export_says_that_all_take_it(tmp_path):
    file = write_adapter(tmp_path / "a.safetensors", tiny_base(), "atoms")
    assert main(["export", str(file), "--to", "lora,diff", "--out", str(tmp_path), "--name", "x"]) == 0
    found = describe_file(tmp_path / "x-lora.safetensors")
    assert found["base"] is None  # of the tiny base's shapes
    assert {name for name, why in found["programs"].items() if why is None} == {"diffusers", "sd_atoms"}
    assert _by_keys(tmp_path / "x-lora.safetensors") == dict.fromkeys(PROGRAMS)
    assert sum(found["ranks"].values()) == len(read_artefact(file).layers) + 1  # the zero layer of InvokeAI
    others = _by_keys(tmp_path / "x-diff.safetensors")
    assert {name for name, why in others.items() if why} == {"diffusers"}


def test_import_keeps_every_change(tmp_path, capsys):
    pipe = open_base(tiny_base())
    weights = {name: pipe.unet.get_submodule(name).weight.detach() for name in (LINEAR, CONV)}
    layers = {CONV: dora(weights[CONV], 1)[0], LINEAR: lora(weights[LINEAR])[0]}
    file = kohya_file(tmp_path / "a.safetensors", layers, **{"bundle_emb.castle.emb_params": draw(1, 16)})
    assert main(["import", str(file), "--base", tiny_base()]) == 0
    said = capsys.readouterr().out
    assert "UNet: 1 layers of lora, 1 layers of lora with DoRA by inputs\n" in said
    assert "words: <castle>\n" in said
    sd_atoms.load_adapter(pipe, file, "one")
    imported = tmp_path / "a-imported.safetensors"
    assert list(read_artefact(imported).tokens) == ["<castle>"]
    sd_atoms.load_adapter(pipe, imported, "two")
    for name in weights:
        layer = pipe.unet.get_submodule(name)
        assert torch.equal(layer.get_delta_weight("one"), layer.get_delta_weight("two"))
    assert main(["import", str(file), "--base", tiny_base()]) == 2
    assert "exists; pass --overwrite" in capsys.readouterr().err
    assert main(["import", str(imported), "--base", tiny_base(), "--out", str(tmp_path / "b")]) == 0
    atoms = write_adapter(tmp_path / "atoms.safetensors", tiny_base(), "atoms")
    assert main(["import", str(atoms), "--base", tiny_base(), "--out", str(tmp_path / "c")]) == 2
    assert "it is an adapter of atoms already" in capsys.readouterr().err


def test_import_of_a_comfy_file_is_the_atoms_again(tmp_path, capsys):
    atoms = write_adapter(tmp_path / "atoms.safetensors", tiny_base(), "atoms")
    to = ("--to", "comfy", "--out", str(tmp_path), "--name")
    assert main(["export", str(atoms), *to, "x"]) == 0
    file = tmp_path / "x-comfy.safetensors"
    found = describe_file(file)
    assert {name for name, why in found["programs"].items() if why is None} == {"ComfyUI", "sd_atoms"}
    assert main(["import", str(file), "--base", tiny_base()]) == 0
    assert f"UNet: {len(read_artefact(atoms).layers)} layers of filter atoms\n" in capsys.readouterr().out
    pipe = open_base(tiny_base())
    sd_atoms.load_adapter(pipe, atoms, "one")
    sd_atoms.load_adapter(pipe, tmp_path / "x-comfy-imported.safetensors", "two")
    for name in read_artefact(atoms).layers:
        layer = pipe.unet.get_submodule(name)
        assert torch.allclose(layer.get_delta_weight("one"), layer.get_delta_weight("two"), atol=1e-6)


@pytest.mark.parametrize(("settings", "kind"), [({"m1": 3}, "overcomplete"), ({"kc": 2, "target": "attn"}, "block")])
def test_a_comfy_file_that_does_not_say_its_atoms_is_for_comfyui_alone(tmp_path, capsys, settings, kind):
    atoms = write_adapter(tmp_path / "atoms.safetensors", tiny_base(), "atoms", **settings)
    assert main(["export", str(atoms), "--to", "comfy", "--out", str(tmp_path), "--name", "y"]) == 0
    file = tmp_path / "y-comfy.safetensors"
    assert {name for name, why in describe_file(file)["programs"].items() if why is None} == {"ComfyUI"}
    assert main(["import", str(file), "--base", tiny_base()]) == 2
    assert f"{kind} atoms for ComfyUI" in capsys.readouterr().err


def test_a_lora_of_the_text_encoder_alone(tmp_path, capsys):
    pipe = open_base(tiny_base())
    parts, change = lora(pipe.text_encoder.get_submodule(TEXT).weight.detach())
    file = kohya_file(tmp_path / "a.safetensors", {}, {TEXT: parts})
    for out in ("b.safetensors", "b"):
        assert main(["import", str(file), "--base", tiny_base(), "--out", str(tmp_path / out)]) == 0
        assert "text encoder: 1 layers of lora\n" in capsys.readouterr().out
        again = open_base(tiny_base())
        assert sd_atoms.load_adapter(again, tmp_path / out).method == "imported"
        found = again.text_encoder.get_submodule(TEXT).get_delta_weight("default")
        assert torch.allclose(found.double(), change, atol=1e-6)
    assert main(["inspect", str(file), "--base", tiny_base()]) == 0
    said = capsys.readouterr().out
    assert "no layer of the UNet" in said
    assert "text      imported lora: 1 layers of the text encoder, 97 numbers\n" in said  # 32·2 + 2·16 and alpha
    assert "Blocks of the text encoder" in said


@pytest.mark.parametrize("tuner", ["imported", "LoHaConfig", "atoms"])
def test_inspect_takes_any_tuner_on_the_text_encoder(tmp_path, tuner, capsys):
    pipe = open_base(tiny_base())
    file = tmp_path / "a.safetensors"
    if tuner == "imported":
        weights = [part.get_submodule(name).weight for part, name in ((pipe.unet, CONV), (pipe.text_encoder, TEXT))]
        kohya_file(file, {CONV: lora(weights[0])[0]}, {TEXT: loha(weights[1])[0]})
    else:
        add_adapter(pipe.unet, AtomsConfig(target_modules=[CONV]))
        if tuner == "atoms":
            config = AtomsConfig(m=0, kc=4, target_modules=[TEXT])
        else:
            config = peft.LoHaConfig(r=2, target_modules=[TEXT], init_weights=False)
        add_adapter(pipe.text_encoder, config)
        sd_atoms.save_adapter(pipe, file, about={"base": tiny_base()})
    assert main(["inspect", str(file), "--base", tiny_base()]) == 0
    kind = {"imported": "imported loha", "LoHaConfig": "loha", "atoms": "block atoms kc=4"}[tuner]
    assert f"text      {kind}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("parts", "damage"),
    [
        (
            {"diff": torch.full((320, 768), torch.nan)},
            "1 of its 1 tensors hold numbers that are not finite (lora_unet_",
        ),
        ({**lora(CROSS_WEIGHT, alpha=None)[0], "alpha": draw(3)}, "alpha is one number"),
        ({"lora_up.weight": draw(320, 2)}, f"corrupt, lora_unet_{mangled(CROSS)}: lacks lora_down"),
    ],
    ids=["nan", "alpha", "lacking"],
)
def test_nobody_takes_what_import_refuses(tmp_path, capsys, parts, damage):
    file = kohya_file(tmp_path / "a.safetensors", {CROSS: parts})
    found = describe_file(file)
    assert damage in found["damage"]
    assert found["programs"] == dict.fromkeys(PROGRAMS, "the file is damaged")
    assert main(["import", str(file), "--base", tiny_base()]) == 2
    assert capsys.readouterr().err == f"error: {file}: {found['damage']}\n"


def test_a_folder_of_diffusers_and_bare_weights(tmp_path, capsys):
    pipe = open_base(tiny_base())
    config = peft.LoraConfig(r=2, lora_alpha=8, target_modules=["to_q"], init_lora_weights=False)
    pipe.unet.add_adapter(config, "a")
    pipe.unet.save_lora_adapter(tmp_path / "bare", adapter_name="a")
    bare = tmp_path / "bare" / "pytorch_lora_weights.safetensors"
    about = pipe.unet.peft_config["a"].to_dict()
    pipe.save_lora_weights(tmp_path / "lora", unet_lora_layers=load_file(bare), unet_lora_adapter_metadata=about)
    assert main(["import", str(tmp_path / "lora"), "--base", tiny_base()]) == 0
    other = open_base(tiny_base())
    sd_atoms.load_adapter(other, tmp_path / "lora-imported.safetensors")
    ours, theirs = other.unet.get_submodule(LINEAR), pipe.unet.get_submodule(LINEAR)
    assert torch.allclose(ours.get_delta_weight("default"), theirs.get_delta_weight("a"), atol=1e-6)
    assert main(["inspect", str(tmp_path / "lora")]) == 0
    assert "adapter: lora" in capsys.readouterr().out
    for source in (bare, tmp_path / "bare"):
        assert main(["import", str(source), "--base", tiny_base()]) == 2
        assert "without its adapter_config.json" in capsys.readouterr().err


def test_zero_layers_for_other_programs_are_no_layers_of_ours(tmp_path):
    file = write_adapter(tmp_path / "a.safetensors", tiny_base(), "atoms")
    assert main(["export", str(file), "--to", "lora,diff", "--out", str(tmp_path), "--name", "x"]) == 0
    for kind in ("lora", "diff"):
        assert set(read_artefact(tmp_path / f"x-{kind}.safetensors").layers) == set(read_artefact(file).layers)


def test_the_base_is_told_by_shapes(tmp_path):
    two = {CROSS: lora(torch.zeros(320, 1024))[0]}
    assert described(tmp_path, two)["base"] == "Stable Diffusion v2"
    found = described(tmp_path, two, metadata={"ss_base_model_version": "sd_v2"})
    assert found["base"] == "sd_v2"
    assert described(tmp_path, {CONV: lora(CONV_WEIGHT)[0]})["base"] == "Stable Diffusion v1 or Stable Diffusion v2"
    assert (
        described(tmp_path, {CONV: lora(CONV_WEIGHT)[0]}, metadata={"ss_base_model_version": "sdxl"})["base"] == "SDXL"
    )
    ldm = {f"lora_unet_input_blocks_1_0_in_layers_2.{part}": value for part, value in lora(CONV_WEIGHT)[0].items()}
    assert described(tmp_path, {}, **ldm)["ranks"] == {2: 1}
    other = described(tmp_path, {CONV: lora(torch.zeros(8, 8, 3, 3))[0]}, metadata={"ss_base_model_version": "sd_v1"})
    assert other["base"] is None
    assert "these shapes" in other["programs"]["A1111"]
    for width, base in ((768, "Stable Diffusion v1"), (16, None)):
        text = described(tmp_path, {}, {TEXT: lora(torch.zeros(4 * width, width))[0]})
        assert (text["base"], text["programs"]["Forge"] is None) == (base, base is not None)
    for width, base in ((768, "Stable Diffusion v1"), (32, None)):
        save_file({"emb_params": draw(2, width)}, tmp_path / "w.safetensors")
        word = describe_file(tmp_path / "w.safetensors")
        assert (word["base"], word["programs"]["ComfyUI"] is None) == (base, base is not None)
    for channels, base in ((320, "Stable Diffusion v1"), (64, None)):
        conv = {"model.diffusion_model.input_blocks.0.0.weight": draw(channels, 4, 3, 3)}
        cross = {"model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": draw(8, 768)}
        save_file(conv | cross, tmp_path / "m.safetensors")
        model = describe_file(tmp_path / "m.safetensors")
        assert (model["base"], model["programs"]["ComfyUI"] is None) == (base, base is not None)
        assert model["programs"]["sd_atoms"] is None

"""`sd-atoms inspect FILE` and `sd-atoms import FILE`, of files of other programs."""

import json

import pytest
import torch
from adapters import write_adapter
from files import CONV, LINEAR, NORM, TEXT, diff, dora, draw, kohya_file, loha, lokr, lora, tucker
from helpers import tiny_base
from safetensors.torch import save_file

import sd_atoms
from sd_atoms.cli import main
from sd_atoms.formats.names import mangled
from sd_atoms.pipeline import open_base, read_artefact
from sd_atoms.pipeline.description import describe_file

CROSS = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
CONV_WEIGHT, LINEAR_WEIGHT = torch.zeros(8, 8, 3, 3), torch.zeros(8, 8)
PROGRAMS = ["ComfyUI", "A1111", "Forge", "InvokeAI", "stable-diffusion.cpp", "diffusers", "sd_atoms"]


def described(folder, layers, text_layers=(), metadata=None, **more):
    return describe_file(kohya_file(folder / "a.safetensors", layers, text_layers, metadata, **more))


def test_what_a_lora_is(tmp_path):
    layers = {LINEAR: lora(LINEAR_WEIGHT)[0], CONV: lora(CONV_WEIGHT, rank=3, alpha=8.0)[0]}
    layers[CROSS] = lora(torch.zeros(8, 768))[0]
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
        ({CROSS: tucker(CONV_WEIGHT)[0]}, {}, {"diffusers": "lora_mid"}),
        ({CROSS: loha(LINEAR_WEIGHT)[0]}, {}, {"diffusers": "LoRA alone", "stable-diffusion.cpp": "computes loha"}),
        ({CROSS: lokr(LINEAR_WEIGHT)[0]}, {}, {"diffusers": "LoRA alone", "stable-diffusion.cpp": "computes lokr"}),
        ({CROSS: diff(LINEAR_WEIGHT)[0]}, {}, {"diffusers": "LoRA alone"}),
        ({CROSS: {"diff_b": draw(8)}}, {}, {"A1111": "a bias without", "diffusers": "LoRA alone"}),
        ({CROSS: lora(LINEAR_WEIGHT)[0], NORM: {"w_norm": draw(8), "b_norm": draw(8)}}, {}, {"diffusers": "norm"}),
        ({"conv_in": lora(torch.zeros(8, 4, 3, 3))[0], CROSS: lora(LINEAR_WEIGHT)[0]}, {},
         {"stable-diffusion.cpp": "passes over conv_in"}),
        ({CROSS: lora(LINEAR_WEIGHT)[0]}, {"x.y": draw(1)}, {"InvokeAI": "unknown parts", "diffusers": "other keys"}),
        ({CROSS: lora(LINEAR_WEIGHT)[0]}, {f"lora_unet_{mangled(CROSS)}.what": draw(1)},
         {"A1111": "whole file", "InvokeAI": "unknown parts", "diffusers": "other keys"}),
        ({CROSS: lora(LINEAR_WEIGHT)[0]}, {f"x.{number}": draw(1) for number in range(13)},
         {"Forge": "(13)", "InvokeAI": "unknown parts", "diffusers": "other keys"}),
        ({CROSS: lora(LINEAR_WEIGHT)[0]}, {"bundle_emb.a.emb_params": draw(1, 8)}, {"diffusers": "other keys"}),
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
        ({"model.diffusion_model.input_blocks.0.0.weight": draw(4, 9, 3, 3),
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
    file = kohya_file(tmp_path / "a.safetensors", {LINEAR: lora(LINEAR_WEIGHT)[0]}, **{"what.is": draw(1)})
    assert main(["inspect", str(file), "--json", str(tmp_path / "a.json")]) == 0
    said = capsys.readouterr().out
    assert "kind         adapter: lora\n" in said
    assert "left over    1 keys that say nothing known (what.is)\n" in said
    assert "  ComfyUI               yes\n" in said
    assert json.loads((tmp_path / "a.json").read_text())["ranks"] == {"2": 1}
    assert main(["inspect", str(file), "--base", tiny_base()]) == 0
    assert "|ΔF|" in capsys.readouterr().out
    assert main(["inspect", str(file), "--top", "3"]) == 2
    (tmp_path / "b.safetensors").write_bytes(file.read_bytes()[:100])
    assert main(["inspect", str(tmp_path / "b.safetensors")]) == 2
    assert capsys.readouterr().err.count("\n") == 2


def test_what_we_export_says_that_all_take_it(tmp_path):
    file = write_adapter(tmp_path / "a.safetensors", tiny_base(), "atoms")
    assert main(["export", str(file), "--to", "lora,diff", "--out", str(tmp_path), "--name", "x"]) == 0
    found = describe_file(tmp_path / "x-lora.safetensors")
    assert found["programs"] == dict.fromkeys(PROGRAMS)
    assert sum(found["ranks"].values()) == len(read_artefact(file).layers) + 1  # the zero layer of InvokeAI
    others = describe_file(tmp_path / "x-diff.safetensors")["programs"]
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

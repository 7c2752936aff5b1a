"""Names of modules between diffusers, LDM and mangled ones, against diffusers' own conversion of single files."""

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

from sd_atoms.commands.export import _words
from sd_atoms.formats.keys import parse_key
from sd_atoms.formats.names import demangled, mangled, unet_from_ldm, unet_to_ldm
from sd_atoms.pipeline.architectures import SD_V1_4, SD_V2_1, build_unet, unet_config


def modules_with_weights(network):
    return [
        name for name, module in network.named_modules() if next(module.parameters(recurse=False), None) is not None
    ]


@pytest.mark.parametrize("arch", ["sd-v1-4", "sd-v2-1", "pocket"])
def test_ldm_names_of_a_unet_are_those_diffusers_reads(arch):
    config = unet_config(arch)
    unet, n = build_unet(config, "meta"), config["layers_per_block"]
    state = unet.state_dict()
    single = {}
    for name in modules_with_weights(unet):
        ldm = unet_to_ldm(name, n)
        assert unet_from_ldm(ldm, n) == name
        for part in ("weight", "bias"):
            if f"{name}.{part}" in state:
                single[f"model.diffusion_model.{ldm}.{part}"] = state[f"{name}.{part}"]
    read = convert_ldm_unet_checkpoint(dict(single), config)
    assert read.keys() == state.keys()
    assert all(read[key] is single[f"model.diffusion_model.{unet_to_ldm(key.rpartition('.')[0], n)}."
                                   f"{key.rpartition('.')[2]}"] for key in state)  # fmt: skip


@pytest.mark.parametrize("config", [SD_V1_4, SD_V2_1], ids=["sd-v1-4", "sd-v2-1"])
def test_mangled_names_come_back(config):
    names = modules_with_weights(build_unet(config, "meta"))
    assert [demangled(mangled(name)) for name in names] == names
    assert [demangled(mangled(unet_to_ldm(name))) for name in names] == [unet_to_ldm(name) for name in names]


def test_mangled_names_of_a_text_encoder_come_back(pocket):
    names = [f"text_model.{name}" for name in modules_with_weights(pocket.text_encoder)]
    assert [demangled(mangled(name)) for name in names] == names


@pytest.mark.parametrize("name", ["", "_", "a__b", "conv_in_", "__", "down blocks", "Ünet", "a-b"])
def test_what_is_no_name_is_none(name):
    assert demangled(name) is None
    assert unet_to_ldm(name) is None
    assert unet_from_ldm(name) is None


def test_two_known_names():
    # as A1111 maps them, see its `convert_diffusers_name_to_compvis`
    assert unet_to_ldm("down_blocks.1.resnets.0.conv1") == "input_blocks.4.0.in_layers.2"
    assert unet_to_ldm("up_blocks.2.upsamplers.0.conv") == "output_blocks.8.2.conv"


@pytest.mark.parametrize(
    ("key", "module"),
    [
        ("down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.up.weight",
         "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"),
        ("unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight",
         "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"),
        ("lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight", None),  # of Flux
        ("down_blocks.0.resnets.0.conv1.lora_A.weight", None),  # PEFT's, whose alpha stands elsewhere
    ],
)  # fmt: skip
def test_keys_of_a_unet_are_told_from_others(key, module):
    entry = parse_key(key)
    assert (entry and entry.module) == module


def test_rows_of_a_word_come_in_their_order():
    names = ["<a>", *(f"<a>_{number}" for number in range(1, 12))]
    rows = {name: torch.full((2,), float(number)) for number, name in enumerate(names)}
    words = _words(dict(sorted(rows.items())))  # as a file lists them
    assert [row[0].item() for row in words["<a>"]] == list(range(12))

"""Files of other programs in a pipeline: each kind against a formula of its own, and what is left out or refused."""

import warnings

import pytest
import torch
from files import CONV, KINDS, LINEAR, NORM, TEXT, diff, draw, kohya_file, lora
from helpers import tiny_base
from safetensors.torch import load_file, save_file

import sd_atoms
from sd_atoms.errors import AtomsWarning, UserError
from sd_atoms.methods.adapters import merge_adapters, set_adapters, unmerge_adapters
from sd_atoms.pipeline import open_base, read_artefact


@pytest.fixture
def pipe():
    return open_base(tiny_base())


def weight_of(module, name):
    return module.get_submodule(name).get_parameter("weight").detach().clone()


def merged(module, name):
    """Weight and bias of a layer with its adapters in it."""
    originals = merge_adapters(module)
    base = module.get_submodule(name).get_base_layer()
    found = base.weight.detach().clone(), None if base.bias is None else base.bias.detach().clone()
    unmerge_adapters(module, originals)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_change_is_that_of_the_formula(pipe, tmp_path, kind):
    layer, made = KINDS[kind]
    before = weight_of(pipe.unet, layer)
    parts, change = made(before)
    with warnings.catch_warnings():
        warnings.simplefilter("error", AtomsWarning)
        sd_atoms.load_adapter(pipe, kohya_file(tmp_path / "a.safetensors", {layer: parts}), "a")
    found = pipe.unet.get_submodule(layer).get_delta_weight("a").double()
    assert (found - change).abs().max() <= 1e-6 * change.abs().max() + 2e-7 * before.abs().max()
    assert torch.allclose(merged(pipe.unet, layer)[0].double(), before + change, atol=1e-6)
    set_adapters(pipe.unet, ["a"], [0.5])
    assert torch.allclose(merged(pipe.unet, layer)[0].double(), before + change / 2, atol=1e-6)
    again = sd_atoms.save_adapter(pipe, tmp_path / "b.safetensors", "a")
    other = open_base(tiny_base())
    sd_atoms.load_adapter(other, again)
    assert torch.equal(other.unet.get_submodule(layer).get_delta_weight("default"), found.float())


def test_biases_norms_text_and_words_come_along(pipe, tmp_path):
    norm, conv, text = weight_of(pipe.unet, NORM), weight_of(pipe.unet, CONV), weight_of(pipe.text_encoder, TEXT)
    rows = draw(2, 16)
    layers = {
        NORM: {"w_norm": draw(len(norm)), "b_norm": draw(len(norm))},
        CONV: {**diff(conv)[0], "diff_b": draw(len(conv))},
    }
    parts, change = lora(text)
    file = kohya_file(
        tmp_path / "a.safetensors", layers, {TEXT: parts}, **{"bundle_emb.castle.string_to_param.*": rows}
    )
    biases = {name: pipe.unet.get_submodule(name).bias.detach().clone() for name in layers}
    artefact = sd_atoms.load_adapter(pipe, file, "a")
    assert artefact.method == "imported"
    for name, weight, (w, b) in ((NORM, norm, ("w_norm", "b_norm")), (CONV, conv, ("diff", "diff_b"))):
        found = merged(pipe.unet, name)
        assert torch.allclose(found[0], weight + layers[name][w])
        assert torch.allclose(found[1], biases[name] + layers[name][b])
    assert torch.allclose(merged(pipe.text_encoder, TEXT)[0].double(), text + change, atol=1e-6)
    ids = pipe.tokenizer.convert_tokens_to_ids(["<castle>", "<castle>_1"])
    assert torch.equal(pipe.text_encoder.get_input_embeddings().weight[ids].detach(), rows)


def test_the_adapter_acts_unmerged_as_merged(pipe, tmp_path):
    layers = {layer: made(weight_of(pipe.unet, layer))[0] for layer, made in (KINDS["tucker"], KINDS["lora"])}
    inputs = draw(1, 4, 8, 8), torch.tensor([500]), draw(1, 5, 16)
    with torch.no_grad():
        plain = pipe.unet(*inputs).sample
        sd_atoms.load_adapter(pipe, kohya_file(tmp_path / "a.safetensors", layers), "a")
        adapted = pipe.unet(*inputs).sample
        originals = merge_adapters(pipe.unet)
        assert torch.allclose(pipe.unet(*inputs).sample, adapted, atol=1e-5)
        unmerge_adapters(pipe.unet, originals)
        pipe.delete_adapters("a")
        assert torch.equal(pipe.unet(*inputs).sample, plain)
    assert (adapted - plain).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("module", "up", "down"),
    [
        (f"unet.{LINEAR}", "lora_B.weight", "lora_A.weight"),
        (f"unet.{LINEAR}", "lora.up.weight", "lora.down.weight"),
        (f"unet.{LINEAR.removesuffix('to_q')}processor.to_q_lora", "up.weight", "down.weight"),
        ("diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q", "lora_up.weight", "lora_down.weight"),
        ("lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q", "lora_up.weight", "lora_down.weight"),
        ("lycoris_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q", "lora_up.weight", "lora_down.weight"),
    ],
)
def test_all_names_of_a_layer_are_known(pipe, tmp_path, module, up, down):
    parts, change = lora(weight_of(pipe.unet, LINEAR), alpha=None)
    file = tmp_path / "a.safetensors"
    save_file({f"{module}.{up}": parts["lora_up.weight"], f"{module}.{down}": parts["lora_down.weight"]}, file)
    sd_atoms.load_adapter(pipe, file)
    found = pipe.unet.get_submodule(LINEAR).get_delta_weight("default").double()
    assert torch.allclose(found, change, atol=1e-6)


def test_alpha_of_a_file_of_diffusers_is_in_its_header(pipe, tmp_path):
    from peft import LoraConfig

    settings = dict(r=2, lora_alpha=8, target_modules=["to_q", "to_k"], init_lora_weights=False)
    pipe.unet.add_adapter(LoraConfig(**settings, alpha_pattern={"attn2.to_k": 3}, rank_pattern={"to_k": 4}), "a")
    pipe.unet.save_lora_adapter(tmp_path / "plain", adapter_name="a")
    state = load_file(tmp_path / "plain" / "pytorch_lora_weights.safetensors")
    assert not any(key.startswith("unet.") for key in state)
    pipe.save_lora_weights(
        tmp_path / "lora",
        unet_lora_layers=state,
        unet_lora_adapter_metadata=pipe.unet.peft_config["a"].to_dict(),
    )
    other = open_base(tiny_base())
    sd_atoms.load_adapter(other, tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    for name in (LINEAR, LINEAR.replace("attn1.to_q", "attn2.to_k")):
        ours = other.unet.get_submodule(name).get_delta_weight("default")
        assert torch.allclose(ours, pipe.unet.get_submodule(name).get_delta_weight("a"), atol=1e-6)


def test_what_does_not_fit_is_left_out_and_named(pipe, tmp_path):
    parts, change = lora(weight_of(pipe.unet, LINEAR))
    wide, _ = lora(torch.zeros(8, 9, 3, 3))
    layers = {LINEAR: parts, "conv_in": wide, "down_blocks.3.resnets.0.conv1": lora(torch.zeros(8, 8, 3, 3))[0]}
    file = kohya_file(tmp_path / "a.safetensors", layers, **{"what.is.this": draw(1)})
    with pytest.warns(AtomsWarning) as noted:
        sd_atoms.load_adapter(pipe, file)
    text = str(noted[0].message)
    assert "1 of its keys say nothing known (what.is.this)" in text
    assert "2 of its 3 layers do not fit this base (lora_unet_conv_in changes a weight (8, 9, 3, 3)" in text
    assert "lora_unet_down_blocks_3_resnets_0_conv1 is not there" in text
    assert torch.allclose(pipe.unet.get_submodule(LINEAR).get_delta_weight("default").double(), change, atol=1e-6)


BROKEN = {
    "lacks a part": ({LINEAR: {"lora_up.weight": draw(8, 2)}}, "lacks lora_down"),
    "ranks": ({LINEAR: {"lora_up.weight": draw(8, 2), "lora_down.weight": draw(3, 8)}}, "corrupt, lora_unet_down"),
    "alpha": ({LINEAR: {"alpha": draw(3), **lora(torch.zeros(8, 8), alpha=None)[0]}}, "alpha is one number"),
    "mixed": ({LINEAR: {**lora(torch.zeros(8, 8))[0], **diff(torch.zeros(8, 8))[0]}}, "mixes lora and diff"),
    "no layer": ({"down_blocks.9.resnets.0.conv1": lora(torch.zeros(8, 8, 3, 3))[0]}, "none of its 1 layers fits"),
    "not finite": ({LINEAR: {"diff": torch.full((8, 8), torch.nan)}}, "not finite"),
    "bias": ({CONV: {"diff_b": draw(5)}}, "changes a bias (5,)"),
    "dora": ({LINEAR: {**lora(torch.zeros(8, 8))[0], "dora_scale": draw(3, 3)}}, "has a dora_scale (3, 3)"),
    "unknown keys": ({}, "no keys as kohya"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_one_line(pipe, tmp_path, kind):
    layers, message = BROKEN[kind]
    more = {f"some.key{number}": draw(1) for number in range(100)} if not layers else {}
    file = kohya_file(tmp_path / "a.safetensors", layers, **more)
    with pytest.raises(UserError) as error:
        sd_atoms.load_adapter(pipe, file)
    assert str(error.value).startswith(f"{file}: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not hasattr(pipe.unet, "peft_config")


def test_sdxl_is_refused_by_name(tmp_path):
    deep = "down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q"
    for layers, more in (({deep: lora(torch.zeros(8, 8))[0]}, {}), ({}, {"lora_te2_x.alpha": draw(1)})):
        file = kohya_file(tmp_path / "a.safetensors", layers, **more)
        with pytest.raises(UserError, match="made for SDXL"):
            read_artefact(file)


def test_an_embedding_alone_is_a_word(pipe, tmp_path):
    rows = draw(1, 16)
    for key, word in (("emb_params", "<castle-atoms>"), ("<canal>", "<canal>")):
        save_file({key: rows}, tmp_path / "castle-atoms.safetensors")
        artefact = sd_atoms.load_adapter(pipe, tmp_path / "castle-atoms.safetensors", "w")
        assert list(artefact.tokens) == [word]
        row = pipe.text_encoder.get_input_embeddings().weight[pipe.tokenizer.convert_tokens_to_ids(word)]
        assert torch.equal(row.detach(), rows[0])

"""Training a network's own parameters: copies that stand in for them, and DiffFit's scale vectors."""

import pytest
import torch
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from sd_atoms.methods import DiffFitConfig, SelectiveConfig
from sd_atoms.methods.adapters import adapters_off, add_adapter, delete_adapter, set_adapters, tuner_layers


def selective(moved, convnet, kind):
    return moved(convnet().double(), SelectiveConfig(kind=kind))


@pytest.mark.parametrize("kind", ["bias", "norm", "full"])
def test_copies_stand_in_for_the_parameters(kind, convnet, convnet_inputs, moved):
    tokens, x = convnet_inputs
    model, plain = selective(moved, convnet, kind), convnet().double()
    layers = tuner_layers(model)
    norms = {"norm", "row_norm"}
    expected = {
        name
        for name, _ in plain.named_parameters()
        if kind == "full"
        or (kind == "bias" and name.endswith("bias"))
        or (kind == "norm" and name.split(".")[0] in norms)
    }
    found = {f"{name}.{part.removeprefix('selective_')}" for name, layer in layers.items()
             for part in layer.adapter_layer_names if "default" in getattr(layer, part)}  # fmt: skip
    assert found == expected
    for name in expected:
        layer, _, parameter = name.rpartition(".")
        plain.get_parameter(name).data = layers[layer].copies(parameter)["default"].data
    assert torch.equal(model(tokens, x.double()), plain(tokens, x.double()))


def test_differences_from_the_base_add_up_by_strength(convnet, convnet_inputs, moved):
    tokens, x = convnet_inputs
    model, plain = selective(moved, convnet, "full"), convnet().double()
    moved(model, SelectiveConfig(kind="bias"), "second", seed=3)
    set_adapters(model, ["default", "second"], [0.25, -2.0])
    for name, layer in tuner_layers(model).items():
        for part, _ in layer.base_layer.named_parameters():
            copies, value = layer.copies(part), plain.get_parameter(f"{name}.{part}").data
            assert ("second" in copies) == (part == "bias")
            change = 0.25 * (copies["default"].data - value)
            change -= 2.0 * (copies["second"].data - value) if "second" in copies else 0
            value += change
    torch.testing.assert_close(model(tokens, x.double()), plain(tokens, x.double()), rtol=1e-10, atol=1e-10)


def test_a_copy_of_half_precision_is_trained_finer_than_the_base_can_hold():
    torch.manual_seed(0)
    model = nn.ModuleDict({"layer": nn.Conv2d(8, 6, 3, dtype=torch.bfloat16)})
    x, step = torch.randn(2, 8, 9, 9, dtype=torch.bfloat16), 2.0**-12
    y = model["layer"](x)
    trained = add_adapter(model, SelectiveConfig(kind="full", target_modules=["layer"]))
    layer = model["layer"]
    copy_of = layer.copies("weight")["default"]
    for number in range(1, 65):
        with torch.no_grad():
            for parameter in trained:
                parameter.mul_(1 + step)
        if number == 1:
            assert torch.equal(layer(x), y)  # below the base's precision
    growth = copy_of / layer.base_layer.weight.float()
    torch.testing.assert_close(growth, torch.full_like(growth, (1 + step) ** 64), rtol=1e-5, atol=0)
    assert not torch.equal(layer(x), y)


def test_full_fine_tuning_computes_with_the_copies_themselves():
    model = nn.ModuleDict({"layer": nn.Linear(4, 4)})
    add_adapter(model, SelectiveConfig(kind="full", target_modules=["layer"]))
    layer = model["layer"]
    values = layer.values(["default"])
    assert values["weight"].data_ptr() == layer.copies("weight")["default"].data_ptr()


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        for name in ("to_q", "to_k", "to_v"):
            setattr(self, name, nn.Linear(8, 8, bias=False))
        self.to_out = nn.ModuleList([nn.Linear(8, 8), nn.Dropout(0.0)])

    def forward(self, x):
        weights = torch.softmax(self.to_q(x) @ self.to_k(x).mT, -1)
        return self.to_out[0](weights @ self.to_v(x))


class Block(nn.Module):
    """A transformer block with diffusers' names: x (N, T, 8)."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(8) for _ in range(3))
        self.attn1, self.attn2 = Attention(), Attention()
        self.ff = nn.Module()
        self.ff.net = nn.ModuleList([nn.Linear(8, 16), nn.Dropout(0.0), nn.Linear(16, 8)])

    def forward(self, x):
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x))
        return x + self.ff.net[2](torch.tanh(self.ff.net[0](self.norm3(x))))


def difffit_by_hand(block, x, part):
    """DiffFit as its paper draws it: vectors after each projection, and after each attention and feed-forward."""

    def norm(name, x):
        return nn.functional.layer_norm(x, (8,), part(name, "weight"), part(name, "bias"))

    def linear(name, x):
        layer = block.get_submodule(name)
        return nn.functional.linear(x, layer.weight, None if layer.bias is None else part(name, "bias"))

    def attention(name, x):
        q, k, v = (linear(f"{name}.to_{n}", x) * part(f"{name}.to_{n}", "scale") for n in "qkv")
        out = linear(f"{name}.to_out.0", torch.softmax(q @ k.mT, -1) @ v)
        return out * part(f"{name}.to_out.0", "scale") * part(f"{name}.to_out.0", "block_scale")

    x = x + attention("attn1", norm("norm1", x))
    x = x + attention("attn2", norm("norm2", x))
    hidden = torch.tanh(linear("ff.net.0", norm("norm3", x)))
    return x + linear("ff.net.2", hidden) * part("ff.net.2", "block_scale")


def block():
    torch.manual_seed(0)
    return Block().double()


def test_difffit_is_the_block_with_scale_vectors_written_out(moved):
    model, x = moved(block(), DiffFitConfig()), torch.randn(2, 5, 8, dtype=torch.float64)
    layers = tuner_layers(model)

    def part(name, which):
        return getattr(layers[name], f"difffit_{which}")["default"]

    torch.testing.assert_close(model(x), difffit_by_hand(block(), x, part), rtol=1e-12, atol=1e-12)
    d = 8
    biases_and_norms = 2 * d + (16 + d) + 3 * 2 * d  # to_out.0 of two attentions, the feed-forward, three norms
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == biases_and_norms + 11 * d


def test_the_strength_of_difffit_moves_its_scales_towards_one(moved):
    model, x = block(), torch.randn(2, 5, 8, dtype=torch.float64)
    moved(model, DiffFitConfig())
    layer, strength = model.attn1.to_out[0], 0.3
    set_adapters(model, ["default"], [strength])
    product = layer.difffit_scale["default"] * layer.difffit_block_scale["default"]
    base, copy_of = layer.base_layer, layer.copies("bias")["default"]
    bias = base.bias + strength * (copy_of - base.bias)
    expected = nn.functional.linear(x, base.weight, bias) * (1 + strength * (product - 1))
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
    change = layer.get_delta_weight("default")
    torch.testing.assert_close(change, strength * (product - 1)[:, None] * base.weight, rtol=1e-12, atol=1e-12)


def test_two_difffits_add_their_changes_of_the_factor(moved):
    model, x = block(), torch.randn(2, 5, 8, dtype=torch.float64)
    moved(moved(model, DiffFitConfig()), DiffFitConfig(), "second", seed=3)
    set_adapters(model, ["default", "second"], [0.5, -1.0])
    layer = model.attn2.to_q
    first, second = layer.difffit_scale["default"], layer.difffit_scale["second"]
    expected = layer.base_layer(x) * (1 + 0.5 * (first - 1) - (second - 1))
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["bias", "norm", "full"])
def test_a_text_encoder_of_transformers(kind):
    torch.manual_seed(0)
    sizes = dict(hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    encoder = CLIPTextModel(CLIPTextConfig(vocab_size=11, max_position_embeddings=6, **sizes)).eval()
    tokens = torch.tensor([[1, 5, 10], [2, 2, 3]])
    base = encoder(tokens).last_hidden_state
    expected = [
        parameter.numel()
        for name, parameter in encoder.named_parameters()
        if kind == "full" or (kind == "bias" and name.endswith("bias")) or (kind == "norm" and "norm" in name)
    ]
    trained = add_adapter(encoder, SelectiveConfig(kind=kind))
    assert sum(parameter.numel() for parameter in trained) == sum(expected)
    y = encoder(tokens).last_hidden_state
    assert torch.equal(y, base)
    y.square().sum().backward()
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(0.1 * torch.randn_like(parameter))
    assert not torch.equal(encoder(tokens).last_hidden_state, base)
    with adapters_off(encoder):
        assert torch.equal(encoder(tokens).last_hidden_state, base)
    delete_adapter(encoder, "default")
    assert torch.equal(encoder(tokens).last_hidden_state, base)

"""What our tuners compute, against formulas written out anew, and the calls that diffusers makes."""

import copy
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn

from sd_atoms.methods import DiffFitConfig, LoraConvConfig, LycorisConfig, SelectiveConfig
from sd_atoms.methods.adapters import add_adapter, set_adapters, tuner_layers

LAYERS = {
    "3x3": lambda: nn.Conv2d(8, 6, 3, padding=1),
    "strided, no bias": lambda: nn.Conv2d(8, 6, 3, stride=2, padding=1, bias=False),
    "dilated": lambda: nn.Conv2d(8, 6, 3, dilation=2, padding=2),
    "grouped": lambda: nn.Conv2d(8, 6, 3, padding=1, groups=2),
    "depthwise, circular": lambda: nn.Conv2d(8, 8, 3, padding=1, groups=8, padding_mode="circular"),
    "reflect": lambda: nn.Conv2d(8, 6, 5, padding=2, padding_mode="reflect"),
    "uneven same": lambda: nn.Conv2d(8, 6, 2, padding="same"),
    "1x1": lambda: nn.Conv2d(8, 6, 1),
}
MORE_LAYERS = {
    "5x1": lambda: nn.Conv2d(8, 6, (5, 1), padding=(2, 0)),
    "1d": lambda: nn.Conv1d(8, 6, 5, stride=2, padding=2),
    "3d": lambda: nn.Conv3d(8, 6, (3, 2, 3), padding=(1, 0, 1)),
    "linear": lambda: nn.Linear(8, 6),
}
DELTAS = {
    "lora-conv": lambda: LoraConvConfig(r=3, alpha=2.0, target_modules=["layer"]),
    "locon": lambda: LycorisConfig(algo="locon", r=3, alpha=2.0, target_modules=["layer"]),
    "loha": lambda: LycorisConfig(algo="loha", r=3, alpha=2.0, target_modules=["layer"]),
    "lokr": lambda: LycorisConfig(algo="lokr", r=1, alpha=2.0, target_modules=["layer"]),
}
TABLE = [(kind, tuner) for tuner in DELTAS for kind in (LAYERS if tuner == "lora-conv" else {**LAYERS, **MORE_LAYERS})]


class Net(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def net(kind="3x3", dtype=torch.float64):
    torch.manual_seed(0)
    return Net({**LAYERS, **MORE_LAYERS}[kind]()).to(dtype)


def inputs(kind="3x3", dtype=torch.float64):
    layer = net(kind).layer
    shape = (2, 5, 8) if isinstance(layer, nn.Linear) else (2, 8, *(9, 9, 9)[: layer.weight.dim() - 2])
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(1))


def moved(model, config, name="default", seed=2):
    """Adds an adapter and gives it a change."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in add_adapter(model, config, name):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator).to(parameter))
    return model


def written_out(layer, tuner, adapter="default"):
    """The change of the weight by each paper's formula, entry by entry or through kron, in float64."""
    shape = layer.base_layer.weight.shape
    part = {name: getattr(layer, name)[adapter].double() for name in layer.adapter_layer_names
            if adapter in getattr(layer, name)}  # fmt: skip
    if tuner == "lora-conv":
        return (2.0 / 3) * torch.einsum("pr,rq->pq", part["conv_lora_B"], part["conv_lora_A"]).reshape(shape)
    if tuner == "locon":
        return (2.0 / 3) * torch.einsum("or,rq->oq", part["lycoris_up"], part["lycoris_down"]).reshape(shape)
    if tuner == "loha":
        first = part["lycoris_w1_a"] @ part["lycoris_w1_b"]
        second = part["lycoris_w2_a"] @ part["lycoris_w2_b"]
        return (2.0 / 3) * (first * second).reshape(shape)
    full = "lycoris_w2" in part
    w1 = part["lycoris_w1"]
    w2 = part["lycoris_w2"] if full else torch.einsum("br,rd...->bd...", part["lycoris_w2_a"], part["lycoris_w2_b"])
    change = torch.einsum("ac,bd...->abcd...", w1, w2)  # o = (a, b), i = (c, d)
    return (1.0 if full else 2.0 / 1) * change.reshape(shape)


@pytest.mark.parametrize(("kind", "tuner"), TABLE)
def test_the_change_is_that_of_the_formula_and_the_layer_computes_with_it(kind, tuner):
    model, plain, x = moved(net(kind), DELTAS[tuner]()), net(kind), inputs(kind)
    change = written_out(model.layer, tuner)
    assert change.norm() > 0.1
    torch.testing.assert_close(model.layer.get_delta_weight("default"), change, rtol=1e-12, atol=1e-12)
    plain.layer.weight.data += change
    torch.testing.assert_close(model(x), plain(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tuner", DELTAS)
def test_gradients_are_those_of_the_formula(tuner):
    model, x = moved(net(), DELTAS[tuner]()), inputs()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    got = torch.autograd.grad(model(x).square().sum(), trained)
    base = model.layer.base_layer
    y = base._conv_forward(x, base.weight + written_out(model.layer, tuner), base.bias)
    expected = torch.autograd.grad(y.square().sum(), trained)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("tuner", DELTAS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_change_is_added_in_float32_and_rounded_once(tuner, dtype):
    model, x = moved(net(dtype=dtype), DELTAS[tuner]()), inputs(dtype=dtype)
    base, change = model.layer.base_layer, model.layer.get_delta_weight("default")
    assert change.dtype == torch.float32
    weight = (base.weight.float() + change).to(dtype)
    assert torch.equal(model(x), base._conv_forward(x, weight, base.bias))
    model.layer.merge()
    assert torch.equal(base.weight, weight)


@pytest.mark.parametrize("tuner", DELTAS)
def test_autocast_does_not_round_the_change(tuner):
    model, x = moved(net(dtype=torch.float32), DELTAS[tuner]()), inputs(dtype=torch.float32)
    base, change = model.layer.base_layer, model.layer.get_delta_weight("default")
    with torch.autocast("cpu", torch.bfloat16):
        expected = base._conv_forward(x, base.weight + change, base.bias)
        assert torch.equal(model(x), expected)
        assert torch.equal(model.layer.get_delta_weight("default"), change)


def test_alpha_is_the_rank_unless_set():
    assert moved(net(), LoraConvConfig(r=3, target_modules=["layer"])).layer.scaling == {"default": 1.0}
    config = LycorisConfig(algo="loha", r=4, alpha=6, target_modules=["layer"])
    assert moved(net(), config).layer.scaling == {"default": 1.5}


def test_an_adapter_of_another_algo_takes_the_place_of_one():
    model = net()
    layer = moved(model, DELTAS["lokr"]()).layer
    layer.update_layer("default", DELTAS["locon"](), "layer")
    assert {name for name, _ in layer.named_parameters() if "lycoris" in name} == {
        "lycoris_down.default",
        "lycoris_up.default",
    }
    assert torch.equal(model(inputs()), net()(inputs()))


def selective(convnet, kind):
    return moved(convnet().double(), SelectiveConfig(kind=kind))


@pytest.mark.parametrize("kind", ["bias", "norm", "full"])
def test_copies_stand_in_for_the_parameters(kind, convnet, convnet_inputs):
    tokens, x = convnet_inputs
    model, plain = selective(convnet, kind), convnet().double()
    layers = tuner_layers(model)
    norms = {"norm", "row_norm"}
    expected = {
        name
        for name, _ in plain.named_parameters()
        if kind == "full" or (kind == "bias" and name.endswith("bias")) or (kind == "norm" and name.split(".")[0] in norms)
    }
    found = {f"{name}.{part.removeprefix('selective_')}" for name, layer in layers.items()
             for part in layer.adapter_layer_names if "default" in getattr(layer, part)}  # fmt: skip
    assert found == expected
    for name in expected:
        layer, _, parameter = name.rpartition(".")
        plain.get_parameter(name).data = layers[layer].copies(parameter)["default"].data
    assert torch.equal(model(tokens, x.double()), plain(tokens, x.double()))


def test_differences_from_the_base_add_up_by_strength(convnet, convnet_inputs):
    tokens, x = convnet_inputs
    model, plain = selective(convnet, "full"), convnet().double()
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
    model = net(dtype=torch.bfloat16)
    x, step = inputs(dtype=torch.bfloat16), 2.0**-12
    y = model(x)
    trained = add_adapter(model, SelectiveConfig(kind="full", target_modules=["layer"]))
    copy_of = model.layer.copies("weight")["default"]
    for number in range(1, 65):
        with torch.no_grad():
            for parameter in trained:
                parameter.mul_(1 + step)
        if number == 1:
            assert torch.equal(model(x), y)  # below the base's precision
    growth = copy_of / model.layer.base_layer.weight.float()
    torch.testing.assert_close(growth, torch.full_like(growth, (1 + step) ** 64), rtol=1e-5, atol=0)
    assert not torch.equal(model(x), y)


def test_full_fine_tuning_computes_with_the_copies_themselves():
    model = net(dtype=torch.float32)
    add_adapter(model, SelectiveConfig(kind="full", target_modules=["layer"]))
    values = model.layer.values(["default"])
    assert values["weight"].data_ptr() == model.layer.copies("weight")["default"].data_ptr()


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


def test_difffit_is_the_block_with_scale_vectors_written_out():
    model, x = moved(block(), DiffFitConfig()), torch.randn(2, 5, 8, dtype=torch.float64)
    layers = tuner_layers(model)

    def part(name, which):
        return getattr(layers[name], f"difffit_{which}")["default"]

    torch.testing.assert_close(model(x), difffit_by_hand(block(), x, part), rtol=1e-12, atol=1e-12)
    d = 8
    biases_and_norms = 2 * d + (16 + d) + 3 * 2 * d  # to_out.0 of two attentions, the feed-forward, three norms
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == biases_and_norms + 11 * d


def test_the_strength_of_difffit_moves_its_scales_towards_one():
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


def test_two_difffits_add_their_changes_of_the_factor():
    model, x = block(), torch.randn(2, 5, 8, dtype=torch.float64)
    moved(moved(model, DiffFitConfig()), DiffFitConfig(), "second", seed=3)
    set_adapters(model, ["default", "second"], [0.5, -1.0])
    layer = model.attn2.to_q
    first, second = layer.difffit_scale["default"], layer.difffit_scale["second"]
    expected = layer.base_layer(x) * (1 + 0.5 * (first - 1) - (second - 1))
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


CONFIGS = {
    "lora-conv": LoraConvConfig,
    "lycoris": lambda: LycorisConfig(algo="lokr", r=1),
    "full": SelectiveConfig,
    "difffit": DiffFitConfig,
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_calls_of_diffusers(name, unet, small_unet_inputs):
    def draw(model):
        with torch.no_grad():
            return model(*small_unet_inputs).sample

    base, model = draw(unet()), unet()
    moved(moved(model, CONFIGS[name](), "a"), CONFIGS[name](), "b", seed=3)
    model.set_adapters(["a", "b"], [0.8, 0.4])
    both = draw(model)
    model.set_adapters(["a"], [0.8])
    one = draw(model)
    assert not torch.equal(one, both)
    model.set_adapters(["a", "b"], [0.8, 0.4])
    assert torch.equal(draw(model), both)
    model.fuse_lora()
    torch.testing.assert_close(draw(model), both, rtol=1e-4, atol=1e-5)
    model.unfuse_lora()
    assert torch.equal(draw(model), both)
    model.disable_adapters()
    assert torch.equal(draw(model), base)
    model.enable_adapters()
    assert torch.equal(draw(model), both)
    model.delete_adapters("b")
    model.set_adapters(["a"], [0.8])
    assert torch.equal(draw(model), one)
    model.delete_adapters("a")
    assert torch.equal(draw(model), base)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_folder_of_peft_is_enough_to_load(name, unet, small_unet_inputs, tmp_path):
    model = get_peft_model(unet(), CONFIGS[name]())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(unet(), tmp_path)
        assert torch.equal(loaded(*small_unet_inputs).sample, model(*small_unet_inputs).sample)
        merged = model(*small_unet_inputs).sample
        torch.testing.assert_close(model.merge_and_unload()(*small_unet_inputs).sample, merged, rtol=1e-4, atol=1e-5)


def test_scaling_a_layer_is_undone_exactly():
    layer = moved(net(), DELTAS["locon"]()).layer
    start = layer.scaling["default"]
    layer.scale_layer(0.5)
    assert layer.scaling["default"] == 0.5 * start
    layer.unscale_layer(0.5)
    assert layer.scaling["default"] == start
    layer.set_scale("default", 3)
    assert layer.scaling["default"] == 3 * start
    layer.set_scale("absent", 3)
    layer.unscale_layer()
    assert layer.scaling == {"default": start}


def test_a_second_merge_starts_from_the_originals():
    model, x = moved(net(), DELTAS["locon"]()), inputs()
    moved(model, DELTAS["loha"](), "second", seed=3)
    original = model.layer.base_layer.weight.clone()
    set_adapters(model, ["default", "second"])
    y = model(x)
    model.layer.merge(adapter_names=["default"])
    with pytest.warns(UserWarning, match="Already following adapters were merged"):
        model.layer.merge(adapter_names=["second"])
    torch.testing.assert_close(model(x), y, rtol=1e-12, atol=1e-12)
    model.layer.unmerge()
    assert torch.equal(model.layer.base_layer.weight, original)
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.layer.unmerge()


def test_a_safe_merge_refuses_what_is_not_finite():
    model = moved(net(), DELTAS["locon"]())
    original = model.layer.base_layer.weight.clone()
    model.layer.lycoris_up["default"].data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="default seems to be broken"):
        model.layer.merge(safe_merge=True)
    assert torch.equal(model.layer.base_layer.weight, original)
    assert not model.layer.merged


def test_a_deep_copy_is_independent():
    model, x = moved(net(), DELTAS["loha"]()), inputs()
    twin = copy.deepcopy(model)
    y = model(x)
    with torch.no_grad():
        twin.layer.lycoris_w1_a["default"].zero_()
    assert torch.equal(model(x), y)
    assert torch.equal(twin(x), net()(x))


@pytest.mark.parametrize("name", ["lora-conv", "locon", "loha", "lokr", "full"])
def test_compiles_into_one_graph(name):
    config = SelectiveConfig(target_modules=["layer"]) if name == "full" else DELTAS[name]()
    model, x = moved(net(dtype=torch.float32), config), inputs(dtype=torch.float32)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))


REFUSED = [
    (lambda: LoraConvConfig(target_modules=["layer"]), "linear", "layer is a Linear, lora-conv takes Conv2d"),
    (lambda: LoraConvConfig(target_modules=["layer"]), "5x1", r"layer has filters of \(5, 1\), lora-conv takes k×k"),
    (lambda: SelectiveConfig(kind="norm", target_modules=["layer"]), "3x3", "layer has no norm parameters"),
    (lambda: SelectiveConfig(kind="bias", target_modules=["layer"]), "strided, no bias", "has no bias parameters"),
    (lambda: SelectiveConfig(kind="norm"), "3x3", "holds no layer with norm parameters"),
    (lambda: DiffFitConfig(), "3x3", "projections, block_ends: no layer of Net ends with to_q, "),
    (lambda: DiffFitConfig(projections=["layer"]), "3x3", "layer is a Conv2d, scale vectors follow Linear"),
    (lambda: DiffFitConfig(target_modules="conv"), "3x3", "DiffFit has no named set but all"),
]


@pytest.mark.parametrize(("config", "kind", "message"), REFUSED)
def test_layers_that_do_not_fit_are_named_before_anything_changes(config, kind, message):
    model = net(kind)
    with pytest.raises(ValueError, match=message):
        inject_adapter_in_model(config(), model)
    assert not tuner_layers(model)


def test_all_unfit_layers_are_counted_in_one_error(convnet):
    with pytest.raises(ValueError, match=r"10 layers do not fit: norm is a GroupNorm.*\(and 6 more\)"):
        inject_adapter_in_model(LycorisConfig(target_modules=r"(?!zzz).*norm.*|table|x"), _many_norms())


def _many_norms():
    return nn.ModuleDict({"norm": nn.GroupNorm(2, 8), **{f"norm{n}": nn.LayerNorm(4) for n in range(9)}})


def test_parameters_beside_submodules_and_tied_ones_are_refused():
    attention = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)})
    with pytest.raises(ValueError, match=r"attention holds parameters beside its sub-modules.*out_proj is read by its"):
        inject_adapter_in_model(SelectiveConfig(), attention)
    tied = nn.ModuleDict({"table": nn.Embedding(7, 4), "head": nn.Linear(4, 7, bias=False)})
    tied["head"].weight = tied["table"].weight
    with pytest.raises(ValueError, match="head shares its weight with table"):
        inject_adapter_in_model(SelectiveConfig(), tied)
    inject_adapter_in_model(SelectiveConfig(target_modules=["table"]), tied)


def test_a_layer_with_another_kind_of_adapter_is_refused():
    model = net()
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["layer"]), model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match="layer carries an adapter of another kind"):
            inject_adapter_in_model(LoraConvConfig(target_modules=["layer"]), model, "second")


BAD = [
    (lambda: LoraConvConfig(r=0), "r=0: an integer from 1 on is allowed"),
    (lambda: LycorisConfig(r=True, alpha="x"), "r=True: an integer from 1 on is allowed; alpha='x': a number"),
    (lambda: LycorisConfig(algo="boft"), "algo='boft': one of locon, loha, lokr is allowed"),
    (lambda: LycorisConfig(algo="lokr", factor=0), "factor=0: -1 or an integer from 1 on"),
    (lambda: LycorisConfig(algo="loha", factor=8), "factor=8: loha has none, only lokr has"),
    (lambda: SelectiveConfig(kind="weights"), "kind='weights': one of bias, norm, full is allowed"),
]


@pytest.mark.parametrize(("make", "message"), BAD)
def test_settings_out_of_range_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()

"""What our tuners compute, against formulas written out anew, and the calls that diffusers makes."""

import copy
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn

from sd_atoms.methods import DiffFitConfig, LoraConvConfig, LycorisConfig, SelectiveConfig
from sd_atoms.methods.adapters import set_adapters, tuner_layers

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


@pytest.mark.parametrize("tuner", DELTAS)
def test_numbers_stay_float32_where_peft_loads_them_in_place(tuner, tmp_path):
    model = get_peft_model(net(dtype=torch.bfloat16), DELTAS[tuner]())
    trained = {name: p for name, p in model.named_parameters() if "default" in name.split(".")}
    for parameter in trained.values():
        nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(net(dtype=torch.bfloat16), tmp_path, low_cpu_mem_usage=True)
    for name, parameter in trained.items():
        assert parameter.dtype == torch.float32
        assert torch.equal(loaded.get_parameter(name), parameter)


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


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize(("kind", "tuner"), TABLE)
def test_the_change_is_that_of_the_formula_and_the_layer_computes_with_it(kind, tuner, moved):
    model, plain, x = moved(net(kind), DELTAS[tuner]()), net(kind), inputs(kind)
    change = written_out(model.layer, tuner)
    assert change.norm() > 0.1
    torch.testing.assert_close(model.layer.get_delta_weight("default"), change, rtol=1e-12, atol=1e-12)
    plain.layer.weight.data += change
    torch.testing.assert_close(model(x), plain(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tuner", DELTAS)
def test_gradients_are_those_of_the_formula(tuner, moved):
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
def test_the_change_is_added_in_float32_and_rounded_once(tuner, dtype, moved):
    model, x = moved(net(dtype=dtype), DELTAS[tuner]()), inputs(dtype=dtype)
    base, change = model.layer.base_layer, model.layer.get_delta_weight("default")
    assert change.dtype == torch.float32
    weight = (base.weight.float() + change).to(dtype)
    assert torch.equal(model(x), base._conv_forward(x, weight, base.bias))
    model.layer.merge()
    assert torch.equal(base.weight, weight)


@pytest.mark.parametrize("tuner", DELTAS)
def test_autocast_does_not_round_the_change(tuner, moved):
    model, x = moved(net(dtype=torch.float32), DELTAS[tuner]()), inputs(dtype=torch.float32)
    base, change = model.layer.base_layer, model.layer.get_delta_weight("default")
    with torch.autocast("cpu", torch.bfloat16):
        expected = base._conv_forward(x, base.weight + change, base.bias)
        assert torch.equal(model(x), expected)
        assert torch.equal(model.layer.get_delta_weight("default"), change)


def test_alpha_is_the_rank_unless_set(moved):
    assert moved(net(), LoraConvConfig(r=3, target_modules=["layer"])).layer.scaling == {"default": 1.0}
    config = LycorisConfig(algo="loha", r=4, alpha=6, target_modules=["layer"])
    assert moved(net(), config).layer.scaling == {"default": 1.5}


def test_an_adapter_of_the_same_name_starts_anew(moved):
    model = moved(net(), DELTAS["lokr"]())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inject_adapter_in_model(DELTAS["locon"](), model)
    parts = {name for name, _ in model.layer.named_parameters() if "lycoris" in name}
    assert parts == {"lycoris_down.default", "lycoris_up.default"}
    assert torch.equal(model(inputs()), net()(inputs()))


CONFIGS = {
    "lora-conv": LoraConvConfig,
    "lycoris": lambda: LycorisConfig(algo="lokr", r=1),
    "full": SelectiveConfig,
    "difffit": DiffFitConfig,
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_calls_of_diffusers(name, unet, small_unet_inputs, moved):
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
def test_gradient_checkpointing_gives_the_same_gradients(name, unet, small_unet_inputs, moved):
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = moved(unet(), CONFIGS[name]()).train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        model(*small_unet_inputs).sample.square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.requires_grad])
    for plain, again in zip(*gradients, strict=True):
        assert torch.equal(plain, again)


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


def test_scaling_a_layer_is_undone_exactly(moved):
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


def test_a_second_merge_starts_from_the_originals(moved):
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


def test_a_safe_merge_refuses_what_is_not_finite(moved):
    model = moved(net(), DELTAS["locon"]())
    original = model.layer.base_layer.weight.clone()
    model.layer.lycoris_up["default"].data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="default seems to be broken"):
        model.layer.merge(safe_merge=True)
    assert torch.equal(model.layer.base_layer.weight, original)
    assert not model.layer.merged


def test_a_deep_copy_is_independent(moved):
    model, x = moved(net(), DELTAS["loha"]()), inputs()
    twin = copy.deepcopy(model)
    y = model(x)
    with torch.no_grad():
        twin.layer.lycoris_w1_a["default"].zero_()
    assert torch.equal(model(x), y)
    assert torch.equal(twin(x), net()(x))


@pytest.mark.parametrize("name", ["lora-conv", "locon", "loha", "lokr", "full"])
def test_compiles_into_one_graph(name, moved):
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
    with pytest.raises(
        ValueError, match=r"attention holds parameters beside its sub-modules.*out_proj is read by its"
    ):
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

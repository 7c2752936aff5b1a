"""The contracts of a PEFT tuner, over every kind of layer and every mode of atoms."""

import copy
import itertools

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch._dynamo.testing import CompileCounter

from sd_atoms.tuner import AtomsConfig, AtomsLayer, add_weighted_adapter, named_targets, swap_adapter

LAYERS = {
    "3x3": lambda: nn.Conv2d(8, 6, 3, padding=1),
    "no bias": lambda: nn.Conv2d(8, 6, 3, padding=1, bias=False),
    "strided": lambda: nn.Conv2d(8, 6, 3, stride=2, padding=1),
    "dilated": lambda: nn.Conv2d(8, 6, 3, dilation=2, padding=2),
    "grouped": lambda: nn.Conv2d(8, 6, 3, padding=1, groups=2),
    "depthwise": lambda: nn.Conv2d(8, 8, 3, padding=1, groups=8),
    "5x1": lambda: nn.Conv2d(8, 6, (5, 1), padding=(2, 0)),
    "2x4": lambda: nn.Conv2d(8, 6, (2, 4)),
    "reflect": lambda: nn.Conv2d(8, 6, 3, padding=1, padding_mode="reflect"),
    "circular": lambda: nn.Conv2d(8, 6, 3, padding=(1, 2), padding_mode="circular"),
    "replicate": lambda: nn.Conv2d(8, 6, 3, padding=1, padding_mode="replicate"),
    "same": lambda: nn.Conv2d(8, 6, 3, padding="same"),
    "uneven same": lambda: nn.Conv2d(8, 6, (2, 4), padding="same"),
    "same, circular": lambda: nn.Conv2d(8, 6, (2, 4), padding="same", padding_mode="circular"),
    "valid": lambda: nn.Conv2d(8, 6, 3, padding="valid"),
    "1d": lambda: nn.Conv1d(8, 6, 5, stride=2, padding=2),
    "1d, grouped, circular": lambda: nn.Conv1d(8, 6, 3, padding=1, groups=2, padding_mode="circular"),
    "3d": lambda: nn.Conv3d(8, 6, (3, 2, 3), padding=(1, 0, 1)),
    "3d, uneven same": lambda: nn.Conv3d(8, 6, (2, 3, 3), padding="same", dilation=(1, 2, 1)),
    "1x1": lambda: nn.Conv2d(8, 6, 1),
    "linear": lambda: nn.Linear(8, 6),
}
FORMS = ["weight", "activation", "split"]
M = 3
MODES = {
    "D": dict(),
    "sparse D": dict(solver="sparse"),
    "sparse D, m > K": dict(solver="sparse", m=11),
    "(β, D1)": dict(m1=2),
    "(β frozen, D1)": dict(m1=2, train_beta=False),
    "sparse (β, D1)": dict(m1=2, solver="sparse"),
    "D_c": dict(m=0, kc=2, block_layers="all"),
    "D_c, few": dict(m=0, kc=2, m_c=1, block_layers="all"),
    "sparse D_c": dict(m=0, kc=2, m_c=2, block_layers="all", solver="sparse"),
    "D + D_c": dict(kc=2, block_layers="all"),
    "(β, D1) + D_c": dict(m1=2, kc=4, block_layers="all"),
}
TABLE = list(itertools.product(LAYERS, MODES))


class Net(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def net(kind="3x3", dtype=torch.float64):
    torch.manual_seed(0)
    return Net(LAYERS[kind]()).to(dtype)


def inputs(kind="3x3", dtype=torch.float64, batch=2):
    layer = LAYERS[kind]()
    axes = () if isinstance(layer, nn.Linear) else (9, 9, 9)[: layer.weight.dim() - 2]
    shape = (batch, 5, 8) if isinstance(layer, nn.Linear) else (batch, 8, *axes)
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(1))


def adapted(kind="3x3", form="auto", move=True, dtype=torch.float64, mode="D", **settings):
    model = net(kind, dtype)
    taps = model.layer.weight[0, 0].numel()
    settings = {"m": min(M, taps), **MODES[mode], **settings}
    model = get_peft_model(model, AtomsConfig(target_modules=["layer"], form=form, **settings))
    if move:
        nudge(model)
    return model


def nudge(model, adapter="default", seed=2, size=0.3):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in layers(model):
            for changes in (layer.atoms_delta, layer.atoms_block_delta):
                if adapter in changes:
                    change = changes[adapter]
                    change.add_(size * torch.randn(change.shape, generator=generator))


def layers(model):
    return [module for module in model.modules() if isinstance(module, AtomsLayer)]


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("kind", "mode"), TABLE)
def test_before_the_first_step_the_output_is_that_of_the_base_bit_for_bit(kind, mode):
    for form in FORMS:
        x = inputs(kind, torch.float32).requires_grad_()
        model = adapted(kind, form, move=False, dtype=torch.float32, mode=mode)
        y = model(x)
        assert torch.equal(y, net(kind, torch.float32)(x))
        y.square().sum().backward()
        layer = layers(model)[0]
        for changes in (layer.atoms_delta, layer.atoms_block_delta):
            for change in changes.values():
                assert change.grad.abs().max() > 0  # the start is not a dead point


@pytest.mark.parametrize(("kind", "mode"), TABLE)
def test_the_layer_is_one_with_the_delta_weight_added_in_every_form_and_merged(kind, mode):
    plain, x = net(kind), inputs(kind)
    original = plain.layer.weight.clone()
    for form in FORMS:
        model = adapted(kind, form, mode=mode)
        layer = layers(model)[0]
        y = model(x)
        plain.layer.weight.data = original + layer.get_delta_weight("default")
        assert not torch.equal(plain.layer.weight, original)
        close(y, plain(x))
        model.merge_adapter()
        close(model(x), y)
        assert layer.get_base_layer().weight.is_contiguous()
        model.unmerge_adapter()
        assert torch.equal(layer.get_base_layer().weight, original)
        assert torch.equal(model(x), y)


@pytest.mark.parametrize(("kind", "mode"), TABLE)
def test_delta_weight_is_coefficients_times_the_atom_change(kind, mode):
    """C·ΔD with C = F·Dᵀ or the sparse codes, summed entry by entry as in the paper."""
    model = adapted(kind, mode=mode)
    layer, plan = layers(model)[0], layers(model)[0].plan["default"]
    got = layer.get_delta_weight("default")  # which also makes the sparse codes
    weight, groups = layer.base_weight, layer.groups
    filters = weight.reshape(*weight.shape[:2], -1)
    expected = torch.zeros_like(filters)
    sparse = MODES[mode].get("solver") == "sparse"
    if plan.m:
        c = layer.codes["default"] if sparse else filters @ layer.atoms_initial["default"].T
        change = layer.atoms_delta["default"]
        if plan.m1:
            beta = layer.atoms_beta["default"] if "default" in layer.atoms_beta else layer.beta["default"]
            per_channel = torch.einsum("cmj,mjk->cmk", beta, change)
            o, i = filters.shape[:2]
            channel = torch.arange(o)[:, None] // (o // groups) * i + torch.arange(i)
            expected += torch.einsum("oim,oimk->oik", c, per_channel[channel])
        else:
            expected += torch.einsum("oim,mk->oik", c, change)
    if plan.block:
        a, b = plan.block
        for row in range(0, len(filters), a):
            for column in range(0, filters.shape[1], b):
                block = filters[row : row + a, column : column + b]
                c = layer.atoms_block_initial["default"] @ block.flatten()
                if sparse:
                    c = layer.block_codes["default"][row // a, column // b]
                expected[row : row + a, column : column + b] += (c @ layer.atoms_block_delta["default"]).view_as(block)
    close(got, expected.view_as(weight).detach())


@pytest.mark.parametrize(("kind", "mode"), TABLE)
def test_forms_agree_in_value_and_gradient(kind, mode):
    outcomes = []
    for form in [*FORMS, "auto"]:
        model, x = adapted(kind, form, mode=mode), inputs(kind).requires_grad_()
        y = model(x)
        y.square().sum().backward()
        outcomes.append((y.detach(), x.grad, *(p.grad for p in model.parameters() if p.requires_grad)))
    for values in zip(*outcomes, strict=True):
        for other in values[1:]:
            close(other, values[0])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_within_its_rounding(mode, dtype):
    """The base's own rounding is a few eps; the adapter, mixed in float32, adds one rounding of the weight."""
    for kind in ("3x3", "linear"):
        exact = adapted(kind, mode=mode)(inputs(kind))
        low = adapted(kind, mode=mode)
        low.base_model.model.to(dtype)
        for layer in layers(low):
            for part in (layer.atoms_delta, layer.atoms_block_delta, layer.atoms_initial, layer.atoms_beta):
                for value in part.values():
                    value.data = value.data.float()
        got = low(inputs(kind).to(dtype))
        assert got.dtype == dtype
        assert (got.double() - exact).norm() / exact.norm() < 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("mode", MODES)
def test_save_and_load_give_the_same_output(mode, tmp_path):
    model = adapted(mode=mode, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(net(dtype=torch.float32), tmp_path)
    x = inputs(dtype=torch.float32)
    assert torch.equal(again(x), model(x))
    assert isinstance(again.peft_config["default"], AtomsConfig)
    shapes = {name.rpartition(".")[2]: tuple(v.shape) for name, v in get_peft_model_state_dict(model).items()}
    layer = layers(model)[0]
    assert shapes == layer.plan["default"].shapes(layer.get_base_layer(), MODES[mode].get("train_beta", True))


@pytest.mark.parametrize("mode", MODES)
def test_only_the_adapters_numbers_get_gradients_and_the_base_stays_as_it_is(mode):
    model = adapted(mode=mode, move=False)
    before = copy.deepcopy(net().state_dict())
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    parts = {name.split(".")[-2] for name in trained}
    settings = MODES[mode]
    expected = {"atoms_delta"} if settings.get("m", M) else set()
    expected |= {"atoms_beta"} if settings.get("m1") and settings.get("train_beta", True) else set()
    assert parts == expected | ({"atoms_block_delta"} if settings.get("kc") else set())
    layer = layers(model)[0]
    assert sum(p.numel() for p in trained.values()) == layer.plan["default"].trainable_params(
        layer.get_base_layer(), settings.get("train_beta", True)
    )
    optimizer = torch.optim.AdamW(trained.values(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(inputs()).square().sum().backward()
        optimizer.step()
    assert not torch.equal(model(inputs()), net()(inputs()))
    for name, value in model.unload().state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scale", [0.0, 0.5, -2.0])
def test_scale_is_linear_in_the_delta_weight(mode, scale):
    layer = layers(adapted(mode=mode))[0]
    full = layer.get_delta_weight("default")
    layer.set_scale("default", scale)
    close(layer.get_delta_weight("default"), scale * full)
    layer.set_scale("default", 1.0)
    layer.scale_layer(0.25)
    layer.scale_layer(2.0)
    layer.unscale_layer(2.0)
    close(layer.get_delta_weight("default"), 0.25 * full)
    layer.unscale_layer()
    close(layer.get_delta_weight("default"), full)


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(MODES, 2)))
def test_several_active_adapters_add_up(one, other):
    model = adapted(mode=one)
    model.add_adapter("second", AtomsConfig(**{"m": M, **MODES[other]}, target_modules=["layer"]))
    nudge(model, "second", seed=5)
    layer = layers(model)[0]
    model.base_model.set_adapter(["default", "second"])
    layer.set_scale("second", 0.5)
    plain = net()
    plain.layer.weight.data += layer.get_delta_weight("default") + layer.get_delta_weight("second")
    close(model(inputs()), plain(inputs()))
    model.merge_adapter()
    close(model(inputs()), plain(inputs()))


SUMS = ["D", "sparse D", "(β, D1)", "(β frozen, D1)", "D_c", "sparse D_c", "(β, D1) + D_c"]


@pytest.mark.parametrize("mode", SUMS)
def test_a_weighted_sum_is_an_adapter_of_its_own(mode, tmp_path):
    model = adapted(mode=mode, dtype=torch.float32)
    model.add_adapter("second", AtomsConfig(**{"m": M, **MODES[mode]}, target_modules=["layer"], seed=0))
    nudge(model, "second", seed=5)
    layer = layers(model)[0]
    layer.set_scale("second", 2.0)
    expected = 0.7 * layer.get_delta_weight("default") - 0.3 * layer.get_delta_weight("second")
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    model.add_weighted_adapter(["default", "second"], [0.7, -0.3], "sum")
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trained
    torch.testing.assert_close(layer.get_delta_weight("sum"), expected, rtol=1e-5, atol=1e-6)
    model.set_adapter("sum")
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    again = PeftModel.from_pretrained(net(dtype=torch.float32), tmp_path / "sum")
    x = inputs(dtype=torch.float32)
    assert torch.equal(again(x), model(x))


def test_a_sum_of_adapters_of_different_m_and_of_plain_and_overcomplete_ones():
    model = adapted(mode="D")
    model.add_adapter("second", AtomsConfig(m=9, target_modules=["layer"]))
    model.add_adapter("third", AtomsConfig(m=9, m1=2, target_modules=["layer"]))
    for seed, name in enumerate(("second", "third")):
        nudge(model, name, seed=5 + seed)
    layer = layers(model)[0]
    for names in (("default", "second"), ("second", "third")):
        expected = 0.5 * layer.get_delta_weight(names[0]) + 0.25 * layer.get_delta_weight(names[1])
        model.add_weighted_adapter(names, [0.5, 0.25], "+".join(names))
        close(layer.get_delta_weight("+".join(names)), expected)
    with pytest.raises(ValueError, match="initial atoms differ"):
        model.add_weighted_adapter(["default", "third"], [1, 1], "impossible")


@pytest.mark.parametrize(
    ("adapters", "weights", "name", "message"),
    [
        (["default"], [1, 2], "sum", "1 adapters and 2 weights"),
        (["default", "default"], [1, 2], "sum", "each may come once"),
        (["default", "absent"], [1, 2], "sum", "'absent' is not a loaded atom adapter; there are default"),
        (["default"], [1], "default", "an adapter of that name already"),
    ],
)
def test_sums_that_cannot_be_are_refused(adapters, weights, name, message):
    with pytest.raises(ValueError, match=message):
        add_weighted_adapter(adapted(), adapters, weights, name)


@pytest.mark.parametrize("mode", MODES)
def test_a_swapped_in_adapter_equals_one_that_was_loaded(mode):
    model, other = adapted(mode=mode), adapted(mode=mode, move=False)
    nudge(other, seed=8)
    x = inputs()
    layer = layers(model)[0]
    places = [p.data_ptr() for p in layer.parameters()]
    state = {name.removeprefix("base_model.model."): v for name, v in get_peft_model_state_dict(other).items()}
    swap_adapter(_with_configs(model), "default", other.peft_config["default"], state)
    close(model(x), other(x))
    assert [p.data_ptr() for p in layer.parameters()] == places


def _with_configs(model):
    """As diffusers' networks are, the configs beside the layers."""
    inner = model.base_model.model
    inner.peft_config = model.peft_config
    return inner


def test_fewer_atoms_and_fewer_layers_swap_in_and_others_are_refused():
    model, small = adapted(m=5), adapted(m=3)
    state = {name.removeprefix("base_model.model."): v for name, v in get_peft_model_state_dict(small).items()}
    inner = _with_configs(model)
    swap_adapter(inner, "default", small.peft_config["default"], state)
    close(model(inputs()), small(inputs()))
    swap_adapter(inner, "default", small.peft_config["default"], {})
    close(model(inputs()), net()(inputs()))
    big = adapted(m=7)
    state = {name.removeprefix("base_model.model."): v for name, v in get_peft_model_state_dict(big).items()}
    with pytest.raises(ValueError, match=r"layer.atoms_delta \(7, 9\) into \(5, 9\)"):
        swap_adapter(inner, "default", big.peft_config["default"], state)
    with pytest.raises(ValueError, match="solver='sparse' cannot be swapped"):
        swap_adapter(inner, "default", AtomsConfig(m=5, solver="sparse"), {})


def test_a_swapped_in_strength_counts_also_after_none_and_where_it_is_saved():
    def strong(pattern):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(4, 4, 3))
        inject_adapter_in_model(AtomsConfig(scale_pattern=pattern), model, "default")
        return model

    model, other = strong({"0": 0}), strong({"0": 0.5})
    nn.init.normal_(other[0].atoms_delta["default"])
    for target in (model, strong({}), strong({"0": 2.0})):
        target[0].set_scale("default", 1.0)
        state = get_peft_model_state_dict(other, adapter_name="default")
        swap_adapter(target, "default", other.peft_config["default"], state)
        assert target[0].scaling == {"default": 0.5}
        assert target.peft_config["default"].scale_pattern == {"0": 0.5}
        assert torch.equal(target[0].get_delta_weight("default"), other[0].get_delta_weight("default"))
        target[0].set_scale("default", 2.0)
        assert target[0].scaling == {"default": 1.0}


def test_settings_for_single_modules():
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1), nn.Linear(4, 4), nn.Conv2d(4, 4, 3))
    config = AtomsConfig(
        m=9, target_modules="conv+linear", kc=2, m_pattern={"0": 4, "[12]": 1}, scale_pattern={"3": 0.5}
    )
    wrapped = get_peft_model(model, config).base_model.model
    plans = [wrapped[index].plan["default"] for index in range(4)]
    assert [plan.m for plan in plans] == [4, 0, 0, 9]
    assert [plan.block for plan in plans] == [None, (2, 2), (2, 2), None]
    assert [wrapped[index].scaling["default"] for index in range(4)] == [1.0, 1.0, 1.0, 0.5]
    wrapped[3].set_scale("default", 3.0)
    assert wrapped[3].scaling["default"] == 1.5


def test_unbatched_inputs():
    for kind in ("3x3", "1d", "3d", "linear"):
        model, x = adapted(kind), inputs(kind, batch=1)[0]
        close(model(x), model(x.unsqueeze(0))[0])


def test_channels_last_stays_channels_last():
    model = adapted("3x3", dtype=torch.float32).to(memory_format=torch.channels_last)
    x = inputs("3x3", torch.float32).contiguous(memory_format=torch.channels_last).requires_grad_()
    expected = adapted("3x3", dtype=torch.float32)
    y = model(x)
    y.square().sum().backward()
    torch.testing.assert_close(y, expected(inputs("3x3", torch.float32)), rtol=1e-5, atol=1e-6)
    assert y.is_contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-6)  # by the weight that was kept


def test_the_sparse_codes_follow_the_atoms():
    model = adapted(mode="sparse D")
    before = model(inputs())
    with torch.no_grad():
        layers(model)[0].atoms_initial["default"].mul_(0.5)
    assert not torch.allclose(model(inputs()), before)


def test_merging_one_after_the_other_equals_merging_both():
    model = adapted()
    model.add_adapter("second", AtomsConfig(m=M, target_modules=["layer"]))
    nudge(model, "second", seed=5)
    layer = layers(model)[0]
    layer.merge(adapter_names=["default"])
    layer.merge(adapter_names=["second"])
    one_by_one = layer.get_base_layer().weight.clone()
    layer.unmerge()
    layer.merge(adapter_names=["default", "second"])
    assert torch.equal(layer.get_base_layer().weight, one_by_one)


def test_merge_and_unload_leaves_a_plain_network():
    model = adapted()
    expected = model(inputs())
    plain = model.merge_and_unload()
    assert type(plain.layer) is nn.Conv2d
    torch.testing.assert_close(plain(inputs()), expected, rtol=1e-5, atol=1e-6)


def test_safe_merge_refuses_a_broken_adapter_and_keeps_the_weight():
    model = adapted()
    layer = layers(model)[0]
    layer.atoms_delta["default"].data[0, 0] = float("nan")
    original = layer.get_base_layer().weight.clone()
    with pytest.raises(ValueError, match="not finite"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.get_base_layer().weight, original)
    assert not layer.merged


def test_disable_gives_the_base_and_enable_the_adapter_again():
    model = adapted()
    on = model(inputs())
    with model.disable_adapter():
        assert torch.equal(model(inputs()), net()(inputs()))
    assert torch.equal(model(inputs()), on)


def test_delete_switches_to_the_remaining_adapter():
    model = adapted()
    model.add_adapter("second", AtomsConfig(m=M, target_modules=["layer"]))
    with pytest.warns(UserWarning, match="active which is now deleted"):
        model.delete_adapter("default")
    assert model.active_adapters == ["second"]
    assert torch.equal(model(inputs()), net()(inputs()))  # the second adapter has not moved


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_trained_numbers_are_float32_whatever_the_base(dtype):
    model = adapted(dtype=dtype)
    layer = layers(model)[0]
    assert layer.atoms_delta["default"].dtype == layer.atoms_initial["default"].dtype == torch.float32
    output = model(inputs(dtype=dtype))
    assert output.dtype == dtype
    output.float().square().sum().backward()
    assert layer.atoms_delta["default"].grad.dtype == torch.float32


@pytest.mark.parametrize("form", FORMS)
def test_autocast_mixes_in_float32(form):
    model = adapted(form=form, dtype=torch.float32)
    with torch.no_grad():
        for layer in layers(model):
            layer.atoms_delta["default"].mul_(1e-4)  # lost entirely if A = I + B were rounded to bf16
    full = model(inputs(dtype=torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(inputs(dtype=torch.float32))
        mixing = layers(model)[0].terms(["default"])[0].mixing
    assert mixing.dtype == torch.float32
    assert (mixing - torch.eye(9)).norm() > 0
    assert (mixed.float() - full).norm() / full.norm() < 0.02
    mixed.float().square().sum().backward()
    assert layers(model)[0].atoms_delta["default"].grad.abs().sum() > 0


def test_gradient_checkpointing_reaches_the_atoms():
    """Checkpointing with a frozen base and inputs without gradient must not leave the adapter without one."""
    grads = []
    for checkpointing in (False, True):
        model = adapted()
        x = inputs()
        if checkpointing:
            y = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)
        else:
            y = model(x)
        y.square().sum().backward()
        grads.append(layers(model)[0].atoms_delta["default"].grad)
    assert torch.equal(*grads)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("mode", MODES)
def test_compiled_and_eager_agree_in_value_and_gradients(mode, backend):
    outcomes = []
    for compiled in (False, True):
        torch.compiler.reset()
        model = adapted(dtype=torch.float32, mode=mode)
        y = (torch.compile(model, backend=backend) if compiled else model)(inputs(dtype=torch.float32))
        y.square().sum().backward()
        outcomes.append((y.detach(), gradients(model)))
    torch.testing.assert_close(*outcomes, rtol=1e-4, atol=1e-5)


def test_a_swap_does_not_compile_again():
    torch.compiler.reset()
    model, other = adapted(dtype=torch.float32), adapted(move=False, dtype=torch.float32)
    nudge(other, seed=7)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter)
    x = inputs(dtype=torch.float32)
    state = {name.removeprefix("base_model.model."): v for name, v in get_peft_model_state_dict(other).items()}
    with torch.no_grad():
        before = compiled(x)
        compilations = counter.frame_count
        assert compilations > 0
        swap_adapter(_with_configs(model), "default", other.peft_config["default"], state)
        torch.testing.assert_close(compiled(x), other(x), rtol=1e-5, atol=1e-6)
        assert not torch.allclose(before, other(x))
    assert counter.frame_count == compilations


@pytest.fixture
def one_process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("mode", MODES)
def test_distributed_data_parallel_finds_every_gradient(mode, one_process_group):
    """Its hooks wait for each trained parameter; one without a gradient would stop the second step."""
    plain = adapted(mode=mode)
    wrapped = nn.parallel.DistributedDataParallel(adapted(mode=mode))
    for _ in range(2):
        for model in (plain, wrapped):
            model.zero_grad()
            model(inputs()).square().sum().backward()
    close(gradients(wrapped.module), gradients(plain))


def test_an_adapter_moved_behind_autograds_back_still_counts():
    model = adapted(move=False)
    base = model(inputs())
    layers(model)[0].atoms_delta["default"].data.fill_(0.1)
    assert not torch.allclose(model(inputs()), base)


def test_a_named_set_means_the_layers_it_says():
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, (3, 1)), nn.Linear(4, 4))
    assert named_targets(model, "conv3x3") == ["0"]
    assert named_targets(model, "conv") == ["0", "1", "2"]
    wrapped = get_peft_model(model, AtomsConfig(target_modules="conv3x3"))
    assert len(layers(wrapped)) == 1
    wrapped.add_adapter("second", AtomsConfig(target_modules="conv3x3"))  # on layers that carry an adapter already
    assert len(layers(wrapped)) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(m=0), "m=0"),
        (dict(m=True), "m=True"),
        (dict(m=2.5), "m=2.5"),
        (dict(solver="qr"), "solver='qr': one of svd"),
        (dict(form="fast"), "form='fast': one of auto, weight, activation, split"),
        (dict(m=-1, form="fast"), "m=-1: .*; form='fast'"),
    ],
)
def test_bad_settings_are_refused_all_at_once(settings, message):
    with pytest.raises(ValueError, match=message):
        AtomsConfig(**settings)


def test_layers_that_the_settings_cannot_take_are_named_and_the_model_is_left_alone():
    model = nn.ModuleDict(
        dict(conv=nn.Conv2d(8, 6, 3), head=nn.Conv2d(6, 4, 1), norm=nn.GroupNorm(2, 6), up=nn.ConvTranspose2d(4, 4, 2))
    )
    with pytest.raises(ValueError, match="head has filters of 1 taps, fewer than m=9; m_pattern, kc or"):
        get_peft_model(model, AtomsConfig(m=9, target_modules="conv"))
    with pytest.raises(ValueError, match="norm is a GroupNorm, atoms take Conv1d, Conv2d, Conv3d and Linear"):
        get_peft_model(model, AtomsConfig(m=1, target_modules=["conv", "norm"]))
    with pytest.raises(ValueError, match="up is a ConvTranspose2d"):
        get_peft_model(model, AtomsConfig(m=1, target_modules=["conv", "up"]))
    with pytest.raises(ValueError, match="conv has no atoms with m=0"):
        get_peft_model(model, AtomsConfig(m=0, kc=2, target_modules=["conv"]))
    assert not any(isinstance(module, BaseTunerLayer) for module in model.modules())


def test_a_target_that_matches_nothing_is_an_error():
    with pytest.raises(ValueError, match="not found in the base model"):
        get_peft_model(net(), AtomsConfig(target_modules=["attention"]))
    with pytest.raises(ValueError, match="conv3x3.* matches no layer of Sequential"):
        get_peft_model(nn.Sequential(nn.Linear(4, 4)), AtomsConfig())


def test_peft_adapters_of_other_kinds_still_work_after_registration():
    model = get_peft_model(net(dtype=torch.float32), LoraConfig(r=2, target_modules=["layer"]))
    assert model(inputs(dtype=torch.float32)).shape == (2, 6, 9, 9)


def kept_layer(**settings):
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Conv2d(4, 6, 3, padding=1)), AtomsConfig(target_modules=["0"], **settings))
    layer = next(module for module in model.modules() if isinstance(module, AtomsLayer))
    nn.init.normal_(layer.atoms_delta["default"])
    return layer


def unkept(layer, x):
    """The same output with gradients on, where no weight is kept."""
    return layer(x.requires_grad_()).detach()


@pytest.mark.parametrize("solver", ["svd", "sparse"])
def test_a_kept_weight_follows_every_change_of_what_it_is_made_from(solver):
    layer, x = kept_layer(solver=solver, m=5), torch.randn(2, 4, 7, 7)

    def change_of_base():
        layer.base_layer.weight.data.add_(0.1)

    def change_through_data():
        layer.atoms_delta["default"].data.mul_(2)

    def other_parameter():
        layer.atoms_delta["default"] = nn.Parameter(torch.randn_like(layer.atoms_delta["default"]))

    changes = [change_through_data, other_parameter, lambda: layer.set_scale("default", 0.3)]
    if solver == "svd":  # sparse codes are those of the base weight that the adapter was made for
        changes.append(change_of_base)
    with torch.no_grad():
        layer(x)
    for change in changes:
        with torch.no_grad():
            before = layer(x)
            change()
            after = layer(x)
            assert layer(x).equal(after)
        assert not torch.equal(before, after)
        torch.testing.assert_close(after, unkept(layer, x))


def test_a_kept_weight_draws_what_a_merged_one_draws_bit_for_bit():
    layer, x = kept_layer(), torch.randn(2, 4, 7, 7)
    with torch.no_grad():
        kept = layer(x)
        layer.merge()
        assert torch.equal(layer(x), kept)
        layer.unmerge()
        assert torch.equal(layer(x), kept)


def test_no_large_weight_is_kept(monkeypatch):
    monkeypatch.setattr("sd_atoms.tuner.cached_weight.CACHED_BYTES", 100)
    layer = kept_layer()
    with torch.no_grad():
        layer(torch.randn(2, 4, 7, 7))
    assert layer._cached is None


def test_a_layer_that_carries_another_kind_of_adapter_is_refused():
    model = get_peft_model(nn.Sequential(nn.Conv2d(4, 4, 3)), LoraConfig(r=2, target_modules=["0"])).base_model.model
    with pytest.raises(ValueError, match=r"0 carries an adapter of another kind \(Conv2d\)"):
        inject_adapter_in_model(AtomsConfig(target_modules=["0"]), model, "atoms")

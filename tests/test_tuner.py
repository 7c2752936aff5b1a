"""The contracts of a PEFT tuner, over every kind of Conv2d."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn import functional as F

from sd_atoms.tuner import AtomsConfig, AtomsConv2d, conv_targets

CONVS = {
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
}
FORMS = ["weight", "activation", "split"]
M = 3


class Net(nn.Module):
    def __init__(self, conv):
        super().__init__()
        self.conv = conv
        self.norm = nn.GroupNorm(2, conv.out_channels)
        self.head = nn.Conv2d(conv.out_channels, 4, 1)

    def forward(self, x):
        return self.head(F.silu(self.norm(self.conv(x))))


def net(kind="3x3", dtype=torch.float64):
    torch.manual_seed(0)
    return Net(CONVS[kind]()).to(dtype)


def pictures(dtype=torch.float64, batch=2):
    return torch.randn(batch, 8, 9, 9, dtype=dtype, generator=torch.Generator().manual_seed(1))


def adapted(kind="3x3", form="auto", move=True, dtype=torch.float64, m=M):
    model = get_peft_model(net(kind, dtype), AtomsConfig(m=m, target_modules=["conv"], form=form))
    if move:
        nudge(model)
    return model


def nudge(model, adapter="default", seed=2, size=0.3):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in layers(model):
            delta = layer.atoms_delta[adapter]
            delta.add_(size * torch.randn(delta.shape, generator=generator))


def layers(model):
    return [module for module in model.modules() if isinstance(module, AtomsConv2d)]


@pytest.mark.parametrize("kind", CONVS)
@pytest.mark.parametrize("form", FORMS)
def test_before_the_first_step_the_output_is_that_of_the_base_bit_for_bit(kind, form):
    x = pictures(torch.float32).requires_grad_()
    assert torch.equal(adapted(kind, form, move=False, dtype=torch.float32)(x), net(kind, torch.float32)(x))


@pytest.mark.parametrize("kind", CONVS)
@pytest.mark.parametrize("form", FORMS)
def test_forward_is_the_convolution_with_the_delta_weight_added(kind, form):
    model = adapted(kind, form)
    plain = net(kind)
    plain.conv.weight.data += model.base_model.model.conv.get_delta_weight("default")
    torch.testing.assert_close(model(pictures()), plain(pictures()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", CONVS)
def test_delta_weight_is_coefficients_times_the_atom_change(kind):
    layer = adapted(kind).base_model.model.conv
    rows = layer.base_weight.flatten(2).flatten(0, 1)
    coefficients = rows @ layer.atoms_initial["default"].double().T
    expected = coefficients @ layer.atoms_delta["default"].double()
    torch.testing.assert_close(
        layer.get_delta_weight("default").flatten(2).flatten(0, 1), expected, rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize("kind", CONVS)
def test_forms_agree_in_value_and_gradient(kind):
    outcomes = []
    for form in FORMS:
        model, x = adapted(kind, form), pictures().requires_grad_()
        model(x).square().sum().backward()
        outcomes.append((x.grad, layers(model)[0].atoms_delta["default"].grad))
    for one, other, third in zip(*outcomes, strict=True):
        torch.testing.assert_close(one, third, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", CONVS)
@pytest.mark.parametrize("form", FORMS)
def test_merged_equals_unmerged_and_unmerge_restores_the_weight_bit_for_bit(kind, form):
    model = adapted(kind, form)
    original = net(kind).conv.weight
    before = model(pictures())
    model.merge_adapter()
    torch.testing.assert_close(model(pictures()), before, rtol=1e-5, atol=1e-6)
    assert not torch.equal(layers(model)[0].get_base_layer().weight, original)
    model.unmerge_adapter()
    assert torch.equal(layers(model)[0].get_base_layer().weight, original)
    assert torch.equal(model(pictures()), before)


def test_merging_one_after_the_other_equals_merging_both():
    model = adapted()
    model.add_adapter("second", AtomsConfig(m=M, target_modules=["conv"]))
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
    expected = model(pictures())
    plain = model.merge_and_unload()
    assert type(plain.conv) is nn.Conv2d
    torch.testing.assert_close(plain(pictures()), expected, rtol=1e-5, atol=1e-6)


def test_safe_merge_refuses_a_broken_adapter_and_keeps_the_weight():
    model = adapted()
    layer = layers(model)[0]
    layer.atoms_delta["default"].data[0, 0] = float("nan")
    original = layer.get_base_layer().weight.clone()
    with pytest.raises(ValueError, match="not finite"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.get_base_layer().weight, original)
    assert not layer.merged


def test_several_active_adapters_add_up():
    model = adapted()
    model.add_adapter("second", AtomsConfig(m=9, target_modules=["conv"]))
    nudge(model, "second", seed=5)
    layer = layers(model)[0]
    model.base_model.set_adapter(["default", "second"])
    layer.set_scale("second", 0.5)
    plain = net()
    plain.conv.weight.data += layer.get_delta_weight("default") + layer.get_delta_weight("second")
    torch.testing.assert_close(model(pictures()), plain(pictures()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [0.0, 0.5, -2.0])
def test_scale_is_linear_in_the_delta_weight(scale):
    layer = layers(adapted())[0]
    full = layer.get_delta_weight("default")
    layer.set_scale("default", scale)
    torch.testing.assert_close(layer.get_delta_weight("default"), scale * full, rtol=1e-5, atol=1e-7)
    layer.set_scale("default", 1.0)
    layer.scale_layer(0.25)
    layer.scale_layer(2.0)
    layer.unscale_layer(2.0)
    torch.testing.assert_close(layer.get_delta_weight("default"), 0.25 * full, rtol=1e-5, atol=1e-7)
    layer.unscale_layer()
    torch.testing.assert_close(layer.get_delta_weight("default"), full)


def test_disable_gives_the_base_and_enable_the_adapter_again():
    model = adapted()
    on = model(pictures())
    with model.disable_adapter():
        assert torch.equal(model(pictures()), net()(pictures()))
    assert torch.equal(model(pictures()), on)


def test_delete_switches_to_the_remaining_adapter():
    model = adapted()
    model.add_adapter("second", AtomsConfig(m=M, target_modules=["conv"]))
    with pytest.warns(UserWarning, match="active which is now deleted"):
        model.delete_adapter("default")
    assert model.active_adapters == ["second"]
    assert torch.equal(model(pictures()), net()(pictures()))  # the second adapter has not moved


def test_only_the_atom_changes_get_gradients_and_the_base_stays_as_it_is():
    model = adapted(move=False)
    before = copy.deepcopy(net().state_dict())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert names == ["base_model.model.conv.atoms_delta.default"]
    for _ in range(2):
        optimizer.zero_grad()
        model(pictures()).square().sum().backward()
        optimizer.step()
    assert layers(model)[0].atoms_delta["default"].abs().min() > 0
    for name, value in model.unload().state_dict().items():
        assert torch.equal(value, before[name]), name


def test_save_and_load_give_the_same_output(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(net(), tmp_path)
    assert torch.equal(again(pictures()), model(pictures()))
    assert isinstance(again.peft_config["default"], AtomsConfig)


def test_the_saved_state_holds_the_initial_atoms_and_no_coefficients():
    shapes = {name.split(".")[-1]: tuple(v.shape) for name, v in get_peft_model_state_dict(adapted()).items()}
    assert shapes == {"atoms_delta": (M, 9), "atoms_initial": (M, 9)}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_trained_numbers_are_float32_whatever_the_base(dtype):
    model = adapted(dtype=dtype)
    layer = layers(model)[0]
    assert layer.atoms_delta["default"].dtype == layer.atoms_initial["default"].dtype == torch.float32
    output = model(pictures(dtype))
    assert output.dtype == dtype
    output.float().square().sum().backward()
    assert layer.atoms_delta["default"].grad.dtype == torch.float32


@pytest.mark.parametrize("form", FORMS)
def test_autocast_mixes_in_float32(form):
    model = adapted(form=form, dtype=torch.float32)
    with torch.no_grad():
        for layer in layers(model):
            layer.atoms_delta["default"].mul_(1e-4)  # lost entirely if A = I + B were rounded to bf16
    full = model(pictures(torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(pictures(torch.float32))
        mixing = layers(model)[0].mixing(["default"])
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
        x = pictures()
        if checkpointing:
            y = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)
        else:
            y = model(x)
        y.square().sum().backward()
        grads.append(layers(model)[0].atoms_delta["default"].grad)
    assert torch.equal(*grads)


def test_compiled_and_eager_agree():
    model = adapted(dtype=torch.float32)
    expected = model(pictures(torch.float32))
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled(pictures(torch.float32)), expected, rtol=1e-5, atol=1e-6)


def test_an_adapter_moved_behind_autograds_back_still_counts():
    model = adapted(move=False)
    base = model(pictures())
    layers(model)[0].atoms_delta["default"].data.fill_(0.1)
    assert not torch.allclose(model(pictures()), base)


def test_a_named_set_means_the_layers_it_says():
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, (3, 1)), nn.Linear(4, 4))
    assert conv_targets(model, "conv3x3") == ["0"]
    assert conv_targets(model, "conv") == ["0", "1", "2"]
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
    model = net()
    with pytest.raises(ValueError, match="head has filters of 1 taps, fewer than m=9"):
        get_peft_model(model, AtomsConfig(m=9, target_modules="conv"))
    with pytest.raises(ValueError, match="norm is a GroupNorm, atoms take Conv2d"):
        get_peft_model(model, AtomsConfig(m=1, target_modules=["conv", "norm"]))
    assert not any(isinstance(module, BaseTunerLayer) for module in model.modules())


def test_a_target_that_matches_nothing_is_an_error():
    with pytest.raises(ValueError, match="not found in the base model"):
        get_peft_model(net(), AtomsConfig(target_modules=["attention"]))
    with pytest.raises(ValueError, match="conv3x3.* matches no layer of Sequential"):
        get_peft_model(nn.Sequential(nn.Linear(4, 4)), AtomsConfig())


def test_peft_adapters_of_other_kinds_still_work_after_registration():
    model = get_peft_model(net(dtype=torch.float32), LoraConfig(r=2, target_modules=["head"]))
    assert model(pictures(torch.float32)).shape == (2, 4, 9, 9)

"""A method from another package: what it must write, how it joins, and what the contract finds where it is wrong."""

import dataclasses
from dataclasses import dataclass
from enum import Enum
from importlib.metadata import EntryPoint

import pytest
import torch
from torch import nn

import sd_atoms.methods.registry as registry
from sd_atoms.errors import UserError
from sd_atoms.methods import Method, all_methods, get_method
from sd_atoms.methods.config import TargetConfig
from sd_atoms.methods.contract import CHECKS, Case, check_method
from sd_atoms.methods.layer import DeltaLayer
from sd_atoms.tuner.tuned import TunedModel, register_tuner

Kind = Enum("Kind", {"GAIN": "GAIN"}, type=str)


@dataclass
class GainConfig(TargetConfig):
    def __post_init__(self):
        self.peft_type = Kind.GAIN
        super().__post_init__()


class GainLayer(DeltaLayer):
    """Each output of a layer is scaled: ΔW = gain ⊙ W."""

    adapter_layer_names = ("gain_of",)

    def __init__(self, base_layer, adapter_name):
        super().__init__(base_layer, adapter_name)
        self.gain_of = nn.ParameterDict()

    def update_layer(self, adapter_name, config, name):
        self.gain_of[adapter_name] = self._new(torch.zeros(len(self.original("weight"))))
        self._added(adapter_name, config)

    def delta(self, adapter):
        weight, gain = self.original("weight"), self.gain_of[adapter]
        return weight.to(gain.dtype) * gain.view(-1, *(1,) * (weight.dim() - 1))


class GainModel(TunedModel):
    prefix, tuner_layer_cls = "gain_", GainLayer


register_tuner(GainConfig, GainModel, "GAIN")
GAIN = Method(
    name="gain",
    help="a factor for every output",
    build=lambda model, settings, target: GainConfig(target_modules=target),
    kind=lambda name: "scale",
    main_kinds=("scale",),
    rates={"scale": 1e-3},
    default_target="conv+linear",
)


def joined(monkeypatch, *values):
    entries = [EntryPoint(f"entry{number}", value, registry.ENTRY_POINTS) for number, value in enumerate(values)]
    monkeypatch.setattr(registry, "entry_points", lambda group: entries if group == registry.ENTRY_POINTS else [])


def test_it_joins_by_its_entry_point_and_keeps_the_contract(monkeypatch, convnet, convnet_inputs):
    joined(monkeypatch, f"{__name__}:GAIN")
    assert list(all_methods())[-1] == "gain"
    method = get_method("gain")
    check_method(method, convnet, convnet_inputs)
    model = convnet()
    outputs = sum(module.weight.shape[0] for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear)))
    assert method.count(model, method.make_config(model)) == outputs


def test_its_settings_are_known_as_its_own(monkeypatch):
    monkeypatch.setattr(f"{__name__}.WITH_SETTING", dataclasses.replace(GAIN, settings=("ceiling",)), raising=False)
    joined(monkeypatch, f"{__name__}:WITH_SETTING")
    assert registry.check_settings(get_method("lora"), ["ceiling"]) == [
        "ceiling: a setting of gain, not of method lora; it has rank, alpha"
    ]


def test_entry_points_that_cannot_be_used_are_named(monkeypatch):
    module = __name__
    monkeypatch.setattr(f"{module}.TAKEN", dataclasses.replace(GAIN, name="lora"), raising=False)
    for values, message in (
        ((f"{module}:GainConfig",), f"entry point entry0 = {module}:GainConfig: is a type, not a Method"),
        ((f"{module}:ABSENT",), f"entry point entry0 = {module}:ABSENT: cannot be loaded"),
        (("no_such_module:METHOD",), "cannot be loaded (No module named 'no_such_module')"),
        ((f"{module}:TAKEN",), f"entry point entry0 = {module}:TAKEN: there is a method 'lora' already"),
        ((f"{module}:GAIN", f"{module}:GAIN"), "entry point entry1"),
    ):
        joined(monkeypatch, *values)
        with pytest.raises(UserError) as error:
            all_methods()
        assert message in str(error.value)


def starting_elsewhere(self, adapter_name, config, name):
    self.gain_of[adapter_name] = self._new(torch.full((len(self.original("weight")),), 1e-6))
    self._added(adapter_name, config)


def writing_to_the_base(self, adapter):
    self.base_layer.weight.data += 1e-3
    return DELTA(self, adapter)


def forgetting(self, adapter_name):
    self.scaling.pop(adapter_name)
    self.base_layer.weight.data += 1


def merging_twice_as_much(self, adapters):
    values = self.values(adapters)
    return {"weight": 2 * values["weight"] - self.original("weight")}


DELTA = GainLayer.delta
BROKEN = [
    ("update_layer", starting_elsewhere, "starts_as_the_base", "differs from the base's before any training"),
    (
        "delta",
        lambda self, adapter: DELTA(self, adapter).detach(),
        "starts_as_the_base",
        "no parameter has a gradient",
    ),
    ("delta", writing_to_the_base, "trains_only_its_own", "a step of the optimiser leaves"),
    ("delta", writing_to_the_base, "off_is_the_base", "differs from the base"),
    ("values", lambda self, adapters: {}, "off_is_the_base", "moved parameters change nothing"),
    ("_new", lambda self, value: nn.Parameter(value.to(torch.float64)), "trains_in_float32", "not float32"),
    ("merged_values", merging_twice_as_much, "merges_and_unmerges", "merged, the output is off by"),
    ("delete_adapter", forgetting, "leaves_no_trace", "deleting another adapter changes"),
]


@pytest.mark.parametrize(("part", "wrong", "check", "message"), BROKEN)
def test_the_contract_finds_what_is_wrong(part, wrong, check, message, monkeypatch, convnet, convnet_inputs):
    case = Case(GAIN, convnet, convnet_inputs)
    CHECKS[check](case)
    monkeypatch.setattr(GainLayer, part, wrong)
    with pytest.raises(AssertionError, match=f"method gain: .*{message}"):
        CHECKS[check](case)


def test_the_contract_finds_wrong_statements(monkeypatch, convnet, convnet_inputs):
    def found(check, **changes):
        with pytest.raises(AssertionError) as error:
            CHECKS[check](Case(dataclasses.replace(GAIN, **changes), convnet, convnet_inputs))
        return str(error.value)

    assert "is of kind 'gain', which is none of" in found("trains_only_its_own", kind=lambda name: "gain")
    assert "is of kind 'bias', which has no rate" in found("trains_only_its_own", kind=lambda name: "bias")
    monkeypatch.setattr(GainLayer, "get_delta_weight", lambda self, adapter: DELTA(self, adapter))
    assert "two adapters with weights do not add up" in found("adds_up")
    monkeypatch.setattr(Method, "count", lambda self, model, config: 7)
    assert "count says 7, " in found("counts_rightly")


def test_the_contract_finds_a_config_that_is_not_saved(monkeypatch, convnet, convnet_inputs):
    monkeypatch.setattr(GainConfig, "save_pretrained", lambda self, folder: TargetConfig.save_pretrained(
        GainConfig(target_modules=["head"]), folder))  # fmt: skip
    with pytest.raises(AssertionError, match="of the state are not loaded"):
        CHECKS["loads_what_it_saved"](Case(GAIN, convnet, convnet_inputs))

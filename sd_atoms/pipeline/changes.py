"""What adapters change in a network, layer by layer, apart from how they do it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from sd_atoms.methods.adapters import tuner_layers
from sd_atoms.methods.factors import Factors, low_rank
from sd_atoms.tuner import AtomsLayer
from sd_atoms.tuner.shared import base_of
from sd_atoms.tuner.tuned import TunedLayer


@dataclass
class Change:
    """What is added to a layer.

    values: parameter ("weight", "bias") -> its change, float32. factors: of the weight's, one for each adapter, where
    all are of low rank; empty otherwise. norm: whether the layer is one that normalises.
    """

    values: dict[str, torch.Tensor]
    factors: list[Factors] = field(default_factory=list)
    norm: bool = False


def weight_change(layer: BaseTunerLayer, adapter: str) -> torch.Tensor:
    """What an adapter adds to the weight of a layer; of PEFT's own tuners, whose `get_delta_weight` means what they
    like, by merging it."""
    if isinstance(layer, TunedLayer):
        return layer.get_delta_weight(adapter)
    return _merging_change(layer, adapter)["weight"]


def _merging_change(layer: BaseTunerLayer, adapter: str) -> dict[str, torch.Tensor]:
    parameters = dict(layer.get_base_layer().named_parameters(recurse=False))
    before = {name: value.data for name, value in parameters.items()}
    for name, value in parameters.items():
        value.data = before[name].float().clone()  # in half precision a small change is lost in rounding
    layer.merge(adapter_names=[adapter])
    changes = {name: value.data - before[name] for name, value in parameters.items()}
    layer.merged_adapters.clear()
    for name, value in parameters.items():
        value.data = before[name]
    return changes


@torch.no_grad()
def layer_change(layer: BaseTunerLayer, adapter: str) -> Change:
    """What an adapter adds to a layer at its present strength; parameters that stay as they are are left out."""
    factors = low_rank(layer, adapter)
    if factors is not None:
        # of PEFT's LoRA, merging would round the change to the last bit of the weight
        change = factors.up.flatten(1).float() @ factors.down.flatten(1).float() * factors.scale
        values = {"weight": change.view(base_of(layer).weight.shape)}
    elif isinstance(layer, AtomsLayer):  # a TunedLayer too, whose effective weight need not be made for it
        values = {"weight": layer.get_delta_weight(adapter).float()}
    elif isinstance(layer, TunedLayer):
        values = {
            name: value.float() - layer.original(name).float()
            for name, value in layer.merged_values([adapter]).items()
            if name != "weight"
        }
        if hasattr(base_of(layer), "weight"):
            values["weight"] = layer.get_delta_weight(adapter).float()
    else:
        values = _merging_change(layer, adapter)
    values = {name: value for name, value in values.items() if value.any()}
    kept = [factors] if factors is not None and "weight" in values else []
    return Change(values, kept, "Norm" in type(base_of(layer)).__name__)


def network_changes(model: nn.Module | None, adapter: str) -> Iterator[tuple[str, Change]]:
    """Layer -> what an adapter adds to it, of those that it changes at all; nothing without a network."""
    for name, layer in {} if model is None else tuner_layers(model).items():
        if adapter in layer._get_available_adapters():
            change = layer_change(layer, adapter)
            if change.values:
                yield name, change


def add_changes(total: dict[str, Change], more: Mapping[str, Change]) -> None:
    """Adds further changes to those of the same layers, in place."""
    for name, change in more.items():
        if name not in total:
            total[name] = change
            continue
        mine = total[name]
        of_weight = [own for own in (mine, change) if "weight" in own.values]
        ranked = all(own.factors for own in of_weight)
        mine.factors = [factors for own in of_weight for factors in own.factors] if ranked else []
        for parameter, value in change.values.items():
            mine.values[parameter] = mine.values[parameter] + value if parameter in mine.values else value

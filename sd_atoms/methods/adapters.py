"""The calls that every adapter answers, whoever wrote its tuner: PEFT's, with what PEFT leaves to its caller.

They work on any network that adapters were put into: a plain module, or a model of diffusers or transformers, but not
on PEFT's own wrapper `PeftModel`, which has them all.
"""

import contextlib
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence

import torch
from peft import PeftConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer, cast_adapter_dtype, set_requires_grad
from torch import nn

from sd_atoms.errors import UserError
from sd_atoms.tuner.tuned import TunedLayer

# By this, models of diffusers and transformers know that they have adapters. Their own `add_adapter` does no more, but
# that of transformers 5.24 asks for a PEFT newer than any released.
LOADED = "_hf_peft_config_loaded"
# what PEFT raises of settings it cannot take, those of the wrong type too
REFUSALS = (ValueError, TypeError, AttributeError, NotImplementedError, re.error)
Originals = Mapping[nn.Module, Mapping[str, torch.Tensor]]


def add_adapter(model: nn.Module, config: PeftConfig, adapter_name: str = "default") -> list[nn.Parameter]:
    """Puts a new adapter into a network and makes it the only active one; with the first, PEFT freezes the base.

    What it trains is float32 at least, also on a base in half precision, where PEFT would follow the base.

    Args:
        model: changed in place; adapters that it carries already stay.
        config: as `Method.make_config` returns it.
        adapter_name: not yet taken.

    Returns:
        The parameters that are trained now.

    Raises:
        UserError: the name is taken, or PEFT refuses the settings for this network; one line.
    """
    if adapter_name in getattr(model, "peft_config", {}):
        raise UserError(f"adapter_name={adapter_name!r}: there is an adapter of that name already")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
            inject_adapter_in_model(config, model, adapter_name)
    except REFUSALS as error:
        raise UserError(f"{config.peft_type.value}: {one_line(error)}") from error
    if hasattr(model, LOADED):
        setattr(model, LOADED, True)
    cast_adapter_dtype(model, adapter_name)
    for layer in tuner_layers(model).values():
        _follow_offloading(layer)
    set_adapters(model, [adapter_name])
    set_requires_grad(model, adapter_name, not config.inference_mode)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _follow_offloading(layer: BaseTunerLayer) -> None:
    """Brings in what accelerate offloaded of a layer of PEFT's that holds its numbers in ParameterDicts, as LoHa and
    LoKr: accelerate's hooks fire where a module is called, and these never are, so it would compute with any numbers.
    """
    ours = isinstance(layer, TunedLayer)
    held = [part for part in layer.modules() if isinstance(part, nn.ParameterDict) and len(part)]
    if held and not ours and _bring_in not in layer._forward_pre_hooks.values():
        layer.register_forward_pre_hook(_bring_in)
        layer.register_forward_hook(_send_away)


def _bring_in(layer: nn.Module, inputs) -> None:
    for part in layer.modules():
        if isinstance(part, nn.ParameterDict) and hasattr(part, "_hf_hook"):
            part._hf_hook.pre_forward(part)


def _send_away(layer: nn.Module, inputs, output) -> None:
    for part in layer.modules():
        if isinstance(part, nn.ParameterDict) and hasattr(part, "_hf_hook"):
            part._hf_hook.post_forward(part, None)


def set_adapters(model: nn.Module, adapters: Sequence[str], weights: Sequence[float] | None = None) -> None:
    """Makes these adapters the active ones, with these strengths.

    Args:
        model: the network.
        adapters: their names.
        weights: one each; None leaves the strengths as they are.

    Raises:
        UserError: not one weight each, or a tuner that knows no strength (OFT, IA3, …) is given another than 1.
    """
    if weights is not None and len(weights) != len(adapters):
        raise UserError(f"{len(adapters)} adapters and {len(weights)} weights: one weight for each is needed")
    given = {} if weights is None else dict(zip(adapters, weights, strict=True))
    configs = getattr(model, "peft_config", {})
    layers = tuner_layers(model)
    for name, weight in given.items():
        fixed = [layer for layer in layers.values() if _has(layer, name) and not _has_strength(layer)]
        if fixed and weight != 1:
            kind = configs[name].peft_type.value if name in configs else type(fixed[0]).__name__
            raise UserError(f"weight={weight!r} for {name!r}: {kind} has no strength, only 1 is allowed")
    for layer in layers.values():
        layer.set_adapter(list(adapters))
        for name, weight in given.items():
            if _has_strength(layer):
                layer.set_scale(name, weight)


@contextlib.contextmanager
def adapters_off(*models: nn.Module | None) -> Iterator[None]:
    """Networks without their adapters for a while; unlike PEFT's own switch it leaves alone what requires gradients.

    A None among them is a part that a pipeline lacks.
    """
    layers = [layer for model in models if model is not None for layer in tuner_layers(model).values()]
    before = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, off in zip(layers, before, strict=True):
            layer._disable_adapters = off


@torch.no_grad()
def merge_adapters(model: nn.Module, adapters: Sequence[str] | None = None) -> Originals:
    """Puts adapters, None for the active ones, into the base's weights; returns what `unmerge_adapters` needs.

    PEFT's own tuners unmerge by subtraction, which rounds, so the originals of their layers are kept here; our layers
    keep theirs.
    """
    originals = {}
    for layer in tuner_layers(model).values():
        if not isinstance(layer, TunedLayer):
            base = layer.get_base_layer()
            originals[base] = {name: value.detach().clone() for name, value in base.named_parameters()}
        layer.merge(adapter_names=None if adapters is None else list(adapters))
    return originals


@torch.no_grad()
def unmerge_adapters(model: nn.Module, originals: Originals) -> None:
    """Undoes `merge_adapters`, bit for bit."""
    for layer in tuner_layers(model).values():
        if layer.merged:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Unmerge result can be inaccurate")
                layer.unmerge()
    for base, values in originals.items():
        for name, value in values.items():
            parameter = base.get_parameter(name)
            if parameter.stride() != value.stride():  # OFT leaves a transposed one, whose products round otherwise
                parameter.data = torch.empty_like(value)
            parameter.copy_(value)


def delete_adapter(model: nn.Module, adapter_name: str) -> None:
    """Takes an adapter out again; its layers stay wrapped, and compute what they would without it."""
    for layer in tuner_layers(model).values():
        layer.delete_adapter(adapter_name)
    model.peft_config.pop(adapter_name, None)
    if not model.peft_config:
        del model.peft_config
        if hasattr(model, LOADED):
            setattr(model, LOADED, False)


def unwrap(model: nn.Module) -> None:
    """Puts layers that no adapter is left in back in the place of what wrapped them."""
    for name, layer in tuner_layers(model).items():
        if not layer._get_available_adapters():
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, layer.get_base_layer())


def tuner_layers(model: nn.Module) -> dict[str, BaseTunerLayer]:
    """The layers that carry adapters, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


def one_line(error: Exception) -> str:
    """The message of an error of PEFT's, without its line breaks."""
    return " ".join(str(error).split())


def _has(layer: BaseTunerLayer, adapter: str) -> bool:
    return any(adapter in getattr(layer, part) for part in layer.adapter_layer_names)


def _has_strength(layer: BaseTunerLayer) -> bool:
    # OFT and BOFT have a set_scale that reads an attribute they lack
    return hasattr(layer, "set_scale") and hasattr(layer, "scaling")

"""The nearest filter atoms of any change: of an adapter that another program made, or of a whole fine-tune."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from sd_atoms.atoms import block_rows, filter_rows, filters_of
from sd_atoms.atoms.fit import fit_atoms, fit_overcomplete
from sd_atoms.atoms.measures import energy
from sd_atoms.errors import UserError
from sd_atoms.formats.keys import TEXT, UNET
from sd_atoms.methods import get_method
from sd_atoms.methods.adapters import add_adapter
from sd_atoms.pipeline.changes import Change
from sd_atoms.pipeline.export import Layers
from sd_atoms.tuner import AtomsLayer, named_targets
from sd_atoms.tuner.shared import base_of
from sd_atoms.tuner.targets import TARGET_SETS


@dataclass(frozen=True)
class Extraction:
    """How much of a change atoms take, as energy ‖ΔF‖².

    layers: name -> (share of all energy, explained share of its own), of the layers with atoms. outside: what of the
    change lies elsewhere -> its share of all. explained: share of all.
    """

    layers: dict[str, tuple[float, float]]
    outside: dict[str, float]
    explained: float


@torch.no_grad()
def extract(pipe, layers: Layers, settings: Mapping[str, int], target: str, adapter_name: str) -> Extraction:
    """Puts an adapter of atoms into the pipeline's UNet that is the nearest to a change.

    Args:
        pipe: a plain pipeline, of the base that the change is of.
        layers: the change.
        settings: of the method atoms: m, m1, kc.
        target: a named set of layers, or an expression. Where none of them is changed there are no atoms.
        adapter_name: of the new adapter.

    Raises:
        UserError: the settings do not go together.
    """
    unet, method = pipe.unet, get_method("atoms")
    changed = [name for (place, name), own in layers.items() if place == UNET and "weight" in own.values]
    if target in TARGET_SETS:
        changed = [name for name in named_targets(unet, target) if name in changed]
        target = changed
    if target:
        add_adapter(unet, method.make_config(unet, dict(settings), target), adapter_name)
    found = {}
    for name, layer in unet.named_modules():
        if not isinstance(layer, AtomsLayer):
            continue
        change = layers.get((UNET, name), Change({})).values.get("weight")
        if change is not None:
            _fit(layer, change, adapter_name)
            left = energy(change - layer.get_delta_weight(adapter_name))
            found[name] = energy(change), 1 - left / energy(change)
    total = sum(energy(value) for own in layers.values() for value in own.values.values())
    outside: dict[str, float] = {}
    for (place, name), own in layers.items():
        for parameter, value in own.values.items():
            if place == TEXT or name not in found or parameter != "weight":
                kind = _kind(pipe, place, name, parameter)
                outside[kind] = outside.get(kind, 0.0) + energy(value) / total
    explained = sum(size * share for size, share in found.values()) / total
    return Extraction({name: (size / total, share) for name, (size, share) in found.items()}, outside, explained)


def _fit(layer: AtomsLayer, change: torch.Tensor, adapter: str) -> None:
    plan, weight = layer.plan[adapter], layer.base_weight
    if plan.m1:
        if layer.groups > 1:
            raise UserError("m1: overcomplete atoms are fitted to convolutions without groups")
        beta, delta = fit_overcomplete(filters_of(weight), filters_of(change), layer.atoms_initial[adapter], plan.m1)
        layer.atoms_beta[adapter].copy_(beta)
        layer.atoms_delta[adapter].copy_(delta)
    elif plan.m:
        delta = fit_atoms(filter_rows(weight), filter_rows(change), layer.atoms_initial[adapter])
        layer.atoms_delta[adapter].copy_(delta)
    if plan.block:
        left = change - layer.get_delta_weight(adapter)  # what the others have not taken
        rows = [block_rows(filters_of(value), plan.block).flatten(0, 1) for value in (weight, left)]
        layer.atoms_block_delta[adapter].copy_(fit_atoms(*rows, layer.atoms_block_initial[adapter]))


def _kind(pipe, place: str, name: str, parameter: str) -> str:
    """What a reader would call the place of a change."""
    if place == TEXT:
        return "text encoder"
    module = base_of(pipe.unet.get_submodule(name))
    if "Norm" in type(module).__name__:
        return "norm layers"
    if parameter == "bias":
        return "biases"
    if isinstance(module, nn.Conv2d):
        return "×".join(map(str, module.kernel_size)) + " convolutions"
    return "attention" if ".attn" in name else "other Linear layers"


@torch.no_grad()
def model_changes(base, other) -> dict[tuple[str, str], Change]:
    """What a pipeline's UNet and text encoder have other than a base's.

    Raises:
        UserError: they are of two architectures.
    """
    found = {}
    for place in (UNET, TEXT):
        theirs = getattr(other, place)
        for name, module in getattr(base, place).named_modules():
            values = {}
            for parameter, value in module.named_parameters(recurse=False):
                try:
                    mine = theirs.get_submodule(name).get_parameter(parameter)
                    values[parameter] = mine.float()[: len(value)] - value.float()  # words may have been added
                except (AttributeError, RuntimeError) as error:
                    raise UserError(f"it is of another architecture than the base ({name}.{parameter})") from error
            values = {parameter: value for parameter, value in values.items() if value.any()}
            if values:
                found[place, name] = Change(values, norm="Norm" in type(module).__name__)
    return found

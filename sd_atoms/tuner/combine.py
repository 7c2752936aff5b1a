"""Weighted sums of adapters as new adapters."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from sd_atoms.atoms import taps
from sd_atoms.tuner.config import AtomsConfig
from sd_atoms.tuner.layer import AtomsLayer

SHARED = ("solver", "kc", "block_layers")  # settings that the adapters of a sum must agree on


@torch.no_grad()
def add_weighted_adapter(
    model: nn.Module, adapters: Sequence[str], weights: Sequence[float], adapter_name: str
) -> None:
    """Adds an adapter whose change is Σ weight·scale·change of others, exactly: sums, differences, interpolation.

    The result is an adapter like any other: it can be activated, saved, trained on. It is not made active.

    Args:
        model: a PEFT model, or a diffusers or transformers model with adapters, such as `pipe.unet`.
        adapters: names of loaded atom adapters; a layer that only some of them have takes part.
        weights: one number each, of any sign; 0.5 and 0.5 is the mean of two.
        adapter_name: the new adapter.

    Raises:
        ValueError: an adapter is missing or of another kind, the new name is taken, there is not one weight each, the
            adapters are merged, or no single adapter can express the sum: sparse, overcomplete or block atoms over
            different initial atoms.
    """
    configs = _configs(model, adapters, weights, adapter_name)
    weighted = dict(zip(adapters, weights, strict=True))
    layers = {
        name: module
        for name, module in _inner(model).named_modules()
        if isinstance(module, AtomsLayer) and any(adapter in module.plan for adapter in adapters)
    }
    by_tap = not all(_same_atoms(layer, adapters) for layer in layers.values())
    overcomplete = any(config.m1 for config in configs)
    if by_tap and (configs[0].solver == "sparse" or overcomplete):
        raise ValueError(
            f"{', '.join(adapters)}: their initial atoms differ, which no sum of "
            f"{'sparse' if configs[0].solver == 'sparse' else 'overcomplete'} atoms can express; activate them "
            "together with weights instead"
        )
    m1 = sum(config.m1 or 1 for config in configs) if overcomplete else 0
    counts = {name: _atoms_of(layer, adapters, by_tap) for name, layer in layers.items()}
    usual = Counter(m for m in counts.values() if m).most_common(1)
    usual_m = usual[0][0] if usual else 0
    config = replace(
        configs[0],
        m=usual_m,
        m1=m1,
        train_beta=True,  # the β of a sum are not those of any seed
        m_c=0 if by_tap else configs[0].m_c,
        m_pattern={re.escape(name): m for name, m in counts.items() if m not in (0, usual_m)},
        scale_pattern={},
        target_modules=list(layers),
        inference_mode=True,
    )
    for name, layer in layers.items():
        trainable = [parameter for parameter in layer.parameters() if parameter.requires_grad]
        layer.update_layer(adapter_name, config, name)
        _fill(layer, weighted, adapter_name, by_tap)
        for parameter in trainable:
            parameter.requires_grad_()
    config.inference_mode = False
    model.peft_config[adapter_name] = config


def _configs(model, adapters, weights, adapter_name) -> list[AtomsConfig]:
    known = getattr(model, "peft_config", {})
    if adapter_name in known:
        raise ValueError(f"adapter_name={adapter_name!r}: there is an adapter of that name already")
    if not adapters or len(adapters) != len(weights):
        raise ValueError(f"{len(adapters)} adapters and {len(weights)} weights: one weight for each of one or more")
    if len(set(adapters)) < len(adapters):
        raise ValueError(f"adapters={list(adapters)}: each may come once")
    for adapter in adapters:
        if not isinstance(known.get(adapter), AtomsConfig):
            there = ", ".join(name for name, config in known.items() if isinstance(config, AtomsConfig)) or "none"
            raise ValueError(f"{adapter!r} is not a loaded atom adapter; there are {there}")
    configs = [known[adapter] for adapter in adapters]
    for setting in SHARED:
        values = {getattr(config, setting) for config in configs}
        if len(values) > 1:
            raise ValueError(
                f"{', '.join(adapters)}: {setting} differs ({', '.join(map(repr, sorted(values, key=str)))})"
            )
    for module in _inner(model).modules():
        if isinstance(module, AtomsLayer) and module.merged:
            raise ValueError("adapters are merged; unmerge them first")
    return configs


def _inner(model: nn.Module) -> nn.Module:
    """The network that layer names count from."""
    if isinstance(model, PeftModel):
        return model.get_base_model()
    return model.model if isinstance(model, BaseTuner) else model


def _same_atoms(layer: AtomsLayer, adapters: Sequence[str]) -> bool:
    for atoms in (layer.atoms_initial, layer.atoms_block_initial):
        found = [atoms[adapter] for adapter in adapters if adapter in atoms]
        if any(other.shape != found[0].shape or not torch.equal(other, found[0]) for other in found[1:]):
            return False
    return len({layer.l1[adapter] for adapter in adapters if adapter in layer.l1}) == 1


def _atoms_of(layer: AtomsLayer, adapters: Sequence[str], by_tap: bool) -> int:
    """m of the sum in this layer."""
    m = max(layer.plan[adapter].m for adapter in adapters if adapter in layer.plan)
    return taps(layer.base_weight) if by_tap and m else m


def _fill(layer: AtomsLayer, weighted: dict[str, float], new: str, by_tap: bool) -> None:
    """Writes the sum into the adapter `new` of a layer, which has room for it and no change yet."""
    for initial, delta in (
        (layer.atoms_initial, layer.atoms_delta),
        (layer.atoms_block_initial, layer.atoms_block_delta),
    ):
        if new not in delta:
            continue
        sources = [adapter for adapter in weighted if adapter in delta]
        # atoms that are single taps express any change of filters with orthonormal atoms
        atoms = torch.eye(len(initial[new])) if by_tap else initial[sources[0]]
        initial[new].copy_(atoms)
        at = 0
        for adapter in sources:
            change = delta[adapter].to(delta[new].dtype) * (weighted[adapter] * layer.scaling[adapter])
            if by_tap:
                change = initial[adapter].to(change.dtype).T @ change  # (K, m) @ (m, K) -> (K, K)
            if initial is layer.atoms_block_initial or not layer.plan[new].m1:
                delta[new].add_(change)
                continue
            m1 = layer.plan[adapter].m1
            beta = layer.atoms_beta[new][:, :, at : at + (m1 or 1)]
            if m1:
                beta.copy_((layer.atoms_beta if adapter in layer.atoms_beta else layer.beta)[adapter])
            else:
                beta.fill_(1)  # one atom change for every input channel
            delta[new][:, at : at + (m1 or 1)] = change if m1 else change.unsqueeze(1)
            at += m1 or 1

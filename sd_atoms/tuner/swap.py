"""Other numbers in a loaded adapter."""

from collections.abc import Mapping

import torch
from torch import nn

from sd_atoms.tuner.config import AtomsConfig
from sd_atoms.tuner.layer import AtomsLayer
from sd_atoms.tuner.plan import layer_plan


@torch.no_grad()
def swap_adapter(model: nn.Module, adapter: str, config: AtomsConfig, state: Mapping[str, torch.Tensor]) -> None:
    """Writes the numbers of another adapter over those of a loaded one, in place.

    Every tensor stays where it is, so that compiled and captured networks go on. Fewer atoms, or fewer layers, than
    the loaded adapter has are filled up with zeros, which change nothing.

    Args:
        model: the network that carries the adapter.
        adapter: its name.
        config: the settings of the new one.
        state: "<layer>.<part>" -> the new numbers, parts as in `AtomsLayer`.

    Raises:
        ValueError: the new numbers do not fit in; nothing is changed then.
    """
    check_swap(model, adapter, config, state)
    layers = _layers(model, adapter)
    names = {key.rpartition(".")[0] for key in state}
    for name, layer in layers.items():
        for part in (*layer.adapter_layer_names, "atoms_initial", "atoms_block_initial"):
            if adapter not in getattr(layer, part):
                continue
            place = getattr(layer, part)[adapter]
            if f"{name}.{part}" in state:
                value = state[f"{name}.{part}"]
                if value.shape != place.shape:
                    place.zero_()
                place[tuple(map(slice, value.shape))] = value.to(place)
            elif part in ("atoms_delta", "atoms_block_delta"):
                place.zero_()
        if name in names:
            scale = layer_plan(config, name, layer.get_base_layer()).scale
            before = layer.initial_scaling[adapter]
            # as `set_scale` has set it; what was 0 at any strength is at 1
            layer.scaling[adapter] = layer.scaling[adapter] * (scale / before) if before else scale
            layer.initial_scaling[adapter] = scale
        layer.delta_is_zero[adapter] = False
    model.peft_config[adapter].scale_pattern = dict(config.scale_pattern)  # as it is saved from now on


def check_swap(model: nn.Module, adapter: str, config: AtomsConfig, state: Mapping[str, torch.Tensor]) -> None:
    """Whether `swap_adapter` can write these numbers over those of a loaded adapter.

    Raises:
        ValueError: it cannot.
    """
    layers, loaded = _layers(model, adapter), model.peft_config[adapter]
    for setting in ("solver", "kc", "m1", "train_beta", *(("l1",) if config.solver == "sparse" else ())):
        ours, theirs = getattr(loaded, setting), getattr(config, setting)
        if ours != theirs and not (setting == "m1" and 0 < theirs <= ours):
            raise ValueError(f"{setting}={theirs!r} cannot be swapped into {adapter!r}, which has {setting}={ours!r}")
    of_beta = [(settings.seed, settings.m, settings.m1) for settings in (loaded, config)]
    if config.m1 and not config.train_beta and of_beta[0] != of_beta[1]:
        raise ValueError(f"its β is drawn from another seed or shape than that of {adapter!r}")
    if any(layer.merged for layer in layers.values()):
        raise ValueError(f"{adapter!r} cannot be swapped while adapters are merged (fused)")
    misfits = []
    for key, value in state.items():
        name, _, part = key.rpartition(".")
        place = getattr(layers[name], part, {}) if name in layers else {}
        room = place[adapter].shape if adapter in place else ()
        if len(room) != value.dim() or any(size > most for size, most in zip(value.shape, room, strict=True)):
            misfits.append(f"{key} {tuple(value.shape)} into {tuple(room) or 'nothing'}")
    if misfits:
        raise ValueError(f"{len(misfits)} of its tensors do not fit into {adapter!r}: {'; '.join(misfits[:3])}")


def _layers(model: nn.Module, adapter: str) -> dict[str, AtomsLayer]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, AtomsLayer) and adapter in module.plan
    }

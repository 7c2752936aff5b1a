"""LoRA: the settings that diffusers' own loader wants, and other numbers written into a loaded one."""

import math
from collections.abc import Mapping

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import nn

from sd_atoms.tuner.plan import matching

LORA_KEYS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")
LORA_PARTS = ("lora_A.weight", "lora_B.weight")


def check_lora_swap(model: nn.Module, adapter: str, config: LoraConfig, state: Mapping[str, torch.Tensor]) -> None:
    """Whether `swap_lora` can write these numbers over those of a loaded LoRA.

    Raises:
        ValueError: it cannot.
    """
    layers = _layers(model, adapter)
    if any(layer.merged for layer in layers.values()):
        raise ValueError(f"{adapter!r} cannot be swapped while adapters are merged (fused)")
    misfits = []
    for key, value in state.items():
        name, matrix, _ = key.rsplit(".", 2)
        room = getattr(layers[name], matrix)[adapter].weight.shape if name in layers else ()
        if len(room) != value.dim() or any(size > most for size, most in zip(value.shape, room, strict=True)):
            misfits.append(f"{key} {tuple(value.shape)} into {tuple(room) or 'nothing'}")
    if misfits:
        raise ValueError(f"{len(misfits)} of its tensors do not fit into {adapter!r}: {'; '.join(misfits[:3])}")


@torch.no_grad()
def swap_lora(model: nn.Module, adapter: str, config: LoraConfig, state: Mapping[str, torch.Tensor]) -> None:
    """Writes the numbers of another LoRA over those of a loaded one, in place, once `check_lora_swap` has passed.

    Every tensor stays where it is. A lower rank, or fewer layers, are filled up with zeros, which change nothing; the
    rank stays what the tensors have, and alpha becomes what gives the new LoRA its strength at that rank.
    """
    layers, alphas = _layers(model, adapter), {}
    for name, layer in layers.items():
        for part in LORA_PARTS:
            place, value = getattr(layer, part.partition(".")[0])[adapter].weight, state.get(f"{name}.{part}")
            place.zero_()
            if value is not None:
                place[tuple(map(slice, value.shape))] = value.to(place)
        if f"{name}.{LORA_PARTS[0]}" in state:
            divisor = _divisor(layer.r[adapter], layer.use_rslora[adapter])
            before = layer.lora_alpha[adapter] / divisor
            strength = layer.scaling[adapter] / before if before else 1.0  # as `set_adapters` has set it
            alpha = matching(config.alpha_pattern, name, config.lora_alpha)
            scaling = alpha / _divisor(matching(config.rank_pattern, name, config.r), config.use_rslora)
            layer.lora_alpha[adapter] = scaling * divisor
            layer.scaling[adapter] = scaling * strength
        alphas[name] = layer.lora_alpha[adapter]
    model.peft_config[adapter].alpha_pattern = alphas


def _layers(model: nn.Module, adapter: str) -> dict[str, LoraLayer]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and adapter in module.lora_A
    }


def _divisor(rank: int, use_rslora: bool) -> float:
    return math.sqrt(rank) if use_rslora else rank

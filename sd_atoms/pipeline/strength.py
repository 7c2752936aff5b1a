"""A strength folded into an adapter: what comes out does at strength 1 what the adapter did at that one."""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from peft import PeftConfig
from torch import nn

from sd_atoms.errors import UserError
from sd_atoms.pipeline.adapters import base_weight, network
from sd_atoms.pipeline.artefact import Artefact, layer_and_part
from sd_atoms.tuner import AtomsConfig
from sd_atoms.tuner.plan import matching

ALL = ".*"
State = Mapping[str, torch.Tensor]
# peft_type -> parts of a layer, of which it has one, that its change is a multiple of
FACTORS = {
    "LORA": ("lora_B.weight", "lora_B.bias", "lora_embedding_B"),
    "LOHA": ("hada_w1_a",),
    "LOKR": ("lokr_w1", "lokr_w1_a"),
    "LORA_CONV": ("conv_lora_B",),
    "LYCORIS": ("lycoris_up", "lycoris_w1", "lycoris_w1_a"),
}


def folded(artefact: Artefact, strength: float, pipe) -> Artefact:
    """The adapter with its strength folded in; rows of tokens have none and stay.

    Args:
        artefact: an adapter of any method.
        strength: as `set_adapters` takes it, for the UNet and the text encoder alike.
        pipe: its base in float32, which is not changed.

    Raises:
        UserError: the adapter has no strength, or none that is known how to fold.
    """
    if strength == 1:
        return artefact
    if artefact.config is None and artefact.text_config is None:
        raise UserError(f"strength={strength:g}: {artefact.source} has tokens alone, which have no strength")
    config, state = _folded(artefact.config, artefact.state, strength, network(pipe, "unet"))
    text = _folded(artefact.text_config, artefact.text_state, strength, network(pipe, "text_encoder"))
    return replace(artefact, config=config, state=state, text_config=text[0], text_state=text[1])


def _folded(
    config: PeftConfig | None, state: State, strength: float, model: nn.Module
) -> tuple[PeftConfig | None, dict[str, torch.Tensor]]:
    if config is None:
        return None, dict(state)
    if isinstance(config, AtomsConfig):  # with trained β the change is a product of two parts that both moved
        return replace(config, scale_pattern=_scaled(config.scale_pattern, state, strength)), dict(state)
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind in FACTORS and not getattr(config, "use_dora", False):
        parts = FACTORS[kind]
        return config, {key: v * strength if layer_and_part(key)[1] in parts else v for key, v in state.items()}
    if kind in COPIES:
        return config, COPIES[kind](state, strength, model)
    raise UserError(f"strength={strength:g}: {kind} has none that can be folded into its numbers; only 1 is allowed")


def _scaled(pattern: Mapping[str, float], state: State, strength: float) -> dict[str, float]:
    """The pattern times a strength. Where it has more than one key, layer by layer: the first key that matches holds,
    and a file's keys may be sorted."""
    if not pattern.keys() - {ALL}:
        return {ALL: pattern.get(ALL, 1.0) * strength}
    found = {}
    for layer in dict.fromkeys(layer_and_part(key)[0] for key in state):
        found[re.escape(layer)] = matching(pattern, layer, 1.0) * strength
    return found


def _of_copies(state: State, strength: float, model: nn.Module) -> dict[str, torch.Tensor]:
    """p + strength·(copy − p) in place of each copy of a parameter p."""
    return {key: _towards(_original(model, key, "selective_"), copy, strength) for key, copy in state.items()}


def _of_difffit(state: State, strength: float, model: nn.Module) -> dict[str, torch.Tensor]:
    """The same of copies; of a layer's scale vectors, 1 + strength·(γ·γ_block − 1) in one and 1 in the other."""
    found = {}
    for key, value in state.items():
        layer, part = layer_and_part(key)
        other = state.get(f"{layer}.difffit_scale")
        if part == "difffit_scale":
            found[key] = 1 + strength * (value * state.get(f"{layer}.difffit_block_scale", 1) - 1)
        elif part == "difffit_block_scale":
            found[key] = 1 + strength * (value - 1) if other is None else torch.ones_like(value)
        else:
            found[key] = _towards(_original(model, key, "difffit_"), value, strength)
    return found


COPIES: dict[str, Callable[[State, float, nn.Module], dict[str, torch.Tensor]]] = {
    "SELECTIVE": _of_copies,
    "DIFFFIT": _of_difffit,
}


def _original(model: nn.Module, key: str, prefix: str) -> torch.Tensor:
    layer, part = layer_and_part(key)
    module, name = model.get_submodule(layer), part.removeprefix(prefix)
    return base_weight(module) if name == "weight" else getattr(module, name)


def _towards(original: torch.Tensor, copy: torch.Tensor, strength: float) -> torch.Tensor:
    start = original.detach().to(copy)
    return start + strength * (copy - start)

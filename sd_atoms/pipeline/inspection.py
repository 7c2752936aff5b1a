"""What an adapter changes, and what a UNet has to adapt: the job of `sd-atoms inspect`."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from tqdm import tqdm

from sd_atoms.atoms.measures import atom_changes, condition, energy, frequency_gain, relative_change, root_ratio
from sd_atoms.errors import UserError
from sd_atoms.methods.adapters import tuner_layers
from sd_atoms.methods.imported import ImportedConfig, kind_of
from sd_atoms.pipeline import load_adapter, open_base, read_artefact
from sd_atoms.pipeline.adapters import base_distance, base_weight
from sd_atoms.pipeline.architectures import build_unet, unet_config
from sd_atoms.pipeline.artefact import TEXT, Artefact
from sd_atoms.pipeline.changes import weight_change
from sd_atoms.pipeline.config import CONFIG_KEYS, UNET, plain_settings
from sd_atoms.pipeline.header import find_base, find_base_config, parse_header
from sd_atoms.tuner import TARGET_SETS, AtomsConfig, AtomsLayer, layer_plan, named_targets
from sd_atoms.tuner.shared import base_of
from sd_atoms.tuner.tuned import TunedLayer

STAGES = {"mid_block": 1, "up_blocks": 2, "conv_out": 3}  # diffusers lists mid_block behind up_blocks
# what --arch counts: every layer as `AtomsConfig(m=9, kc=4)` would adapt it,
USUAL = dict(m=9, kc=4)
# and the 3×3 convolutions by the settings of arXiv 2403.00269
SETTINGS = {
    "m=6": dict(m=6),
    "m=9": dict(m=9),
    "m=12, sparse": dict(m=12, solver="sparse"),
    "m=9, m1=3": dict(m=9, m1=3),
    "m=9, m1=4": dict(m=9, m1=4),
    "blocks kc=4, m_c=9": dict(m=0, kc=4, m_c=9, block_layers="all"),
    "blocks kc=2, m_c=9": dict(m=0, kc=2, block_layers="all"),
}


def inspect_architecture(arch: str) -> dict[str, Any]:
    """Counts layers, weights and what adapters would train in a UNet, without any weight in memory.

    Args:
        arch: one of `sd_atoms.pipeline.architectures.ARCHITECTURES`.

    Returns:
        `parameters` of the UNet; `target_sets`, each with its layers by `kinds`, `weights` and `trained_numbers`;
        `settings` of the 3×3 convolutions with the `trained_numbers`, and with those `beta_frozen` or None.

    Raises:
        UserError: the architecture is unknown.
    """
    unet = build_unet(unet_config(arch), "meta")
    modules = dict(unet.named_modules())
    sets = []
    for target_set in TARGET_SETS:
        names = named_targets(unet, target_set)
        kinds = [_kind(modules[name].weight) for name in names]
        sets.append(
            {
                "target_set": target_set,
                "layers": len(names),
                "kinds": {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)},
                "weights": sum(modules[name].weight.numel() for name in names),
                "trained_numbers": trainable_params(modules, names, AtomsConfig(**USUAL)),
            }
        )
    convolutions = named_targets(unet, "conv3x3")
    settings = []
    for label, values in SETTINGS.items():
        frozen = AtomsConfig(**values, train_beta=False)
        settings.append(
            {
                "setting": label,
                "config": values,
                "trained_numbers": trainable_params(modules, convolutions, AtomsConfig(**values)),
                "beta_frozen": trainable_params(modules, convolutions, frozen) if frozen.m1 else None,
            }
        )
    return {
        "arch": arch,
        "parameters": sum(parameter.numel() for parameter in unet.parameters()),
        "target_sets": sets,
        "settings": settings,
    }


def trainable_params(modules: Mapping[str, nn.Module], names: Sequence[str], config: AtomsConfig) -> int:
    """How many numbers an adapter of that config trains in the layers of those names."""
    return sum(
        layer_plan(config, name, modules[name]).trainable_params(modules[name], config.train_beta) for name in names
    )


@torch.no_grad()
def inspect_adapter(
    adapter: str | Path | Artefact, base: str | None = None, base_config: str | None = None
) -> dict[str, Any]:
    """Measures what an adapter changes in every layer, in float32 on the CPU, at full strength.

    Args:
        adapter: a folder, one .safetensors file, a hub id, or what was read of one.
        base: what it is measured on; None takes the base that the adapter's header names.
        base_config: of a base in one file; None takes that of the adapter's run.

    Returns:
        What the header says; `text_encoder`, which is the `kind`, `layers` and `trained_numbers` of its adapter, or
        None; `part`, what was measured: the UNet, or the text encoder where only that is adapted;
        `relative_change` |ΔF|/|F| over all adapted layers of it, `bias_change` |Δb|/|b| over all trained
        biases or None; its `blocks`; its `layers` from input to output. Of a layer: `relative_change`, `energy` |ΔF|²
        and its `share` of all, `gain_zero` and `gain_pi` (see `frequency_gain`; None with one tap, or where the base
        has no response), `condition` (None unless one K×K matrix mixes the taps), the change |ΔD_m| of every atom
        (`atom_changes`, `block_atom_changes`), and the numbers of its `atoms` and their change where all input
        channels share them.

    Raises:
        UserError: adapter or base cannot be opened, they do not fit, or the adapter's numbers are not finite.
    """
    artefact = adapter if isinstance(adapter, Artefact) else read_artefact(adapter)
    adapter = artefact.source
    tensors = {**artefact.state, **{f"{TEXT}.{key}": value for key, value in artefact.text_state.items()}}
    broken = [key for key, value in tensors.items() if not torch.isfinite(value).all()]
    if broken:
        raise UserError(f"{adapter}: broken, {len(broken)} of its tensors are not finite ({broken[0]} first)")
    about = artefact.about
    base = find_base(base, adapter, parse_header(adapter, about))
    pipe = open_base(base, base_config=find_base_config(base_config, adapter, base))
    artefact = load_adapter(pipe, artefact)
    if artefact.config is None and artefact.text_config is None:
        raise UserError(f"{adapter}: it has tokens alone and changes no layer")
    part = UNET if artefact.config is not None else TEXT
    network = tuner_layers(getattr(pipe, part))
    modules = {name: layer for name, layer in network.items() if hasattr(base_of(layer), "weight")}
    modules = dict(sorted(modules.items(), key=lambda item: STAGES.get(item[0].split(".")[0], 0)))
    layers = [
        _measure(name, layer) for name, layer in tqdm(modules.items(), unit="layer", desc="measuring", disable=None)
    ]
    total = sum(layer["energy"] for layer in layers)
    for layer in layers:
        layer["share"] = layer["energy"] / total if total else 0.0
    blocks = {layer["block"]: [other for other in layers if other["block"] == layer["block"]] for layer in layers}
    return {
        "adapter": adapter,
        "bytes": artefact.size_bytes,
        "base": base,
        "distance_to_base": base_distance(artefact, pipe.unet),
        "about": {key: about[key] for key in ("base", "instance_prompt", "resolution", "training") if key in about},
        "tokens": {token: about.get("tokens", {}).get(token) for token in artefact.tokens},
        "part": part,
        "method": artefact.method,
        "config": _settings(artefact.config),
        "mode": mode_of(artefact.config, artefact.state) if artefact.is_atoms else artefact.method,
        "trained_numbers": trained_numbers(artefact.config, artefact.state),
        "token_numbers": sum(row.numel() for row in artefact.tokens.values()),
        "text_encoder": None
        if artefact.text_config is None
        else {
            "kind": mode_of(artefact.text_config, artefact.text_state),
            "layers": len(artefact.text_layers),
            "trained_numbers": trained_numbers(artefact.text_config, artefact.text_state),
        },
        "relative_change": _relative(layers),
        "bias_change": _bias_change(modules.values()),
        "blocks": [
            {
                "block": block,
                "layers": len(members),
                "relative_change": _relative(members),
                "share": sum(layer["share"] for layer in members),
            }
            for block, members in blocks.items()
        ],
        "layers": layers,
    }


@torch.no_grad()
def unet_change(unet: nn.Module, adapter: str = "default") -> float | None:
    """|ΔF|/|F| over all weights that an adapter is on, at full strength; None where it is on none."""
    layers = [layer for layer in tuner_layers(unet).values() if hasattr(base_of(layer), "weight")]
    if not layers:
        return None
    changed = sum(energy(weight_change(layer, adapter)) for layer in layers)
    return root_ratio(changed, sum(energy(base_weight(layer)) for layer in layers), 0.0)


def _measure(name: str, layer: BaseTunerLayer, adapter: str = "default") -> dict[str, Any]:
    weight = base_weight(layer).detach()
    change = weight_change(layer, adapter)
    terms = layer.change_terms(adapter) if isinstance(layer, AtomsLayer) else ()
    kernel = tuple(weight.shape[2:])
    spatial = math.prod(kernel) > 1
    one_matrix = len(terms) == 1 and terms[0].codes is None and not terms[0].block and not terms[0].per_channel
    entry = {
        "layer": name,
        "block": _block(name),
        "kind": _kind(weight),
        "shape": list(weight.shape),
        "kernel": list(kernel),
        "base_energy": energy(weight),
        "energy": energy(change),
        "relative_change": relative_change(weight, change),
        "gain_zero": frequency_gain(weight, change, 0.0) if spatial else None,
        "gain_pi": frequency_gain(weight, change, math.pi) if spatial else None,
        "condition": condition(terms[0].mixing) if one_matrix and spatial else None,
        "atom_changes": [],
        "block_atom_changes": [],
        "atoms": None,
        "atoms_change": None,
    }
    if not isinstance(layer, AtomsLayer):
        return _finite(entry)
    strength = layer.scaling[adapter]
    if adapter in layer.atoms_delta:
        delta = layer.atoms_delta[adapter] * strength
        entry["atom_changes"] = atom_changes(delta).tolist()
        if not layer.plan[adapter].m1:
            entry["atoms"], entry["atoms_change"] = layer.atoms_initial[adapter].tolist(), delta.tolist()
    if adapter in layer.atoms_block_delta:
        entry["block_atom_changes"] = atom_changes(layer.atoms_block_delta[adapter] * strength).tolist()
    return _finite(entry)


def _bias_change(layers: Iterable[BaseTunerLayer], adapter: str = "default") -> float | None:
    """|Δb|/|b| over the biases that an adapter trains; None if it trains none."""
    changes, originals = [], []
    for layer in layers:
        trains_bias = isinstance(layer, TunedLayer) and not isinstance(layer, AtomsLayer)
        value = layer.merged_values([adapter]).get("bias") if trains_bias else None
        if value is not None:
            originals.append(layer.original("bias").to(value.dtype))
            changes.append(value - originals[-1])
    return relative_change(torch.cat(originals), torch.cat(changes)) if changes else None


def _finite(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in entry.items()}


def _relative(layers: Sequence[Mapping[str, Any]]) -> float:
    return root_ratio(sum(layer["energy"] for layer in layers), sum(layer["base_energy"] for layer in layers), 0.0)


def _kind(weight: torch.Tensor) -> str:
    if weight.dim() == 1:
        return "norm"
    return "×".join(map(str, weight.shape[2:])) or "Linear"


def _block(name: str) -> str:
    """The part of the UNet that a layer is in: conv_in, down_blocks.0, mid_block, …"""
    first, *rest = name.split(".")
    return f"{first}.{rest[0]}" if first.endswith("_blocks") and rest else first


def _settings(config: PeftConfig | None) -> dict[str, Any] | None:
    if isinstance(config, AtomsConfig):
        return {key: getattr(config, key) for key in CONFIG_KEYS}
    return None if config is None else plain_settings(config)


def trained_numbers(config: PeftConfig | None, state: Mapping[str, torch.Tensor]) -> int:
    """How many trained numbers there are among the tensors of an adapter; atoms come with those they started from."""
    trained = AtomsLayer.adapter_layer_names if isinstance(config, AtomsConfig) else ""
    return sum(value.numel() for key, value in state.items() if key.endswith(trained))


def mode_of(config: PeftConfig, state: Mapping[str, torch.Tensor]) -> str:
    """What an adapter of any tuner is, in a few words."""
    if isinstance(config, ImportedConfig):
        kinds = sorted({kind_of(parts) or "bias" for parts in config.parts.values()})
        return f"imported {' and '.join(kinds)}"
    if not isinstance(config, (AtomsConfig, LoraConfig)):
        return str(getattr(config.peft_type, "value", config.peft_type)).lower()
    if isinstance(config, LoraConfig):
        ranks = sorted({value.shape[0] for key, value in state.items() if "lora_A" in key})
        return f"LoRA r={', '.join(map(str, ranks))}"
    parts = {key.rpartition(".")[2] for key in state}
    words = []
    if "atoms_delta" in parts:
        words.append(f"m={config.m}" + (f", m1={config.m1} (overcomplete)" if config.m1 else ""))
    if config.m1 and "atoms_delta" in parts:
        words.append(f"β {'trained' if config.train_beta else f'drawn from seed {config.seed}'}")
    if "atoms_block_delta" in parts:
        words.append(f"block atoms kc={config.kc}" + (f", m_c={config.m_c}" if config.m_c else ""))
    words.append(f"{config.solver} solver" + (f" (λ={config.l1:g})" if config.solver == "sparse" else ""))
    return ", ".join(words)

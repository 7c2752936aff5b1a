"""Adapters in and out of a pipeline."""

import warnings
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict

from sd_atoms.errors import AtomsWarning, UserError
from sd_atoms.pipeline.artefact import Artefact, read_artefact, write_artefact
from sd_atoms.pipeline.base import DTYPES
from sd_atoms.pipeline.fingerprint import SAME_BASE, distance, fingerprint, from_text, to_text
from sd_atoms.pipeline.tokens import add_placeholder_tokens, placeholder_rows
from sd_atoms.tuner import AtomsLayer, layer_plan, swap_adapter

LIBRARIES = ("sd-atoms", "torch", "diffusers", "transformers", "peft")


def save_atoms(
    pipe,
    path: str | Path,
    adapter_name: str = "default",
    *,
    tokens: list[str] | tuple[str, ...] = (),
    dtype: str = "fp32",
    about: Mapping[str, Any] | None = None,
) -> Path:
    """Saves one adapter of `pipe.unet`, with its placeholder tokens, as a folder or as one file.

    Args:
        pipe: a pipeline whose `unet` carries the adapter; with `tokens` also `tokenizer` and `text_encoder`.
        path: a folder, or a file ending in .safetensors.
        adapter_name: which adapter.
        tokens: placeholder tokens to store with their embedding rows.
        dtype: "fp32" (bit for bit what was trained), "fp16" or "bf16" (half the size).
        about: what else the header should say, JSON-able: base, initializer, prompt, training, …

    Returns:
        The path written. Every file appears whole or not at all.

    Raises:
        UserError: no such adapter, an unknown dtype, or the place cannot be written to.
    """
    if adapter_name not in getattr(pipe.unet, "peft_config", {}):
        raise UserError(f"adapter_name: {adapter_name!r} is not loaded; there are {_loaded(pipe)}")
    if dtype not in DTYPES:
        raise UserError(f"dtype: {dtype!r} is not one of {', '.join(DTYPES)}")
    state = get_peft_model_state_dict(pipe.unet, adapter_name=adapter_name)
    artefact = Artefact(pipe.unet.peft_config[adapter_name], state)
    about = {
        **(about or {}),
        "fingerprint": to_text(_fingerprint(_base_weights(pipe.unet, artefact.layers))),
        "versions": {name: version(name) for name in LIBRARIES},
    }
    artefact = Artefact(artefact.config, state, placeholder_rows(pipe, list(tokens)), about)
    return write_artefact(artefact, path, DTYPES[dtype])


def load_atoms(
    pipe,
    source: str | Path | Artefact,
    adapter_name: str = "default",
    *,
    revision: str | None = None,
    hotswap: bool = False,
) -> Artefact:
    """Loads an adapter and its placeholder tokens into a pipeline, and makes it the active one.

    Orthonormal atoms are not decomposed again; the coefficients of sparse ones are encoded at first use. Afterwards
    `pipe.set_adapters`, `disable_lora`, `delete_adapters`, `fuse_lora` work on it as on any LoRA.

    Args:
        pipe: any diffusers pipeline with a `unet` (and `tokenizer` and `text_encoder` if the adapter has tokens).
        source: a folder, one .safetensors file, a hub id, or an `Artefact` already read.
        adapter_name: the name it gets in the pipeline.
        revision: git revision of a hub id.
        hotswap: write the numbers into the adapter of that name that is loaded, in place: nothing is added, moved or
            compiled anew, and which adapters are active, and how strongly, stays. The new adapter may have fewer
            layers and fewer atoms than the old. A placeholder token of both gets the new row.

    Returns:
        What was read: its `about` says what the adapter was trained on and how.

    Raises:
        UserError: the adapter cannot be read, the name is taken (with `hotswap`: is not, or the two adapters are of
            different kinds), or layers or shapes do not fit this base.

    Warns:
        AtomsWarning: the base is another fine-tune of the same architecture; the message gives the distance.
    """
    artefact = source if isinstance(source, Artefact) else read_artefact(source, revision)
    label = "adapter" if isinstance(source, Artefact) else str(source)
    if "." in adapter_name or not adapter_name:
        raise UserError(f"adapter_name: {adapter_name!r} must be a word without dots")
    loaded = adapter_name in getattr(pipe.unet, "peft_config", {})
    if loaded and not hotswap:
        raise UserError(
            f"adapter_name: {adapter_name!r} is loaded already; choose another name, delete it first or hot-swap it"
        )
    if hotswap and not loaded:
        raise UserError(f"adapter_name: {adapter_name!r} is not loaded, so nothing can be swapped in its place")
    _check_layers(label, artefact, pipe.unet)
    _check_base(label, artefact, _base_weights(pipe.unet, artefact.layers))
    if hotswap:
        try:
            swap_adapter(pipe.unet, adapter_name, artefact.config, artefact.state)
        except ValueError as error:
            raise UserError(f"{label}: {error}") from error
        add_placeholder_tokens(pipe, artefact.tokens, replace=True)
        return artefact
    add_placeholder_tokens(pipe, artefact.tokens)
    with warnings.catch_warnings():  # PEFT wonders at a second adapter that diffusers adds
        warnings.filterwarnings("ignore", "Already found a `peft_config` attribute")
        pipe.unet.add_adapter(artefact.config, adapter_name)
    result = set_peft_model_state_dict(pipe.unet, artefact.state, adapter_name)
    if result.unexpected_keys:
        raise UserError(
            f"{label}: {len(result.unexpected_keys)} entries have no place, {result.unexpected_keys[0]} first"
        )
    return artefact


def _base_weights(unet, layers: list[str]) -> dict[str, torch.Tensor]:
    """layer -> its base weight, without adapters."""
    modules = dict(unet.named_modules())
    return {
        layer: modules[layer].base_weight if isinstance(modules[layer], AtomsLayer) else modules[layer].weight
        for layer in layers
    }


def _check_layers(label: str, artefact: Artefact, unet) -> None:
    modules, misfits = dict(unet.named_modules()), []
    shapes = {layer: {} for layer in artefact.layers}
    for key, value in artefact.state.items():
        layer, _, part = key.rpartition(".")
        shapes[layer][part] = tuple(value.shape)
    for name, found in shapes.items():
        try:
            layer = modules[name]
            layer = layer.get_base_layer() if isinstance(layer, AtomsLayer) else layer
            expected = layer_plan(artefact.config, name, layer).shapes(layer, artefact.config.train_beta)
        except (KeyError, ValueError):  # no such layer, or one that atoms do not take
            expected = None
        if found != expected:
            misfits.append(name)
    if misfits:
        raise UserError(
            f"{label}: made for another architecture, {len(misfits)} of its {len(shapes)} layers do not fit this "
            f"base ({', '.join(misfits[:3])}{', …' if len(misfits) > 3 else ''})"
        )


def _check_base(label: str, artefact: Artefact, weights: Mapping[str, torch.Tensor]) -> None:
    if "fingerprint" not in artefact.about:
        return  # a folder of plain PEFT does not say what it was trained on
    try:
        theirs = from_text(artefact.about["fingerprint"])
        apart = distance(_fingerprint(weights), theirs)
    except (ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{label}: corrupt, its fingerprint of the base cannot be read ({error})") from error
    if apart > SAME_BASE:
        base = artefact.about.get("base", "its base")
        warnings.warn(
            f"{label}: trained on {base}, whose weights differ from this pipeline's by about {apart:.1%}; "
            "expect a weaker likeness",
            AtomsWarning,
            stacklevel=3,
        )


def _fingerprint(weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """In the order of the names, so that folder and file agree."""
    return fingerprint([weights[layer] for layer in sorted(weights)])


def _loaded(pipe) -> str:
    return ", ".join(getattr(pipe.unet, "peft_config", {})) or "none"

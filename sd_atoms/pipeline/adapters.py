"""Adapters in and out of a pipeline."""

import copy
import warnings
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.functional import cast_adapter_dtype
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from sd_atoms.errors import AtomsWarning, UserError
from sd_atoms.pipeline.artefact import Artefact, by_layer, read_artefact, unexpected_keys, write_artefact
from sd_atoms.pipeline.base import DTYPES
from sd_atoms.pipeline.fingerprint import SAME_BASE, distance, fingerprint, from_text, to_text
from sd_atoms.pipeline.lora import check_lora_swap, lora_config, lora_shapes, swap_lora
from sd_atoms.pipeline.tokens import add_placeholder_tokens, check_placeholder_rows, placeholder_rows
from sd_atoms.tuner import AtomsConfig, AtomsLayer, check_swap, layer_plan, swap_adapter

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

    The text encoder's adapter of that name, if it has one, comes with it.

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
        UserError: no such adapter, an unknown dtype, a text encoder's adapter that is neither atoms nor plain LoRA, or
            the place cannot be written to.
    """
    if adapter_name not in _adapters(pipe, "unet"):
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
    text_config, text_state = _text_part(pipe, adapter_name)
    artefact = Artefact(artefact.config, state, placeholder_rows(pipe, list(tokens)), about, text_config, text_state)
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

    What it has for the text encoder goes there under the same name. All is checked before anything is changed.
    Orthonormal atoms are not decomposed again; the coefficients of sparse ones are encoded at first use. Afterwards
    `pipe.set_adapters`, `disable_lora`, `delete_adapters`, `fuse_lora` work on it as on any LoRA.

    Args:
        pipe: any diffusers pipeline with a `unet` (and `tokenizer` and `text_encoder` if the adapter has tokens or a
            part for the text encoder).
        source: a folder, one .safetensors file, a hub id, or an `Artefact` already read.
        adapter_name: the name it gets in the pipeline.
        revision: git revision of a hub id.
        hotswap: write the numbers into the adapter of that name that is loaded, in place: nothing is added, moved or
            compiled anew, and which adapters are active, and how strongly, stays. The new adapter may have fewer
            layers, fewer atoms and a lower rank than the old. A placeholder token of both gets the new row.

    Returns:
        What was read: its `about` says what the adapter was trained on and how.

    Raises:
        UserError: the adapter cannot be read, the name is taken (with `hotswap`: is not, or the two adapters are of
            different kinds), layers or shapes do not fit this base, or a token is there with another row.

    Warns:
        AtomsWarning: the base is another fine-tune of the same architecture; the message gives the distance.
    """
    artefact = source if isinstance(source, Artefact) else read_artefact(source, revision)
    label, config, text_config = artefact.source, artefact.config, artefact.text_config
    _check_name(pipe, artefact, adapter_name, hotswap)
    _check_layers(label, "this base", pipe.unet, config, artefact.state)
    if text_config is not None:
        _check_layers(label, "this base's text encoder", pipe.text_encoder, text_config, artefact.text_state)
    if hotswap:
        try:
            _check_swap(pipe.unet, adapter_name, config, artefact.state)
            if text_config is not None:
                _check_swap(pipe.text_encoder, adapter_name, text_config, artefact.text_state)
        except ValueError as error:
            raise UserError(f"{label}: {error}") from error
    check_placeholder_rows(pipe, artefact.tokens, replace=hotswap)
    _check_base(label, artefact, _base_weights(pipe.unet, artefact.layers))

    add_placeholder_tokens(pipe, artefact.tokens, replace=hotswap)
    if hotswap:
        swap_adapter(pipe.unet, adapter_name, config, artefact.state)
        if isinstance(text_config, LoraConfig):
            swap_lora(pipe.text_encoder, adapter_name, text_config, artefact.text_state)
        elif text_config is not None:
            swap_adapter(pipe.text_encoder, adapter_name, text_config, artefact.text_state)
        return artefact
    with warnings.catch_warnings():  # PEFT wonders at a second adapter that diffusers adds
        warnings.filterwarnings("ignore", "Already found a `peft_config` attribute")
        pipe.unet.add_adapter(config, adapter_name)
    set_peft_model_state_dict(pipe.unet, artefact.state, adapter_name)
    if text_config is not None:
        add_text_adapter(pipe.text_encoder, copy.deepcopy(text_config), adapter_name)
        set_peft_model_state_dict(pipe.text_encoder, artefact.text_state, adapter_name)
    elif getattr(pipe, "text_encoder", None) is not None:
        _activate(pipe.text_encoder, adapter_name)  # what another adapter has there is not of this one
    return artefact


def add_text_adapter(text_encoder: nn.Module, config: PeftConfig, adapter_name: str = "default") -> None:
    """Adds an adapter to a text encoder and makes it the active one; its numbers are float32, whatever the base is.

    The text encoder's own `add_adapter` would do, but asks for a PEFT newer than any released (transformers 5.24).

    Raises:
        ValueError: the targets or settings do not fit.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config` attribute")
        inject_adapter_in_model(config, text_encoder, adapter_name)
    text_encoder._hf_peft_config_loaded = True  # by this, diffusers and transformers know that it has adapters
    cast_adapter_dtype(text_encoder, adapter_name)
    _activate(text_encoder, adapter_name, config.inference_mode)


def _activate(model: nn.Module, adapter_name: str, inference_mode: bool = True) -> None:
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.set_adapter(adapter_name, inference_mode=inference_mode)


def _text_part(pipe, adapter_name: str) -> tuple[PeftConfig | None, dict[str, torch.Tensor]]:
    """Config and state of the text encoder's adapter of that name, if it has one."""
    config = _adapters(pipe, "text_encoder").get(adapter_name)
    if config is None:
        return None, {}
    where = f"adapter_name: {adapter_name!r} of the text encoder"
    if not isinstance(config, (AtomsConfig, LoraConfig)):
        raise UserError(f"{where} is of kind {config.peft_type.value}; atoms and LoRA can be saved")
    try:
        if isinstance(config, LoraConfig):
            lora_config(config.to_dict())
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error
    state = get_peft_model_state_dict(pipe.text_encoder, adapter_name=adapter_name, save_embedding_layers=False)
    unknown = unexpected_keys(config, state)
    if unknown:
        raise UserError(f"{where}: {unknown[0]} is neither of atoms nor of plain LoRA and would be lost")
    return config, state


def _base_weights(unet, layers: list[str]) -> dict[str, torch.Tensor]:
    """layer -> its base weight, without adapters."""
    modules = dict(unet.named_modules())
    return {
        layer: modules[layer].base_weight if isinstance(modules[layer], AtomsLayer) else modules[layer].weight
        for layer in layers
    }


def _adapters(pipe, part: str) -> dict[str, PeftConfig]:
    """name -> config of the adapters in a part of the pipeline."""
    return getattr(getattr(pipe, part, None), "peft_config", {})


def _check_name(pipe, artefact: Artefact, adapter_name: str, hotswap: bool) -> None:
    if "." in adapter_name or not adapter_name:
        raise UserError(f"adapter_name: {adapter_name!r} must be a word without dots")
    text = _adapters(pipe, "text_encoder").get(adapter_name)
    if not hotswap:
        if adapter_name in _adapters(pipe, "unet") or text is not None:
            raise UserError(
                f"adapter_name: {adapter_name!r} is loaded already; choose another name, delete it first or hot-swap "
                "it"
            )
    elif adapter_name not in _adapters(pipe, "unet"):
        raise UserError(f"adapter_name: {adapter_name!r} is not loaded, so nothing can be swapped in its place")
    elif _kind(text) != _kind(artefact.text_config):
        raise UserError(
            f"{artefact.source}: it has {_kind(artefact.text_config)} for the text encoder and cannot be swapped into "
            f"{adapter_name!r}, which has {_kind(text)} there"
        )
    if artefact.text_config is not None and getattr(pipe, "text_encoder", None) is None:
        raise UserError(f"{artefact.source}: it has a part for the text encoder, which this pipeline lacks")


def _kind(config: PeftConfig | None) -> str:
    return "nothing" if config is None else "atoms" if isinstance(config, AtomsConfig) else config.peft_type.value


def _check_layers(label: str, place: str, model: nn.Module, config: PeftConfig, state) -> None:
    modules, misfits, taken = dict(model.named_modules()), [], []
    shapes = by_layer(state)
    for name, found in shapes.items():
        layer = modules.get(name)
        if _carries_others(layer, config):
            taken.append(name)
        try:
            layer = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
            if isinstance(config, LoraConfig):
                expected = lora_shapes(config, name, layer)
            else:
                expected = layer_plan(config, name, layer).shapes(layer, config.train_beta)
        except ValueError:  # no such layer, or one that the adapter does not take
            expected = None
        if found != expected:
            misfits.append(name)
    for names, what in (
        (misfits, f"made for another architecture, {len(misfits)} of its {len(shapes)} layers do not fit {place}"),
        (taken, f"{len(taken)} of its layers carry adapters of another kind in {place}; delete those first"),
    ):
        if names:
            raise UserError(f"{label}: {what} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})")


def _carries_others(layer: nn.Module | None, config: PeftConfig) -> bool:
    """Whether a layer has adapters of another kind: of two kinds in one layer, the outer does not see the inner."""
    own = LoraLayer if isinstance(config, LoraConfig) else AtomsLayer
    while isinstance(layer, BaseTunerLayer):
        if not isinstance(layer, own) and layer._get_available_adapters():
            return True
        layer = layer.base_layer
    return False


def _check_swap(model: nn.Module, adapter_name: str, config: PeftConfig, state) -> None:
    if isinstance(config, LoraConfig):
        check_lora_swap(model, adapter_name, state)
    else:
        check_swap(model, adapter_name, config, state)


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
    return ", ".join(_adapters(pipe, "unet")) or "none"

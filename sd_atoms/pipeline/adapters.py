"""Adapters in and out of a pipeline."""

import copy
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

from sd_atoms.errors import AtomsWarning, UserError
from sd_atoms.methods import all_methods
from sd_atoms.methods.adapters import add_adapter, set_adapters
from sd_atoms.pipeline.artefact import TEXT, Artefact
from sd_atoms.pipeline.artefact_files import read_artefact, write_artefact
from sd_atoms.pipeline.base import DTYPES
from sd_atoms.pipeline.fingerprint import SAME_BASE, distance, fingerprint, from_text, to_text
from sd_atoms.pipeline.fitting import fitting, touched_layers
from sd_atoms.pipeline.lora import check_lora_swap, swap_lora
from sd_atoms.pipeline.scales import take_block_scales
from sd_atoms.pipeline.tokens import add_placeholder_tokens, check_placeholder_rows, placeholder_rows
from sd_atoms.tuner import check_swap, swap_adapter
from sd_atoms.tuner.shared import base_of
from sd_atoms.tuner.tuned import TunedLayer

# peft_type -> how other numbers are checked and written over those of a loaded adapter, in place
SWAPS = {"FILTER_ATOMS": (check_swap, swap_adapter), "LORA": (check_lora_swap, swap_lora)}
TOKEN_OWNERS = "_sd_atoms_token_owners"  # in the text encoder: placeholder -> adapters that it came with
LIBRARIES = ("sd-atoms", "torch", "diffusers", "transformers", "peft")
take_block_scales()


def save_adapter(
    pipe,
    path: str | Path,
    adapter_name: str = "default",
    *,
    tokens: Sequence[str] | Mapping[str, torch.Tensor] = (),
    dtype: str = "fp32",
    about: Mapping[str, Any] | None = None,
) -> Path:
    """Saves one adapter of `pipe.unet`, of any method, with its placeholder tokens, as a folder or as one file.

    The text encoder's adapter of that name, if it has one, comes with it.

    Args:
        pipe: a pipeline whose `unet` carries the adapter, or none with tokens alone; with `tokens` also `tokenizer`
            and `text_encoder`.
        path: a folder, or a file ending in .safetensors.
        adapter_name: which adapter.
        tokens: placeholder tokens to store with their embedding rows, those of `pipe` or, token -> row (d,), of more
            bits than a table in half precision has.
        dtype: "fp32" (bit for bit what was trained), "fp16" or "bf16" (half the size).
        about: what else the header should say, JSON-able: base, initializer, prompt, training, …

    Returns:
        The path written. Every file appears whole or not at all.

    Raises:
        UserError: no such adapter, one that is not finite, an unknown dtype, the pipeline is offloaded to the meta
            device, or the place cannot be written to.
    """
    config, state = _part(pipe, "unet", adapter_name)
    if config is None and adapter_name not in _adapters(pipe, "text_encoder") and not tokens:
        there = ", ".join({**_adapters(pipe, "unet"), **_adapters(pipe, "text_encoder")}) or "none"
        raise UserError(f"adapter_name: {adapter_name!r} is not loaded; there are {there}")
    if dtype not in DTYPES:
        raise UserError(f"dtype: {dtype!r} is not one of {', '.join(DTYPES)}")
    about = dict(about or {})
    if config is not None:
        unet = network(pipe, "unet")
        about["fingerprint"] = to_text(_fingerprint(unet, state))
    about["versions"] = {name: version(name) for name in LIBRARIES}
    text_config, text_state = _part(pipe, "text_encoder", adapter_name)
    rows = dict(tokens) if isinstance(tokens, Mapping) else placeholder_rows(pipe, list(tokens))
    artefact = Artefact(config, state, rows, about, text_config, text_state)
    _check_finite(artefact, f"adapter_name: {adapter_name!r}")
    return write_artefact(artefact, path, DTYPES[dtype])


save_atoms = save_adapter


def load_atoms(
    pipe,
    source: str | Path | Artefact,
    adapter_name: str = "default",
    *,
    revision: str | None = None,
    hotswap: bool = False,
) -> Artefact:
    """Loads filter atoms and their placeholder tokens into a pipeline, as `load_adapter` does.

    Orthonormal atoms are not decomposed again; the coefficients of sparse ones are encoded at first use.

    Raises:
        UserError: as `load_adapter`, or the adapter is of another method.
    """
    artefact = source if isinstance(source, Artefact) else read_artefact(source, revision)
    if not artefact.is_atoms:
        raise UserError(f"{artefact.source}: its method is {artefact.method}, not atoms; load_adapter takes it")
    return load_adapter(pipe, artefact, adapter_name, hotswap=hotswap)


def load_adapter(
    pipe,
    source: str | Path | Artefact,
    adapter_name: str = "default",
    *,
    revision: str | None = None,
    hotswap: bool = False,
) -> Artefact:
    """Loads an adapter of any method, and its placeholder tokens, into a pipeline, and makes it the active one.

    What it has for the text encoder goes there under the same name. All is checked before anything is changed.
    Afterwards `pipe.set_adapters`, `disable_lora`, `delete_adapters`, `fuse_lora` work on it as on any LoRA.

    Args:
        pipe: any diffusers pipeline with a `unet` (and `tokenizer` and `text_encoder` if the adapter has tokens or a
            part for the text encoder).
        source: a folder as we or PEFT write it, one .safetensors file, a hub id, or an `Artefact` already read.
        adapter_name: the name it gets in the pipeline.
        revision: git revision of a hub id.
        hotswap: write the numbers into the adapter of that name that is loaded, in place: nothing is added, moved or
            compiled anew, and which adapters are active, and how strongly, stays. Of atoms and LoRA; the new adapter
            may have fewer layers, fewer atoms and a lower rank than the old. A placeholder token of both gets the new
            row.

    Returns:
        What was read: its `about` says what the adapter was trained on and how.

    Raises:
        UserError: the adapter cannot be read, the name is taken (with `hotswap`: is not, or the two adapters are of
            different kinds), layers or shapes do not fit this base, the method means nothing on another base than its
            own and this is one, a token is there with another row (other than one that came with adapters deleted
            since), a number is not finite, or the pipeline is offloaded to the meta device.

    Warns:
        AtomsWarning: the base is another fine-tune of the same architecture; the message gives the distance. Or
            `fitting` leaves something out.
    """
    artefact = source if isinstance(source, Artefact) else read_artefact(source, revision)
    _check_name(pipe, artefact, adapter_name, hotswap)
    _check_finite(artefact, artefact.source)
    unet, text_encoder = network(pipe, "unet"), network(pipe, "text_encoder")
    artefact = fitting(artefact, unet, text_encoder)
    label, config, text_config = artefact.source, artefact.config, artefact.text_config
    if hotswap:
        try:
            _check_swap(unet, adapter_name, config, artefact.state)
            if text_config is not None:
                _check_swap(text_encoder, adapter_name, text_config, artefact.text_state)
        except ValueError as error:
            raise UserError(f"{label}: {error}") from error
    replace = artefact.tokens if hotswap else _left_over(pipe, adapter_name)
    check_placeholder_rows(pipe, artefact.tokens, replace)
    if config is not None:
        _check_base(artefact, unet)

    _own_tokens(pipe, artefact.tokens, adapter_name, replace)
    parts = [(unet, config, artefact.state), (text_encoder, text_config, artefact.text_state)]
    for model, own, state in parts:
        if own is None:
            if model is not None and not hotswap:
                set_adapters(model, [adapter_name])  # what another adapter has there is not of this one
        elif hotswap:
            _, swap = SWAPS[_kind(own)]
            swap(model, adapter_name, own, state)
        else:
            add_adapter(model, copy.deepcopy(own), adapter_name)
            set_peft_model_state_dict(model, state, adapter_name)
    return artefact


def _part(pipe, part: str, adapter_name: str) -> tuple[PeftConfig | None, dict[str, torch.Tensor]]:
    """Config and state of the adapter of that name in a part of the pipeline, if it has one."""
    config = _adapters(pipe, part).get(adapter_name)
    if config is None:
        return None, {}
    model = network(pipe, part)
    return config, get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)


def network(pipe, part: str) -> nn.Module | None:
    """A part of the pipeline, None where it lacks it; of a compiled one the module within.

    Raises:
        UserError: its weights are on the meta device.
    """
    model = getattr(pipe, part, None)
    model = getattr(model, "_orig_mod", model)  # torch.compile(model) wraps it, and puts this before every name
    if model is not None and any(parameter.is_meta for parameter in model.parameters()):
        raise UserError(
            f"{part}: it is offloaded, its weights are not in place; call pipe.remove_all_hooks() or accelerate's "
            f"remove_hook_from_submodules(pipe.{part}), load, swap or save the adapter, then offload again"
        )
    return model


def _left_over(pipe, adapter_name: str) -> list[str]:
    """Placeholders that came with adapters which have been deleted since, `adapter_name` being about to be anew."""
    loaded = {*_adapters(pipe, "unet"), *_adapters(pipe, "text_encoder")} - {adapter_name}
    owners = getattr(network(pipe, "text_encoder"), TOKEN_OWNERS, {})
    return [token for token, names in owners.items() if not names & loaded]


def _own_tokens(pipe, rows: Mapping[str, torch.Tensor], adapter_name: str, replace: Collection[str]) -> None:
    """Adds the placeholders, and notes that they came with this adapter."""
    if not rows:
        return
    before = pipe.tokenizer.get_vocab()
    add_placeholder_tokens(pipe, rows, replace)
    model = network(pipe, "text_encoder")
    owners = getattr(model, TOKEN_OWNERS, {})
    setattr(model, TOKEN_OWNERS, owners)
    loaded = {*_adapters(pipe, "unet"), *_adapters(pipe, "text_encoder")}
    for token in rows:
        if token in owners or token not in before:  # a word that the pipeline had by itself stays its own
            owners[token] = owners.get(token, set()) & loaded | {adapter_name}


def _check_finite(artefact: Artefact, label: str) -> None:
    text = {f"{TEXT}.{key}": value for key, value in artefact.text_state.items()}
    rows = {f"token {token}": row for token, row in artefact.tokens.items()}
    tensors = {**artefact.state, **text, **rows}
    broken = [key for key, value in tensors.items() if not torch.isfinite(value).all()]
    if broken:
        raise UserError(
            f"{label}: {len(broken)} of its {len(tensors)} tensors hold numbers that are not finite "
            f"({', '.join(broken[:3])}{', …' if len(broken) > 3 else ''})"
        )


def base_weight(layer: nn.Module) -> torch.Tensor:
    """The weight of a layer without its adapters, also while ours are merged."""
    if isinstance(layer, TunedLayer):
        return layer.original("weight")
    return base_of(layer).weight


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
    """Its peft_type; PEFT's own are members of an enumeration, ours of another or plain words."""
    return "nothing" if config is None else str(getattr(config.peft_type, "value", config.peft_type))


def _check_swap(model: nn.Module, adapter_name: str, config: PeftConfig, state) -> None:
    kind, loaded = _kind(config), _kind(model.peft_config[adapter_name])
    if kind != loaded:
        raise ValueError(f"{kind} cannot be swapped into {adapter_name!r}, {loaded}")
    if kind not in SWAPS:
        raise ValueError(f"hotswap: {kind} is not swapped, only {' and '.join(SWAPS)} are; load it anew")
    check, _ = SWAPS[kind]
    check(model, adapter_name, config, state)


def base_distance(artefact: Artefact, unet: nn.Module) -> float | None:
    """How far the weights that an adapter was trained on are from a network's, as a share of their norm; None where
    its file does not say, as a folder of plain PEFT.

    Raises:
        UserError: what the file says cannot be read.
    """
    if "fingerprint" not in artefact.about or artefact.config is None:
        return None
    try:
        theirs = from_text(artefact.about["fingerprint"])
        return distance(_fingerprint(unet, artefact.state), theirs)
    except (ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{artefact.source}: corrupt, its fingerprint of the base cannot be read ({error})") from error


def _check_base(artefact: Artefact, unet: nn.Module) -> None:
    label, apart = artefact.source, base_distance(artefact, unet)
    if apart is None or apart <= SAME_BASE:
        return
    base = artefact.about.get("base", "its base")
    text = f"{label}: trained on {base}, whose weights differ from this pipeline's by about {apart:.1%}; "
    method = all_methods().get(artefact.method)
    if method is not None and not method.portable:
        raise UserError(f"{text}what method {artefact.method} trains means nothing there")
    warnings.warn(f"{text}expect a weaker likeness", AtomsWarning, stacklevel=4)


def _fingerprint(unet: nn.Module, state: Iterable[str]) -> torch.Tensor:
    """Of the layers of a state, in the order of their names, so that folder and file agree."""
    return fingerprint(base_weight(unet.get_submodule(layer)) for layer in sorted(touched_layers(unet, state)))

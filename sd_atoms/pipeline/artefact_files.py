"""Adapter files: a folder as PEFT writes it, and the same as one safetensors file.

One file:  of filter atoms atoms_delta.9x9, atoms_initial.9x9 (layers, m, K), the layers of one shape stacked, and
           likewise the parts that other modes have; of every other method unet.<PEFT's key>; token.<castle> (d,) per
           placeholder (of LoRA in the header, so that programs which know LoRA take the file); text_encoder.<PEFT's
           key> if the text encoder has an adapter too.
Folder:    adapter_config.json, adapter_model.safetensors with PEFT's keys, learned_embeds.safetensors with the
           placeholder rows under their own names, as textual inversion files have them; text_encoder/ with the first
           two for the text encoder. Without an adapter in the UNet there are only the others.
The header entry "sd_atoms" of both is a JSON object: format, method, config, layers (of atoms: by shape, in the order
of the stacks), fingerprint of the base, text_encoder (settings of its adapter) if there is one, and the entries of
`header` about the making. Filter atoms are written in format 1, what older versions cannot read in 2.
"""

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft import LoraConfig, PeftConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sd_atoms.errors import UserError
from sd_atoms.files import parse_json, replacing, write_json
from sd_atoms.pipeline.artefact import TEXT, Artefact, by_layer
from sd_atoms.pipeline.config import CONFIG_KEYS, UNET, kept_settings, peft_config, plain_settings
from sd_atoms.pipeline.fingerprint import from_text, to_text
from sd_atoms.pipeline.foreign import BARE, is_bare, read_foreign
from sd_atoms.pipeline.lora import LORA_KEYS
from sd_atoms.sources import resolve_source
from sd_atoms.tuner import AtomsConfig

ATOMS_FORMAT, FORMAT = 1, 2
HEADER = "sd_atoms"
CLASSIFIER, CLASSIFIER_FILE = "sd_atoms_classifier", "classifier.safetensors"  # its header, and its name in a run
IMPORTED = "imported"  # the method of what another program made
ROWS = "token_rows"
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
TOKENS_FILE = "learned_embeds.safetensors"
PICKLE_FILE = "adapter_model.bin"
LORA_FILE = "pytorch_lora_weights.safetensors"  # of a folder as diffusers writes it
PEFT_PREFIX = "base_model.model."
# what a layer may have, and the letter that its shape gets in the name of a stack
PARTS = {
    "atoms_delta": "",
    "atoms_initial": None,  # its shape follows from the others'
    "atoms_beta": "beta",
    "atoms_block_delta": "block",
    "atoms_block_initial": None,
}
# parts that come together
TOGETHER = (("atoms_delta", "atoms_initial"), ("atoms_block_delta", "atoms_block_initial"))


def _wrong_parts(state: Mapping[str, torch.Tensor]) -> list[str]:
    """Names in a state of atoms that atoms do not have, and those it lacks beside what they come together with."""
    layers = by_layer(state)
    unknown = [f"{layer}.{part}" for layer, parts in layers.items() for part in parts if part not in PARTS]
    return unknown + [
        f"{layer}.{part}"
        for layer, parts in layers.items()
        for together in TOGETHER
        for part in together
        if part not in parts and set(together) & set(parts)
    ]


def write_artefact(artefact: Artefact, path: str | Path, dtype: torch.dtype = torch.float32) -> Path:
    """Writes one file if `path` ends in .safetensors, else a folder; all or nothing per file.

    Raises:
        UserError: the place cannot be written to, or the disk is full.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        # a file of LoRA holds nothing else, so that every program takes it; the rows are in its header
        rows = {} if isinstance(artefact.config, LoraConfig) else artefact.tokens
        tensors = {f"token.{token}": row for token, row in rows.items()}
        tensors |= {f"{TEXT}.{key}": value for key, value in artefact.text_state.items()}
        if not artefact.is_atoms:
            tensors |= {f"{UNET}.{key}": value for key, value in artefact.state.items()}
        for shape, layers in _layers_by_shape(artefact).items() if artefact.is_atoms else ():
            for part in PARTS:
                if f"{layers[0]}.{part}" in artefact.state:
                    tensors[f"{part}.{shape}"] = torch.stack([artefact.state[f"{layer}.{part}"] for layer in layers])
        _write_tensors(path, tensors, dtype, _header(artefact))
        return path
    if artefact.config is not None:
        _write_adapter(path, artefact.config, artefact.state, dtype, _header(artefact))
    if artefact.tokens:
        header = _header(artefact) if artefact.config is None else {}
        _write_tensors(path / TOKENS_FILE, artefact.tokens, dtype, header)
    if artefact.text_config is not None:
        header = {} if artefact.config is not None or artefact.tokens else _header(artefact)
        _write_adapter(path / TEXT, artefact.text_config, artefact.text_state, dtype, header)
    # what an adapter that stood here had beyond this one would be read as a part of it
    left = [] if artefact.tokens else [path / TOKENS_FILE]
    for folder, config in ((path, artefact.config), (path / TEXT, artefact.text_config)):
        left += [folder / CONFIG_FILE, folder / WEIGHTS_FILE] if config is None else []
    for file in left:
        file.unlink(missing_ok=True)
    return path


def _write_adapter(folder: Path, config, state: Mapping[str, torch.Tensor], dtype: torch.dtype, header) -> None:
    """The two files that PEFT writes."""
    _write_tensors(folder / WEIGHTS_FILE, {PEFT_PREFIX + key: value for key, value in state.items()}, dtype, header)
    write_json(folder / CONFIG_FILE, plain_settings(config) | {"inference_mode": True})


def read_artefact(source: str | Path, revision: str | None = None) -> Artefact:
    """Reads an adapter from a folder, one .safetensors file, or a hub id (`revision` counts for the latter).

    Raises:
        UserError: there is none, it is a pickle, it is corrupt, or it is not a filter-atom adapter.
    """
    path = Path(resolve_source(str(source), "adapter")).expanduser()
    if (path / "config.yaml").is_file() and (path / "adapter").is_dir():
        path = path / "adapter"  # a run folder stands for its adapter
    if not path.exists():
        path = _download(str(source), revision)
    if classifier_file(path):
        raise UserError(f"{source}: is a classifier, which `sd-atoms classify` takes, and no adapter of a pipeline")
    artefact = _read_file(path) if path.is_file() else _read_folder(path)
    files = [path] if path.is_file() else [*path.iterdir(), *(path / TEXT).glob("*")]
    size = sum(file.stat().st_size for file in files if file.suffix in (".safetensors", ".json"))
    return replace(artefact, source=str(source), size_bytes=size)


def is_ours(path: Path) -> bool:
    """Whether a safetensors file is an adapter with our header; False also of one that cannot be read."""
    return _has_entry(path, HEADER)


def classifier_file(path: Path) -> Path | None:
    """The file of a classifier that a file or run folder is; None where it is none."""
    file = path / CLASSIFIER_FILE if path.is_dir() else path
    return file if _has_entry(file, CLASSIFIER) else None


def _has_entry(path: Path, name: str) -> bool:
    try:
        with safe_open(path, "pt") as file:
            return name in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def _read_file(path: Path) -> Artefact:
    if path.suffix != ".safetensors":
        raise UserError(f"{path}: only .safetensors files are read; pickles (.bin, .pt, .pth, .ckpt) can run code")
    tensors, metadata, about = _read_tensors(path)
    if about is None:
        made = read_foreign(path, tensors, metadata)
        if made is not None:
            about = {} if isinstance(made.config, AtomsConfig) else {"method": IMPORTED}
            about["tokens"] = dict.fromkeys(made.tokens, "")
            return Artefact(
                made.config, made.state, made.tokens, about, made.text_config, made.text_state,
                left_over=tuple(made.left_over), names=dict(made.names),
            )  # fmt: skip
        hint = (
            "; a checkpoint of a run is taken by `sd-atoms generate`, drift, inspect and share"
            if "checkpoint" in path.name
            else ""
        )
        if is_bare(tensors):
            raise UserError(f"{path}: {BARE}")
        raise UserError(
            f"{path}: it is not an adapter of sd_atoms (no {HEADER!r} entry in its header{hint}), and "
            "no keys as kohya, LyCORIS, ComfyUI or diffusers write them"
        )
    text_state = {key.removeprefix(f"{TEXT}."): v for key, v in tensors.items() if key.startswith(f"{TEXT}.")}
    try:
        if about.get("format", 0) <= ATOMS_FORMAT:
            config, state = _stacked_atoms(about, tensors)
        else:
            state = {key.removeprefix(f"{UNET}."): v for key, v in tensors.items() if key.startswith(f"{UNET}.")}
            config = _made_config(f"{path}: its header", about["config"], state)
        text_config = _made_config(f"{path}: {TEXT} in its header", about.get(TEXT), text_state)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: corrupt, its header and its tensors do not fit ({error})") from error
    tokens = {key.removeprefix("token."): row for key, row in tensors.items() if key.startswith("token.")}
    try:
        tokens |= {token: from_text(text, (-1,)) for token, text in about.get(ROWS, {}).items()}
    except (ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"{path}: corrupt, the rows of its tokens cannot be read ({error})") from error
    if config is None and text_config is None and not tokens:
        raise UserError(f"{path}: corrupt, it holds nothing")
    return Artefact(config, state, tokens, about, text_config, text_state)


def _stacked_atoms(about: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]):
    """Config and state of filter atoms in one file."""
    config = AtomsConfig(**about["config"], inference_mode=True)
    state = {
        f"{layer}.{part}": tensors[f"{part}.{shape}"][index]
        for shape, layers in about["layers"].items()
        for index, layer in enumerate(layers)
        for part in PARTS
        if f"{part}.{shape}" in tensors
    }
    if set(about["layers"]) != {key.partition(".")[2] for key in tensors if key.partition(".")[0] in PARTS}:
        raise KeyError("layers")
    config.target_modules = [layer for layers in about["layers"].values() for layer in layers]
    return config, state


def _read_folder(folder: Path) -> Artefact:
    if (folder / LORA_FILE).exists() and not (folder / WEIGHTS_FILE).exists():
        return _read_file(folder / LORA_FILE)
    tokens, _, about = _read_tensors(folder / TOKENS_FILE) if (folder / TOKENS_FILE).exists() else ({}, {}, None)
    config, state, text_config, text_state, of_text = None, {}, None, {}, None
    if _has_adapter(folder / TEXT):
        text_config, text_state, of_text = _read_adapter(folder / TEXT)
        about = about or of_text  # where there is neither an adapter of the UNet nor a token
    if about is None or _has_adapter(folder):
        config, state, about = _read_adapter(folder)
    if about is not None and (TEXT in about) != (text_config is not None):
        raise UserError(f"{folder / WEIGHTS_FILE}: its header and the folder {TEXT} beside it do not fit")
    return Artefact(config, state, tokens, about or {}, text_config, text_state)


def _has_adapter(folder: Path) -> bool:
    return any((folder / name).exists() for name in (CONFIG_FILE, WEIGHTS_FILE, PICKLE_FILE))


def _read_adapter(folder: Path) -> tuple[PeftConfig, dict[str, torch.Tensor], dict[str, Any] | None]:
    """Config, state and the header's entry of a folder as PEFT writes it."""
    weights, config_path = folder / WEIGHTS_FILE, folder / CONFIG_FILE
    if not weights.exists():
        if (folder / PICKLE_FILE).exists():
            raise UserError(f"{folder / PICKLE_FILE}: pickles can run code and are refused; save as safetensors")
        raise UserError(f"{folder}: not an adapter folder, {WEIGHTS_FILE} is missing")
    try:
        settings = parse_json(config_path.read_text(encoding="utf-8"))
        settings.get("peft_type")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{config_path}: missing or not a JSON object ({error})") from error
    tensors, _, about = _read_tensors(weights)
    state = {key.removeprefix(PEFT_PREFIX): value for key, value in tensors.items()}
    return _made_config(config_path, settings, state, weights), state, about


def _made_config(
    where: Path | str,
    settings: Mapping[str, Any] | None,
    state: Mapping[str, torch.Tensor],
    weights: Path | None = None,
) -> PeftConfig | None:
    """The config of a state under PEFT's keys, None where both are missing; of atoms the state tells the layers."""
    if settings is None and not state:
        return None
    if not isinstance(settings, Mapping):
        raise TypeError("settings of an adapter")
    config = peft_config(where, settings)
    wrong = _wrong_parts(state) if isinstance(config, AtomsConfig) else []
    if wrong or not state:
        kind = "atoms" if isinstance(config, AtomsConfig) else "tensor"
        raise UserError(
            f"{weights or where}: corrupt, it lacks or does not know {', '.join(wrong[:3]) or f'any {kind}'}"
        )
    if isinstance(config, AtomsConfig):
        config.target_modules = list(by_layer(state))
    return config


def _read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str], dict[str, Any] | None]:
    """The tensors of a safetensors file, half precision widened to float32, its header and the "sd_atoms" entry."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        about = parse_json(metadata[HEADER]) if HEADER in metadata else None
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: corrupt or not a safetensors file ({error})") from error
    if about is not None and not (isinstance(about, dict) and isinstance(about.get("format", 0), int)):
        raise UserError(f"{path}: corrupt, its header says nothing sensible about format")
    if about is not None and about.get("format", 0) > FORMAT:
        raise UserError(f"{path}: written in a newer format than {FORMAT}; update sd-atoms")
    return {key: value.float() for key, value in tensors.items()}, metadata, about


def _write_tensors(path: Path, tensors: dict[str, torch.Tensor], dtype: torch.dtype, header: dict[str, str]) -> None:
    with replacing(path) as temporary:
        ready = {key: value.detach().to("cpu", dtype).contiguous() for key, value in tensors.items()}
        save_file(ready, temporary, metadata={"format": "pt", **header})


def _header(artefact: Artefact) -> dict[str, str]:
    value = {key: entry for key, entry in artefact.about.items() if key != TEXT}
    if artefact.is_atoms:
        config = {key: getattr(artefact.config, key) for key in CONFIG_KEYS}
        value |= {"format": ATOMS_FORMAT, "config": config, "layers": _layers_by_shape(artefact)}
    else:
        config = None if artefact.config is None else kept_settings(artefact.config)
        value |= {"format": FORMAT, "method": artefact.method, "config": config}
    if isinstance(artefact.config, LoraConfig) and artefact.tokens:
        value[ROWS] = {token: to_text(row) for token, row in artefact.tokens.items()}
    if artefact.text_config is not None:
        value[TEXT] = kept_settings(artefact.text_config) | {"target_modules": artefact.text_layers}
    entries = {HEADER: json.dumps(value, ensure_ascii=False, separators=(",", ":"))}
    if isinstance(artefact.config, LoraConfig):
        # by this diffusers' own loader knows alpha; ranks it takes from the shapes
        settings = {}
        for part, config, layers in (
            (UNET, artefact.config, artefact.layers),
            (TEXT, artefact.text_config, artefact.text_layers),
        ):
            if isinstance(config, LoraConfig):
                settings |= {f"{part}.{key}": getattr(config, key) for key in LORA_KEYS}
                settings[f"{part}.target_modules"] = layers
        entries["lora_adapter_metadata"] = json.dumps(settings)
    return entries


def _layers_by_shape(artefact: Artefact) -> dict[str, list[str]]:
    """ "9x9" (m x K), "9x4x9-beta320x9x4", "block16x16" … -> layers."""
    groups = defaultdict(list)
    for layer in artefact.layers:
        shapes = [
            prefix + "x".join(map(str, artefact.state[f"{layer}.{part}"].shape))
            for part, prefix in PARTS.items()
            if prefix is not None and f"{layer}.{part}" in artefact.state
        ]
        groups["-".join(shapes)].append(layer)
    return dict(groups)


def _download(name: str, revision: str | None) -> Path:
    try:
        return Path(
            snapshot_download(
                name, revision=revision, allow_patterns=["*.safetensors", CONFIG_FILE, f"{TEXT}/{CONFIG_FILE}"]
            )
        )
    except Exception as error:  # the hub library raises a dozen kinds for "not there"
        raise UserError(
            f"{name}: no such path, not in the local cache, and the hub did not provide it ({type(error).__name__})"
        ) from error

"""Reads the adapters of other programs: files of kohya, LyCORIS, ComfyUI and diffusers, and words as embeddings."""

import math
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sd_atoms.errors import UserError
from sd_atoms.files import parse_json
from sd_atoms.formats.keys import TEXT, UNET, WORD, is_sdxl, parse_keys
from sd_atoms.methods.adapters import one_line
from sd_atoms.methods.imported import PREFIX, ImportedConfig, kind_of, weight_change
from sd_atoms.tuner.plan import matching

ROW_KEYS = ("emb_params", "string_to_param.*")
SHOWN = 3


class Foreign(NamedTuple):
    """What a file of another program holds, as `Artefact` has it; left_over: keys that say nothing known."""

    config: ImportedConfig | None
    state: dict[str, torch.Tensor]
    text_config: ImportedConfig | None
    text_state: dict[str, torch.Tensor]
    tokens: dict[str, torch.Tensor]
    left_over: list[str]


def read_foreign(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> Foreign | None:
    """What the tensors of a file are an adapter of; None if they are none that a known program would write.

    Args:
        path: for messages, and for the word of a file that holds an embedding alone.
        tensors: key -> numbers, float32.
        metadata: of the file's header.

    Raises:
        UserError: it is made for SDXL, or the parts of a layer do not go together; one line.
    """
    words = _embedding(path, tensors)
    if words is not None:
        return Foreign(None, {}, None, {}, words, [])
    entries, left_over = parse_keys(tensors)
    if is_sdxl(tensors) or metadata.get("ss_base_model_version", "").startswith("sdxl"):
        raise UserError(f"{path}: made for SDXL; adapters of Stable Diffusion v1 and v2 are read")
    if not entries:
        return None
    layers, tokens = {UNET: defaultdict(dict), TEXT: defaultdict(dict)}, {}
    for key, (place, module, part) in entries.items():
        if place == WORD:
            tokens |= _rows(path, key, module, tensors[key])
        else:
            # under two names, as some programs need it, it is the same thing
            layers[place][module].setdefault(part, _shaped(path, key, part, tensors[key]))
    _add_alphas(path, layers, metadata)
    made = []
    for place in (UNET, TEXT):
        for module, parts in layers[place].items():
            _check(path, place, module, parts)
        shapes = {module: {part: list(v.shape) for part, v in own.items()} for module, own in layers[place].items()}
        state = {f"{module}.{PREFIX}{part}": v for module, own in layers[place].items() for part, v in own.items()}
        made += [ImportedConfig(parts=shapes, inference_mode=True) if shapes else None, state]
    return Foreign(*made, tokens, left_over)


def _embedding(path: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor] | None:
    """token -> row of a file that holds words alone: one key as A1111 writes it, or tokens as diffusers does."""
    if len(tensors) == 1 and next(iter(tensors)) in ROW_KEYS:
        key, rows = next(iter(tensors.items()))
        return _rows(path, key, path.stem, rows)
    if tensors and all(key.startswith("<") and value.dim() in (1, 2) for key, value in tensors.items()):
        return {token: row for key, value in tensors.items() for token, row in _rows(path, key, key, value).items()}
    return None


def _rows(path: Path, key: str, word: str, rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """<castle>, <castle>_1, … -> the rows (n, d) of a word."""
    rows = rows.unsqueeze(0) if rows.dim() == 1 else rows
    if rows.dim() != 2 or not rows.numel():
        raise UserError(f"{path}: corrupt, {key} has shape {tuple(rows.shape)}; rows of an embedding are (n, d)")
    word = word if word.startswith("<") else f"<{''.join(word.split())}>"
    return {word + (f"_{index}" if index else ""): row for index, row in enumerate(rows)}


def _shaped(path: Path, key: str, part: str, value: torch.Tensor) -> torch.Tensor:
    if part == "alpha":
        if value.numel() != 1:
            raise UserError(f"{path}: corrupt, {key} has shape {tuple(value.shape)}; alpha is one number")
        return value.reshape(())
    # PEFT's norms are those of the outputs, whatever shape they are in
    return value.flatten() if ".lora_magnitude_vector" in key else value


def _check(path: Path, place: str, module: str, parts: Mapping[str, torch.Tensor]) -> None:
    try:
        kind_of(parts)
        weight_change({part: value.to("meta") for part, value in parts.items()})
    except (ValueError, RuntimeError, IndexError) as error:
        where = module if place == UNET else f"text encoder, {module}"
        raise UserError(f"{path}: corrupt, {where}: {one_line(error)}") from error


def _add_alphas(path: Path, layers: Mapping[str, dict], metadata: Mapping[str, str]) -> None:
    """What diffusers says of alpha in the header: a number for all, and patterns for some."""
    if "lora_adapter_metadata" not in metadata:
        return
    try:
        said = parse_json(metadata["lora_adapter_metadata"])
        for place, modules in layers.items():
            own = {key.removeprefix(f"{place}."): v for key, v in said.items() if key.startswith(f"{place}.")}
            for module, parts in modules.items():
                alpha = _alpha(own, module)
                if alpha is not None and "lora_down" in parts and "alpha" not in parts:
                    rank = len(parts["lora_down"])
                    parts["alpha"] = torch.tensor(alpha * (math.sqrt(rank) if own.get("use_rslora") else 1.0))
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: corrupt, lora_adapter_metadata in its header cannot be read ({error})") from error


def _alpha(own: Mapping[str, Any], module: str) -> float | None:
    alpha = matching(own.get("alpha_pattern") or {}, module)
    alpha = own.get("lora_alpha") if alpha is None else alpha
    return None if alpha is None else float(alpha)


def shortened(names: list[str]) -> str:
    """The first few names, for a message."""
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")

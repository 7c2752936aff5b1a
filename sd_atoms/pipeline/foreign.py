"""Reads the adapters of other programs: files of kohya, LyCORIS, ComfyUI and diffusers, and words as embeddings."""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch

from sd_atoms.errors import UserError, shortlist
from sd_atoms.files import parse_json
from sd_atoms.formats.keys import ATOMS_B, ATOMS_BLOCK_B, TEXT, UNET, WORD, is_sdxl, layer_name, parse_keys
from sd_atoms.formats.names import demangled
from sd_atoms.formats.programs import is_known_by
from sd_atoms.methods.adapters import one_line
from sd_atoms.methods.imported import PREFIX, ImportedConfig, kind_of, weight_change
from sd_atoms.tuner import AtomsConfig
from sd_atoms.tuner.plan import matching

ROW_KEYS = ("emb_params", "string_to_param.*")
SHOWN = 3
BARE = (
    "weights of a PEFT folder without its adapter_config.json, so that alpha is not known: pass the folder, or write "
    "them by pipe.save_lora_weights(..., unet_lora_adapter_metadata=...)"
)
OVERCOMPLETE = (
    "overcomplete atoms for ComfyUI, one matrix B for each input channel, of which β and D1 are not known any more; "
    "take the adapter that it was exported from"
)
BLOCKS = (
    "block atoms for ComfyUI, whose matrices do not say which atoms they came from; take the adapter that it was "
    "exported from"
)
_BARE_KEYS = re.compile(
    r"(base_model\.model\.|down_blocks\.|mid_block\.|up_blocks\.|conv_in\.|conv_out\.|encoder\.layers\.)"
    r".*(lora_|hada_|lokr_|oft_).*"
)


class Foreign(NamedTuple):
    """What a file of another program holds, as `Artefact` has it.

    left_over: keys that say nothing known. names: (place, module) -> how the file calls the layer.
    """

    config: ImportedConfig | AtomsConfig | None
    state: dict[str, torch.Tensor]
    text_config: ImportedConfig | None
    text_state: dict[str, torch.Tensor]
    tokens: dict[str, torch.Tensor]
    left_over: list[str]
    names: Mapping[tuple[str, str], str] = MappingProxyType({})


def read_foreign(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> Foreign | None:
    """What the tensors of a file are an adapter of; None if they are none that a known program would write.

    Args:
        path: for messages, and for the word of a file that holds an embedding alone.
        tensors: key -> numbers, of any dtype.
        metadata: of the file's header.

    Raises:
        UserError: it is made for SDXL, the parts of a layer do not go together, or a number is not finite; one line.
    """
    words = _embedding(path, tensors)
    if words is not None:
        _check_finite(path, tensors)
        return Foreign(None, {}, None, {}, words, [])
    if tensors and all(key.endswith((ATOMS_B, ATOMS_BLOCK_B)) for key in tensors):
        return _comfy_atoms(path, tensors)
    entries, left_over = parse_keys(tensors)
    if is_sdxl(tensors) or metadata.get("ss_base_model_version", "").startswith("sdxl"):
        raise UserError(f"{path}: made for SDXL; adapters of Stable Diffusion v1 and v2 are read")
    if not entries:
        return None
    _check_finite(path, {key: tensors[key] for key in entries})
    layers, tokens = {UNET: defaultdict(dict), TEXT: defaultdict(dict)}, {}
    names: dict[tuple[str, str], str] = {}
    for key, (place, module, part) in entries.items():
        if place == WORD:
            tokens |= _rows(path, key, module, tensors[key])
        else:
            # under two names, as some programs need it, it is the same thing
            names.setdefault((place, module), layer_name(key))
            layers[place][module].setdefault(part, _shaped(path, key, part, tensors[key]))
    _add_alphas(path, layers, metadata)
    _leave_out_zeros(layers)
    made = []
    for place in (UNET, TEXT):
        for module, parts in layers[place].items():
            _check(path, names[place, module], parts)
        shapes = {module: {part: list(v.shape) for part, v in own.items()} for module, own in layers[place].items()}
        state = {f"{module}.{PREFIX}{part}": v for module, own in layers[place].items() for part, v in own.items()}
        made += [ImportedConfig(parts=shapes, inference_mode=True) if shapes else None, state]
    return Foreign(*made, tokens, left_over, names)


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


def _check_finite(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    broken = [key for key, value in tensors.items() if not torch.isfinite(value.float()).all()]
    if broken:
        raise UserError(
            f"{path}: {len(broken)} of its {len(tensors)} tensors hold numbers that are not finite "
            f"({shortlist(broken, SHOWN)})"
        )


def _leave_out_zeros(layers: Mapping[str, dict[str, dict[str, torch.Tensor]]]) -> None:
    """Takes away layers of zeros that files have for InvokeAI and diffusers alone: no adapter of ours had them."""
    count = sum(map(len, layers.values()))
    for place, modules in layers.items():
        for module in [module for module in modules if is_known_by(place, module)]:
            if count > 1 and "lora_up" in modules[module] and not modules[module]["lora_up"].any():
                del modules[module]
                count -= 1


def _comfy_atoms(path: Path, tensors: Mapping[str, torch.Tensor]) -> Foreign:
    """Filter atoms as `export --to comfy` writes them: ΔF = F·B is that of the atoms D = I, changed by B."""
    _check_finite(path, tensors)
    state = {}
    for key, b in tensors.items():
        if key.endswith(ATOMS_BLOCK_B):
            raise UserError(f"{path}: {BLOCKS}")
        layer = demangled(key.removeprefix("lora_unet_").removesuffix(ATOMS_B))
        if layer is None or b.dim() not in (2, 3) or b.shape[-1] != b.shape[-2] or not b.numel():
            raise UserError(f"{path}: corrupt, {key} has shape {tuple(b.shape)}; (K, K) or (i, K, K) is allowed")
        if b.dim() == 3:
            raise UserError(f"{path}: {OVERCOMPLETE}")
        state |= {f"{layer}.atoms_delta": b.float(), f"{layer}.atoms_initial": torch.eye(len(b))}
    layers = [key.removesuffix(".atoms_delta") for key in state if key.endswith(".atoms_delta")]
    most = max(len(b) for b in tensors.values())
    return Foreign(AtomsConfig(m=most, target_modules=layers, inference_mode=True), state, None, {}, {}, [])


def is_bare(keys: Iterable[str]) -> bool:
    """Whether keys are those of PEFT, which say nothing of alpha and of the network."""
    return any(_BARE_KEYS.fullmatch(key) for key in keys)


def _check(path: Path, name: str, parts: Mapping[str, torch.Tensor]) -> None:
    try:
        kind_of(parts)
        weight_change({part: value.to("meta") for part, value in parts.items()})
    except (ValueError, RuntimeError, IndexError) as error:
        raise UserError(f"{path}: corrupt, {name}: {one_line(error)}") from error


def _add_alphas(path: Path, layers: Mapping[str, dict], metadata: Mapping[str, str]) -> None:
    """What diffusers says of alpha in the header: a number for all, and patterns for some."""
    if "lora_adapter_metadata" not in metadata:
        return
    try:
        said = parse_json(metadata["lora_adapter_metadata"])
        for place, modules in layers.items():
            own = {key.removeprefix(f"{place}."): v for key, v in said.items() if key.startswith(f"{place}.")}
            for module, parts in modules.items():
                alpha = matching(own.get("alpha_pattern") or {}, module, own.get("lora_alpha"))
                if alpha is not None and "lora_down" in parts and "alpha" not in parts:
                    rank = len(parts["lora_down"])
                    parts["alpha"] = torch.tensor(float(alpha) * (math.sqrt(rank) if own.get("use_rslora") else 1.0))
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: corrupt, lora_adapter_metadata in its header cannot be read ({error})") from error

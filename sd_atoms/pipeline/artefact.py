"""Adapter files: a folder as PEFT writes it, and the same as one safetensors file.

One file:  atoms_delta.9x9, atoms_initial.9x9 (layers, m, K), the layers of one shape stacked, and likewise the parts
           that other modes have; token.<castle> (d,) per placeholder.
Folder:    adapter_config.json, adapter_model.safetensors with PEFT's keys, learned_embeds.safetensors with the
           placeholder rows under their own names, as textual inversion files have them.
The header entry "sd_atoms" of both is a JSON object: format, config, layers (by shape, in the order of the stacks),
fingerprint of the base, and what the writer knew about base, tokens, prompt, training and versions.
"""

import hashlib
import json
import re
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sd_atoms.errors import UserError
from sd_atoms.files import replacing, write_json
from sd_atoms.pipeline.base import resolve_source
from sd_atoms.tuner import AtomsConfig
from sd_atoms.tuner.config import PEFT_TYPE

FORMAT = 1
HEADER = "sd_atoms"
CONFIG_FILE, WEIGHTS_FILE, TOKENS_FILE = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "learned_embeds.safetensors",
)
CONFIG_KEYS = (
    "m",
    "m1",
    "train_beta",
    "kc",
    "m_c",
    "block_layers",
    "solver",
    "l1",
    "seed",
    "m_pattern",
    "scale_pattern",
    "form",
)
PEFT_PREFIX = "base_model.model."
# what a layer may have, and the letter that its shape gets in the name of a stack
PARTS = {
    "atoms_delta": "",
    "atoms_initial": None,  # its shape follows from the others'
    "atoms_beta": "beta",
    "atoms_block_delta": "block",
    "atoms_block_initial": None,
}


@dataclass(frozen=True)
class Artefact:
    """An adapter at rest.

    config: settings of the tuner. state: "<layer>.<part>" -> the numbers, parts as in `AtomsLayer`: atoms_delta and
    atoms_initial (m, K), atoms_beta, atoms_block_delta, atoms_block_initial.
    tokens: placeholder -> embedding row (d,). about: the rest of the header; empty for a file of plain PEFT.
    """

    config: AtomsConfig
    state: dict[str, torch.Tensor]
    tokens: dict[str, torch.Tensor] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def layers(self) -> list[str]:
        """Names of the adapted layers, in the order of `state`."""
        return list(dict.fromkeys(key.rpartition(".")[0] for key in self.state))

    def digest(self) -> str:
        """Tells adapters apart: 16 hexadecimal digits of what they hold, the same for a folder and its file."""
        content = hashlib.sha256()
        for key, value in sorted({**self.state, **self.tokens}.items()):
            content.update(key.encode() + value.float().contiguous().numpy().tobytes())
        return content.hexdigest()[:16]


def write_artefact(artefact: Artefact, path: str | Path, dtype: torch.dtype = torch.float32) -> Path:
    """Writes one file if `path` ends in .safetensors, else a folder; all or nothing per file.

    Raises:
        UserError: the place cannot be written to, or the disk is full.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        tensors = {f"token.{token}": row for token, row in artefact.tokens.items()}
        for shape, layers in _layers_by_shape(artefact).items():
            for part in PARTS:
                if f"{layers[0]}.{part}" in artefact.state:
                    tensors[f"{part}.{shape}"] = torch.stack([artefact.state[f"{layer}.{part}"] for layer in layers])
        _write_tensors(path, tensors, dtype, _header(artefact))
        return path
    header = _header(artefact)
    _write_tensors(path / WEIGHTS_FILE, {PEFT_PREFIX + k: v for k, v in artefact.state.items()}, dtype, header)
    if artefact.tokens:
        _write_tensors(path / TOKENS_FILE, artefact.tokens, dtype, {})
    config = artefact.config.to_dict() | {"inference_mode": True}
    write_json(path / CONFIG_FILE, {key: sorted(v) if isinstance(v, set) else v for key, v in config.items()})
    return path


def read_artefact(source: str | Path, revision: str | None = None) -> Artefact:
    """Reads an adapter from a folder, one .safetensors file, or a hub id (`revision` counts for the latter).

    Raises:
        UserError: there is none, it is a pickle, it is corrupt, or it is not a filter-atom adapter.
    """
    path = Path(resolve_source(str(source), "adapter")).expanduser()
    if not path.exists():
        path = _download(str(source), revision)
    if path.is_file():
        return _read_file(path)
    return _read_folder(path)


def _read_file(path: Path) -> Artefact:
    if path.suffix != ".safetensors":
        raise UserError(f"{path}: only .safetensors files are read; pickles (.bin, .pt, .pth, .ckpt) can run code")
    tensors, about = _read_tensors(path)
    if about is None:
        raise UserError(f"{path}: it is not a filter-atom adapter (no {HEADER!r} entry in its header)")
    try:
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
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: corrupt, its header and its tensors do not fit ({error})") from error
    config.target_modules = [layer for layers in about["layers"].values() for layer in layers]
    tokens = {key.removeprefix("token."): row for key, row in tensors.items() if key.startswith("token.")}
    return Artefact(config, state, tokens, about)


def _read_folder(folder: Path) -> Artefact:
    weights, config_path = folder / WEIGHTS_FILE, folder / CONFIG_FILE
    if not weights.exists():
        if (folder / "adapter_model.bin").exists():
            raise UserError(
                f"{folder / 'adapter_model.bin'}: pickles can run code and are refused; save as safetensors"
            )
        raise UserError(f"{folder}: not an adapter folder, {WEIGHTS_FILE} is missing")
    try:
        settings = json.loads(config_path.read_text(encoding="utf-8"))
        kind = settings.get("peft_type")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{config_path}: missing or not a JSON object ({error})") from error
    if kind != PEFT_TYPE:
        raise UserError(f"{config_path}: peft_type is {kind!r}, a filter-atom adapter has {PEFT_TYPE!r}")
    try:
        config = AtomsConfig(**{key: settings[key] for key in CONFIG_KEYS if key in settings}, inference_mode=True)
    except (TypeError, ValueError) as error:
        raise UserError(f"{config_path}: {error}") from error
    tensors, about = _read_tensors(weights)
    state = {key.removeprefix(PEFT_PREFIX): value for key, value in tensors.items()}
    tokens = _read_tensors(folder / TOKENS_FILE)[0] if (folder / TOKENS_FILE).exists() else {}
    artefact = Artefact(config, state, tokens, about or {})
    wrong = [k for k in state if k.rpartition(".")[2] not in PARTS] or [
        f"{layer}.{initial}"
        for layer in artefact.layers
        for delta, initial in (("atoms_delta", "atoms_initial"), ("atoms_block_delta", "atoms_block_initial"))
        if (f"{layer}.{delta}" in state) != (f"{layer}.{initial}" in state)
    ]
    if wrong or not artefact.layers:
        raise UserError(f"{weights}: corrupt, it lacks or does not know {', '.join(wrong[:3]) or 'any atoms'}")
    config.target_modules = artefact.layers
    return artefact


def _read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any] | None]:
    """The tensors of a safetensors file, half precision widened to float32, and its "sd_atoms" header entry."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        about = json.loads(metadata[HEADER]) if HEADER in metadata else None
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path}: corrupt or not a safetensors file ({error})") from error
    if about is not None and (not isinstance(about, dict) or about.get("format", 0) > FORMAT):
        raise UserError(f"{path}: written in a newer format than {FORMAT}; update sd-atoms")
    return {key: value.float() for key, value in tensors.items()}, about


def _write_tensors(path: Path, tensors: dict[str, torch.Tensor], dtype: torch.dtype, header: dict[str, str]) -> None:
    with replacing(path) as temporary:
        ready = {key: value.detach().to("cpu", dtype).contiguous() for key, value in tensors.items()}
        try:
            save_file(ready, temporary, metadata={"format": "pt", **header})
        except SafetensorError as error:  # the library hides the operating system's error in its text
            raise _as_os_error(error) from error


def _as_os_error(error: SafetensorError) -> Exception:
    code = re.search(r"os error (\d+)", str(error))
    return OSError(int(code.group(1)), str(error)) if code else error


def _header(artefact: Artefact) -> dict[str, str]:
    value = {
        **artefact.about,
        "format": FORMAT,
        "config": {key: getattr(artefact.config, key) for key in CONFIG_KEYS},
        "layers": _layers_by_shape(artefact),
    }
    return {HEADER: json.dumps(value, ensure_ascii=False, separators=(",", ":"))}


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
            snapshot_download(name, revision=revision, allow_patterns=["*.safetensors", "adapter_config.json"])
        )
    except Exception as error:  # the hub library raises a dozen kinds for "not there"
        raise UserError(
            f"{name}: no such path, not in the local cache, and the hub did not provide it ({type(error).__name__})"
        ) from error

"""Checkpoints: one safetensors file each, with everything that moves. What is drawn needs no state (see draws)."""

import json
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from sd_atoms.errors import UserError
from sd_atoms.files import replacing

NAME = re.compile(r"checkpoint-(\d+)\.safetensors")


def save_checkpoint(
    folder: Path, step: int, parameters: dict[str, nn.Parameter], optimizer, scaler, limit: int | None
) -> Path:
    """Writes checkpoint-<step>.safetensors, whole or not at all, then removes the oldest beyond `limit`."""
    tensors = {f"parameter.{name}": value.detach() for name, value in parameters.items()}
    state = optimizer.state_dict()["state"]
    for index, entries in state.items():
        tensors |= {f"optimizer.{index}.{key}": torch.as_tensor(value) for key, value in entries.items()}
    scaler_state = json.dumps(scaler.state_dict() if scaler is not None else {})
    path = folder / f"checkpoint-{step}.safetensors"
    with replacing(path) as temporary:
        ready = {key: value.cpu().contiguous() for key, value in tensors.items()}
        save_file(ready, temporary, metadata={"format": "pt", "step": str(step), "scaler": scaler_state})
    for old in checkpoints(folder)[:-limit] if limit else []:
        old.unlink()
    return path


def load_checkpoint(path: Path, parameters: dict[str, nn.Parameter], optimizer, scaler) -> int:
    """Puts everything back in place; returns the number of optimiser steps done.

    Raises:
        UserError: the file is corrupt or belongs to another run.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        step, scaler_state = int(metadata["step"]), json.loads(metadata["scaler"])
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise UserError(f"{path}: corrupt or not a checkpoint ({error})") from error
    saved = {key.removeprefix("parameter."): v for key, v in tensors.items() if key.startswith("parameter.")}
    if {k: v.shape for k, v in saved.items()} != {k: v.shape for k, v in parameters.items()}:
        raise UserError(f"{path}: belongs to a run with other trained parameters")
    with torch.no_grad():
        for name, value in saved.items():
            parameters[name].copy_(value)
    state = optimizer.state_dict()
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".", 2)
            state["state"].setdefault(int(index), {})[name] = value
    optimizer.load_state_dict(state)
    if scaler is not None and scaler_state:
        scaler.load_state_dict(scaler_state)
    return step


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder by rising step."""
    found = [path for path in folder.glob("checkpoint-*.safetensors") if NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(NAME.fullmatch(path.name).group(1)))


def find_checkpoint(choice: str, folder: Path) -> Path:
    """The file that --resume_from_checkpoint means: "latest", a path, or the name of one in `folder`.

    Raises:
        UserError: there is none.
    """
    if choice == "latest":
        found = checkpoints(folder)
        if not found:
            raise UserError(f"resume_from_checkpoint: {folder} holds no checkpoint")
        return found[-1]
    for path in (Path(choice), folder / choice, folder / f"{choice}.safetensors"):
        if path.is_file():
            return path
    raise UserError(f"resume_from_checkpoint: {choice!r} is neither 'latest' nor a checkpoint file")

"""Checkpoints: one safetensors file each, with everything that moves. What is drawn needs no state (see draws)."""

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from sd_atoms.errors import UserError
from sd_atoms.files import replacing

NAME = re.compile(r"checkpoint-(\d+)\.safetensors")
KINDS = ("parameter", "mean", "best")
# what optimisers keep of each parameter beside a count, two tensors of its shape, and their types; there may be more
MOMENTS = (({"exp_avg", "exp_avg_sq"}, {torch.float32}), ({"state1", "state2"}, {torch.float32, torch.uint8}))
COUNTS = (torch.float32, torch.int64)


@dataclass
class Progress:
    """How far a run has come, besides its parameters and its optimiser."""

    step: int = 0  # optimiser steps done
    mean: dict[str, torch.Tensor] = field(default_factory=dict)  # running mean of the parameters, if one is kept
    best: dict[str, torch.Tensor] = field(default_factory=dict)  # what is saved, at the lowest validation loss
    best_loss: float = math.inf
    best_step: int = 0
    data: dict[str, str] = field(default_factory=dict)  # what is learned from: its name -> digest of its content


def save_checkpoint(
    folder: Path, progress: Progress, parameters: dict[str, nn.Parameter], optimizer, scaler, limit: int | None
) -> Path:
    """Writes checkpoint-<step>.safetensors, whole or not at all, then removes the oldest beyond `limit`."""
    named = {"parameter": parameters, "mean": progress.mean, "best": progress.best}
    tensors = {f"{kind}.{name}": value.detach() for kind, values in named.items() for name, value in values.items()}
    state = optimizer.state_dict()
    for index, entries in state["state"].items():
        tensors |= {f"optimizer.{index}.{key}": torch.as_tensor(value) for key, value in entries.items()}
    metadata = {
        "format": "pt",
        "step": str(progress.step),
        "best": json.dumps([progress.best_loss, progress.best_step]),
        "scaler": json.dumps(scaler.state_dict() if scaler is not None else {}),
        "data": json.dumps(progress.data),
        "groups": json.dumps([_numbers(group) for group in state["param_groups"]]),
    }
    path = folder / f"checkpoint-{progress.step}.safetensors"
    with replacing(path) as temporary:
        save_file({key: value.cpu().contiguous() for key, value in tensors.items()}, temporary, metadata=metadata)
    for old in checkpoints(folder)[:-limit] if limit else []:
        if old != path:
            old.unlink()
    return path


def read_header(path: Path) -> tuple[Progress, list[dict], dict]:
    """What a checkpoint says besides its tensors: progress, the numbers of the optimiser's groups, the scaler's state.

    Raises:
        UserError: it is corrupt.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        step, scaler_state = int(metadata["step"]), dict(json.loads(metadata["scaler"]))
        (best_loss, best_step), groups = json.loads(metadata["best"]), json.loads(metadata["groups"])
        groups, data = [dict(group) for group in groups], dict(json.loads(metadata.get("data", "{}")))
        if step < 0 or not all(isinstance(value, (int, float)) for group in groups for value in group.values()):
            raise ValueError("a number in its header is none")
        progress = Progress(step, best_loss=float(best_loss), best_step=int(best_step), data=data)
        return progress, groups, scaler_state
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise UserError(f"{path}: corrupt or not a checkpoint ({error})") from error


def load_checkpoint(path: Path, parameters: dict[str, nn.Parameter], optimizer, scaler) -> Progress:
    """Puts everything back in place.

    Raises:
        UserError: the file is corrupt or belongs to another run.
    """
    progress, groups, scaler_state = read_header(path)
    tensors = _tensors(path, parameters)
    try:
        moments = _moments(tensors)
    except ValueError as error:
        raise UserError(f"{path}: corrupt or not a checkpoint ({error})") from error
    saved, mean, best = (_of_kind(tensors, kind) for kind in KINDS)
    state = optimizer.state_dict()
    if len(groups) != len(state["param_groups"]):
        raise UserError(f"{path}: belongs to a run with other groups of parameters")
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if not all(0 <= index < len(trained) and _fit(kept, trained[index]) for index, kept in moments.items()):
        raise UserError(f"{path}: belongs to a run with another optimiser")
    with torch.no_grad():
        for name, value in saved.items():
            parameters[name].copy_(value)
    state["state"] |= moments
    for group, numbers in zip(state["param_groups"], groups, strict=True):
        group.update(numbers)
    optimizer.load_state_dict(state)
    if scaler is not None and scaler_state:
        scaler.load_state_dict(scaler_state)
    device = next(iter(parameters.values())).device
    progress.mean, progress.best = ({name: v.to(device) for name, v in values.items()} for values in (mean, best))
    return progress


def kept_values(
    path: Path, parameters: dict[str, nn.Parameter], of_step: bool = False
) -> tuple[int, dict[str, torch.Tensor]]:
    """The step of a checkpoint, and the values that the run would save if it ended there.

    Args:
        path: of the checkpoint.
        parameters: name -> what the run trains.
        of_step: the values of this very step, also where the run keeps an earlier, better one's.

    Raises:
        UserError: the file is corrupt or belongs to another run.
    """
    progress, _, _ = read_header(path)
    saved, mean, best = (_of_kind(_tensors(path, parameters), kind) for kind in KINDS)
    return progress.step, (not of_step and best) or mean or saved


def _tensors(path: Path, parameters: dict[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint of these parameters."""
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: corrupt or not a checkpoint ({error})") from error
    broken = [key for key, value in tensors.items() if not torch.isfinite(value).all()]
    if broken:
        raise UserError(f"{path}: {len(broken)} of its tensors are not finite ({broken[0]}); resume an earlier one")
    saved, mean, best = (_of_kind(tensors, kind) for kind in KINDS)
    shapes = {name: (value.shape, value.dtype) for name, value in parameters.items()}
    for values in (saved, mean or saved, best or saved):
        if {name: (value.shape, value.dtype) for name, value in values.items()} != shapes:
            raise UserError(f"{path}: belongs to a run with other trained parameters")
    return tensors


def _moments(tensors: dict[str, torch.Tensor]) -> dict[int, dict[str, torch.Tensor]]:
    """What the optimiser keeps of each parameter, by its number."""
    found = {}
    for key, value in _of_kind(tensors, "optimizer").items():
        index, _, name = key.partition(".")
        found.setdefault(int(index), {})[name] = value
    return found


def _fit(kept: dict[str, torch.Tensor], parameter: nn.Parameter) -> bool:
    """Whether that is what an optimiser keeps of a parameter."""
    count = kept.get("step")
    if count is None or count.numel() != 1 or count.dtype not in COUNTS:
        return False
    for names, types in MOMENTS:
        if names <= kept.keys():
            return all(kept[name].shape == parameter.shape and kept[name].dtype in types for name in names)
    return False


def _of_kind(tensors: dict[str, torch.Tensor], kind: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix(f"{kind}."): value for key, value in tensors.items() if key.startswith(f"{kind}.")}


def _numbers(group: dict) -> dict[str, float]:
    """The numbers that an optimiser keeps in a group; some move, such as Prodigy's d."""
    return {key: value for key, value in group.items() if isinstance(value, (int, float)) and key != "lr"}


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder by rising step."""
    found = [path for path in folder.glob("checkpoint-*.safetensors") if NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(NAME.fullmatch(path.name).group(1)))


def checkpoints_by_step(folder: Path) -> dict[int, Path]:
    """Step -> checkpoint, by rising step.

    Raises:
        UserError: the folder holds none.
    """
    found = {int(NAME.fullmatch(path.name).group(1)): path for path in checkpoints(folder)}
    if not found:
        raise UserError(f"{folder}: holds no checkpoint; checkpointing_steps says how often a run keeps one")
    return found


def set_aside_later(folder: Path, step: int) -> list[Path]:
    """Moves the checkpoints after a step into `folder`/abandoned: the run goes on from there, on another branch."""
    later = [path for path in checkpoints(folder) if int(NAME.fullmatch(path.name).group(1)) > step]
    for path in later:
        (folder / "abandoned").mkdir(exist_ok=True)
        path.replace(folder / "abandoned" / path.name)
    return later


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

"""Checkpoints of a training stage: one safetensors file with modules and optimiser, scalars in its header."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sd_atoms.errors import UserError
from sd_atoms.files import replacing

OPTIMIZER = "optimizer"


def save_checkpoint(
    path: Path, modules: Mapping[str, torch.nn.Module], optimizer: torch.optim.Optimizer, scalars: dict[str, float]
) -> None:
    """Writes the state of all modules (their names without dots) and of the optimiser, all or nothing."""
    tensors = {
        f"{name}.{key}": value for name, module in modules.items() for key, value in module.state_dict().items()
    }
    for index, state in optimizer.state_dict()["state"].items():
        tensors.update({f"{OPTIMIZER}.{index}.{key}": value for key, value in state.items()})
    with replacing(path) as temporary:
        contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, temporary, metadata={"scalars": json.dumps(scalars)})


def load_checkpoint(
    path: Path, modules: Mapping[str, torch.nn.Module], optimizer: torch.optim.Optimizer
) -> dict[str, float]:
    """Restores what `save_checkpoint` wrote and returns its scalars.

    Raises:
        UserError: the file is damaged or does not fit the modules.
    """
    states: dict[str, dict] = {name: {} for name in (*modules, OPTIMIZER)}
    try:
        with safe_open(path, framework="pt") as file:
            scalars = json.loads(file.metadata()["scalars"])
            for full_name in file.keys():  # noqa: SIM118 (the file is not a mapping)
                name, key = full_name.split(".", 1)
                states[name][key] = file.get_tensor(full_name)
        for name, module in modules.items():
            module.load_state_dict(states[name])
        _load_optimizer(optimizer, states[OPTIMIZER])
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: cannot be resumed ({reason}); delete it to start the stage again") from error
    return scalars


def _load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})

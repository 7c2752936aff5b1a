"""Filter atoms for ComfyUI at their own size: a matrix B of each layer, and a node that makes F·B of it."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from sd_atoms.errors import UserError
from sd_atoms.formats.keys import UNET, kohya_key
from sd_atoms.methods.adapters import tuner_layers
from sd_atoms.pipeline.changes import Change
from sd_atoms.pipeline.export import ReadBack, relative_error, write_tensors
from sd_atoms.tuner import AtomsConfig

NODE = Path(__file__).parents[1] / "formats" / "nodes" / "comfyui_sd_atoms.py"


def why_not(configs: list[object]) -> str | None:
    """Why adapters of these settings, of the UNet, have no such file; None if they have."""
    if not all(isinstance(config, AtomsConfig) for config in configs):
        return "only atoms have a matrix B"
    if any(config.solver != "svd" for config in configs):
        return "sparse atoms have coefficients of their own, and no matrix B"
    if any(config.kc for config in configs):
        return "the node makes no block atoms"
    return None


@torch.no_grad()
def mixings(unet: nn.Module, adapter: str) -> dict[str, torch.Tensor]:
    """Layer -> B (K, K), or (i, K, K), at the adapter's present strength, float32."""
    found = {}
    for name, layer in tuner_layers(unet).items():
        if adapter in layer.plan:
            (term,) = layer.change_terms(adapter)
            if term.mixing.any():
                found[name] = term.mixing.float().clone()
    return found


def add_mixings(total: dict[str, torch.Tensor], more: Mapping[str, torch.Tensor]) -> None:
    """Adds B to B; one for all channels counts for each of them."""
    for name, mixing in more.items():
        total[name] = total[name] + mixing if name in total else mixing


def write_comfy(
    path: Path,
    mixed: Mapping[str, torch.Tensor],
    weights: Mapping[str, torch.Tensor],
    layers: Mapping[tuple[str, str], Change],
    metadata: Mapping[str, str],
) -> ReadBack:
    """Writes B of each layer in float32, then reads it back and applies it to the weights by the node's formula."""
    if not mixed:
        raise UserError(f"{path}: the adapter changes nothing")
    write_tensors(path, {kohya_key(UNET, name, "atoms_b"): b.contiguous() for name, b in mixed.items()}, metadata)
    read, errors = load_file(path), {}
    for name in mixed:
        b, weight = read[kohya_key(UNET, name, "atoms_b")], weights[name].float()
        filters = weight.flatten(2)
        change = filters @ b if b.dim() == 2 else torch.bmm(filters.transpose(0, 1), b).transpose(0, 1)
        errors[name] = relative_error({"weight": change.reshape(weight.shape)}, layers[UNET, name].values)
    return ReadBack(errors)

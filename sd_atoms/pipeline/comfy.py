"""Filter atoms for ComfyUI at their own size: a matrix B of each layer, and a node that makes F·B of it."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from sd_atoms.atoms import block_rows, unblock_rows
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
    if len({config.kc for config in configs if config.kc}) > 1:
        return "block atoms of several sizes have no matrix in common"
    return None


@torch.no_grad()
def mixings(unet: nn.Module, adapter: str) -> dict[tuple[str, str], torch.Tensor]:
    """(layer, part) -> B at the adapter's present strength, float32.

    Of the part "atoms_b" (K, K), or (i, K, K); of "atoms_block_b", for blocks of a × b channels, (a, b, K, a·b·K).
    """
    found = {}
    for name, layer in tuner_layers(unet).items():
        for term in layer.change_terms(adapter) if adapter in layer.plan else ():
            if term.block and term.mixing.any():
                found[name, "atoms_block_b"] = term.mixing.float().unflatten(0, (*term.block, -1)).clone()
            elif term.mixing.any():
                found[name, "atoms_b"] = term.mixing.float().clone()
    return found


def write_comfy(
    path: Path,
    mixed: Mapping[tuple[str, str], torch.Tensor],
    weights: Mapping[str, torch.Tensor],
    layers: Mapping[tuple[str, str], Change],
    metadata: Mapping[str, str],
) -> ReadBack:
    """Writes B of each layer in float32, then reads it back and applies it to the weights by the node's formula."""
    if not mixed:
        raise UserError(f"{path}: the adapter changes nothing")
    write_tensors(path, {kohya_key(UNET, *key): b.contiguous() for key, b in mixed.items()}, metadata)
    read, errors = load_file(path), {}
    for name in dict.fromkeys(name for name, _ in mixed):
        parts = [read.get(kohya_key(UNET, name, part)) for part in ("atoms_b", "atoms_block_b")]
        errors[name] = relative_error({"weight": _change(weights[name].float(), *parts)}, layers[UNET, name].values)
    return ReadBack(errors)


def _change(weight: torch.Tensor, b: torch.Tensor | None, block_b: torch.Tensor | None) -> torch.Tensor:
    """As the node has it: what the filters of a weight (o, i, *k) change by."""
    filters = weight.reshape(*weight.shape[:2], -1)
    change = torch.zeros_like(filters)
    if b is not None:
        change += filters @ b if b.dim() == 2 else torch.bmm(filters.transpose(0, 1), b).transpose(0, 1)
    if block_b is not None:
        rows = block_rows(filters, block_b.shape[:2])
        change += unblock_rows(rows @ block_b.flatten(0, 2), block_b.shape[:2])
    return change.view(weight.shape)

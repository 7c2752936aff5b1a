"""The two matrices of low rank that an adapter's change of a layer is the product of, where it is one."""

from typing import NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer

from sd_atoms.methods.imported import PREFIX, ImportedLayer
from sd_atoms.methods.lora_conv import LoraConvLayer
from sd_atoms.methods.lycoris import LycorisLayer


class Factors(NamedTuple):
    """ΔW = scale · up·down: up (o, r), of a convolution (o, r, 1, 1), down (r, i, *k)."""

    up: torch.Tensor
    down: torch.Tensor
    scale: float


@torch.no_grad()
def low_rank(layer: BaseTunerLayer, adapter: str) -> Factors | None:
    """The factors of an adapter's change at its strength, as they were trained; None where it has none such."""
    if isinstance(layer, LoraLayer) and adapter in layer.lora_A:
        if layer.lora_bias.get(adapter) or adapter in layer.lora_variant:
            return None
        up, down = layer.lora_B[adapter].weight, layer.lora_A[adapter].weight
    elif isinstance(layer, LycorisLayer) and layer.algo[adapter] == "locon" and adapter not in layer.lycoris_mid:
        up, down = layer.lycoris_up[adapter], layer.lycoris_down[adapter]
    elif isinstance(layer, LoraConvLayer):
        up, down = _of_view(layer.conv_lora_B[adapter], layer.conv_lora_A[adapter], layer.original("weight").shape)
    elif isinstance(layer, ImportedLayer):
        held = [part for part in layer.adapter_layer_names if adapter in getattr(layer, part)]
        if {part.removeprefix(PREFIX) for part in held} - {"alpha"} != {"lora_up", "lora_down"}:
            return None
        up, down = layer.imported_lora_up[adapter], layer.imported_lora_down[adapter]
        scale = layer.scaling[adapter]
        if adapter in layer.imported_alpha:
            scale *= float(layer.imported_alpha[adapter]) / len(down)
        return Factors(up.detach(), down.detach(), scale)
    else:
        return None
    return Factors(up.detach(), down.detach(), float(layer.scaling[adapter]))


def _of_view(b: torch.Tensor, a: torch.Tensor, shape: torch.Size) -> tuple[torch.Tensor, torch.Tensor]:
    """B·A (o·k, i·k) viewed as the weight (o, i, k, k), as a product of rank r·k²: each of the k rows of an output
    fills k-th part of its filters, so down is A once for each of them on its diagonal."""
    o, i, k, _ = shape
    up = b.reshape(o, -1, 1, 1)  # (o, k * r*k)
    down = torch.block_diag(*[a] * k).reshape(-1, i, k, k)  # (k * r*k, k * i*k)
    return up, down

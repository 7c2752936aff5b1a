"""Filter atoms in ComfyUI: put this file into ComfyUI/custom_nodes and start ComfyUI again.

Any node that loads a LoRA then loads an exported `…-comfy.safetensors` too. Of each layer the file has one or two
matrices. With `<layer>.atoms_b` (K, K), or (i, K, K) of overcomplete atoms, the change of its filters F, rows of K
taps, is F·B; with `<layer>.atoms_block_b` (a, b, K, a·b·K) that of its blocks of a × b filters, rows of a·b·K taps.
Load it before other LoRAs: ComfyUI hands the weight on as earlier patches left it.
"""

import torch
from comfy import weight_adapter
from comfy.weight_adapter.base import WeightAdapterBase


class AtomsAdapter(WeightAdapterBase):
    name = "atoms"

    def __init__(self, loaded_keys, weights):
        self.loaded_keys = loaded_keys
        self.weights = weights

    @classmethod
    def load(cls, x, lora, alpha, dora_scale, loaded_keys=None):
        parts = [f"{x}.atoms_b", f"{x}.atoms_block_b"]
        if not any(part in lora for part in parts):
            return None
        keys = set() if loaded_keys is None else loaded_keys
        keys.update(part for part in parts if part in lora)
        return cls(keys, [lora.get(part) for part in parts])

    def calculate_weight(
        self, weight, key, strength, strength_model, offset, function, intermediate_dtype=torch.float32,
        original_weight=None,
    ):  # fmt: skip
        b, block_b = (None if part is None else part.to(weight.device, torch.float32) for part in self.weights)
        filters = weight.float().reshape(*weight.shape[:2], -1)  # (o, i, K)
        change = torch.zeros_like(filters)
        if b is not None:
            # (o, i, K) @ (K, K), or of overcomplete atoms (i, o, K) @ (i, K, K)
            change += filters @ b if b.dim() == 2 else torch.bmm(filters.transpose(0, 1), b).transpose(0, 1)
        if block_b is not None:
            a, c = block_b.shape[:2]
            blocks = filters.unflatten(1, (-1, c)).unflatten(0, (-1, a)).transpose(1, 2)  # (o/a, i/c, a, c, K)
            changed = (blocks.flatten(2) @ block_b.flatten(0, 2)).view(blocks.shape)
            change += changed.transpose(1, 2).reshape(filters.shape)
        weight += function(strength * change.reshape(weight.shape)).to(weight.dtype)
        return weight


weight_adapter.adapters.append(AtomsAdapter)
NODE_CLASS_MAPPINGS = {}

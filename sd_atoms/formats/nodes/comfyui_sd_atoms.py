"""Filter atoms in ComfyUI: put this file into ComfyUI/custom_nodes and start ComfyUI again.

Any node that loads a LoRA then loads an exported `…-comfy.safetensors` too. Of each convolution the file has one small
matrix, `<layer>.atoms_b` (K, K), or (i, K, K) of overcomplete atoms, and the change of its filters F, rows of K taps,
is F·B. Load it before other LoRAs: ComfyUI hands the weight on as earlier patches left it.
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
        key = f"{x}.atoms_b"
        if key not in lora:
            return None
        keys = set() if loaded_keys is None else loaded_keys
        keys.add(key)
        return cls(keys, [lora[key]])

    def calculate_weight(
        self, weight, key, strength, strength_model, offset, function, intermediate_dtype=torch.float32,
        original_weight=None,
    ):  # fmt: skip
        b = self.weights[0].to(weight.device, torch.float32)
        filters = weight.float().flatten(2)  # (o, i, K)
        # (o, i, K) @ (K, K), or of overcomplete atoms (i, o, K) @ (i, K, K)
        change = filters @ b if b.dim() == 2 else torch.bmm(filters.transpose(0, 1), b).transpose(0, 1)
        weight += function(strength * change.reshape(weight.shape)).to(weight.dtype)
        return weight


weight_adapter.adapters.append(AtomsAdapter)
NODE_CLASS_MAPPINGS = {}

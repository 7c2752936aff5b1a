"""LoRA on a convolution as microsoft/LoRA writes it (arXiv 2106.09685), which the paper of filter atoms compares with.

The filters (o, i/g, k, k) are read as a matrix (o/g·k, i·k), and that matrix changes by B·A.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn

from sd_atoms.atoms import mixing_dtype
from sd_atoms.methods.config import RankConfig
from sd_atoms.methods.layer import DeltaLayer
from sd_atoms.tuner.config import TunerType
from sd_atoms.tuner.tuned import TunedModel


@dataclass
class LoraConvConfig(RankConfig):
    """Settings of a conv LoRA in the form of microsoft/LoRA: r·k²·(i + o/g) numbers a layer.

    Raises:
        ValueError: a setting is out of range; the message lists every such setting.
    """

    tuner_type = TunerType.LORA_CONV


class LoraConvLayer(DeltaLayer):
    """Conv2d with k×k filters. Trained, per adapter: `conv_lora_A` (r·k, i·k), random at the start, and `conv_lora_B`
    (o/g·k, r·k), zero."""

    adapter_layer_names = ("conv_lora_A", "conv_lora_B")

    def __init__(self, base_layer, adapter_name):
        super().__init__(base_layer, adapter_name)
        self.conv_lora_A = nn.ParameterDict()
        self.conv_lora_B = nn.ParameterDict()

    def update_layer(self, adapter_name, config, name):
        conv = self.base_layer
        k, rows = conv.kernel_size[0], config.r * conv.kernel_size[0]
        self.conv_lora_A[adapter_name] = self._new(torch.empty(rows, conv.in_channels * k))
        self.conv_lora_B[adapter_name] = self._new(torch.zeros(conv.out_channels // conv.groups * k, rows))
        nn.init.kaiming_uniform_(self.conv_lora_A[adapter_name], a=math.sqrt(5))
        self._added(adapter_name, config, config.scale)

    def delta(self, adapter):
        """B·A, viewed as (o, i/g, k, k)."""
        weight = self.original("weight")
        dtype = mixing_dtype(weight.dtype)
        # (o/g*k, r*k) @ (r*k, i*k) -> (o/g*k, i*k)
        change = self.conv_lora_B[adapter].to(dtype) @ self.conv_lora_A[adapter].to(dtype)
        return change.view(weight.shape)


class LoraConvModel(TunedModel):
    """The tuner behind `get_peft_model(model, LoraConvConfig(...))` and `unet.add_adapter(LoraConvConfig(...))`."""

    prefix = "conv_lora_"
    tuner_layer_cls = LoraConvLayer

    def check_layer(self, config, name, layer):
        if type(layer) is not nn.Conv2d:
            raise ValueError(f"is a {type(layer).__name__}, lora-conv takes Conv2d")
        if layer.kernel_size[0] != layer.kernel_size[1]:
            raise ValueError(f"has filters of {layer.kernel_size}, lora-conv takes k×k")

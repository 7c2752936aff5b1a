"""The ways of training that are compared, each put into a UNet by one call."""

import torch
from torch import nn

from sd_atoms.atoms import filter_rows, svd_atoms
from sd_atoms.errors import UserError
from sd_atoms.tuner import AtomsConfig, named_targets

METHODS = {
    "floor": "nothing is trained; the gradient goes through the frozen network to its input",
    "atoms": "filter atoms, m=9 on the 3×3 convolutions, the form picked per call",
    "atoms-weight": "the same, always in the weight form",
    "atoms-activation": "the same, always in the activation form",
    "atoms-split": "the same, always in the split form",
    "atoms-9-4": "overcomplete filter atoms, (m, m1) = (9, 4) with β trained, on the 3×3 convolutions",
    "lora-conv": "LoRA of PEFT, r=16 on the 3×3 convolutions",
    "loha-conv": "LoHa of PEFT, r=4 on the 3×3 convolutions",
    "lokr-conv": "LoKr of PEFT, r=4 on the 3×3 convolutions",
    "lora-attn": "LoRA of PEFT, r=4 on the projections of the attention",
    "naive": "filter atoms, F + F·B left to autograd",
}
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


def parse_methods(text: str) -> list[str]:
    """Splits "floor,atoms" and checks the names.

    Raises:
        UserError: a name is unknown or comes twice.
    """
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in METHODS:
            raise UserError(f"--methods: {name!r} is unknown; {', '.join(METHODS)} are allowed")
        if names.count(name) > 1:
            raise UserError(f"--methods: {name!r} comes twice")
    return names


def attach(unet: nn.Module, method: str) -> list[nn.Parameter]:
    """Freezes the UNet and puts the method's trainable numbers in; returns them (none for the floor)."""
    from peft import LoHaConfig, LoKrConfig, LoraConfig

    unet.requires_grad_(False)
    if method == "naive":
        for name in named_targets(unet, "conv3x3"):
            parent, _, child = name.rpartition(".")
            setattr(unet.get_submodule(parent), child, NaiveAtomsConv2d(unet.get_submodule(name)))
    elif method == "lora-attn":
        unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=ATTENTION))
    elif method == "lora-conv":
        unet.add_adapter(LoraConfig(r=16, lora_alpha=16, target_modules=named_targets(unet, "conv3x3")))
    elif method == "loha-conv":
        unet.add_adapter(LoHaConfig(r=4, alpha=4, target_modules=named_targets(unet, "conv3x3")))
    elif method == "lokr-conv":
        unet.add_adapter(LoKrConfig(r=4, alpha=4, target_modules=named_targets(unet, "conv3x3")))
    elif method == "atoms-9-4":
        unet.add_adapter(AtomsConfig(m=9, m1=4, target_modules="conv3x3"))
    elif method != "floor":
        form = method.removeprefix("atoms").removeprefix("-") or "auto"
        unet.add_adapter(AtomsConfig(m=9, target_modules="conv3x3", form=form))
    return [parameter for parameter in unet.parameters() if parameter.requires_grad]


class NaiveAtomsConv2d(nn.Module):
    """conv(x, F + F·Dᵀ·ΔD) as it is written, with the effective weight in autograd's graph."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv
        atoms = svd_atoms(filter_rows(conv.weight), conv.kernel_size[0] * conv.kernel_size[1])
        self.register_buffer("atoms", atoms)
        self.atoms_delta = nn.Parameter(torch.zeros_like(atoms))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, i, H, W) -> (N, o, H', W')."""
        weight = self.conv.weight
        change = (self.atoms.T @ self.atoms_delta).to(weight.dtype)
        # (o*i, K) @ (K, K) -> (o*i, K)
        effective = weight + (filter_rows(weight) @ change).view(weight.shape)
        return self.conv._conv_forward(x, effective, self.conv.bias)

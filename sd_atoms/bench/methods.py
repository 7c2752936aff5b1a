"""The ways of training that are compared, each put into a UNet by one call."""

import torch
from torch import nn

from sd_atoms.atoms import filter_rows, svd_atoms
from sd_atoms.errors import UserError
from sd_atoms.methods import all_methods, get_method
from sd_atoms.methods.adapters import add_adapter
from sd_atoms.settings import coerced
from sd_atoms.training.sections import MethodSettings
from sd_atoms.tuner import named_targets

FLOOR, NAIVE = "floor", "naive"
USUAL_M = 9  # atoms of a layer, where its filters have as many taps
OTHERS = {
    FLOOR: "nothing is trained; the gradient goes through the frozen network to its input",
    NAIVE: "filter atoms, F + F·B left to autograd",
}


def parse_methods(text: str) -> list[str]:
    """Splits "floor,atoms,locon:rank=16" and checks it: methods with settings of theirs, floor and naive.

    Raises:
        UserError: a name or a setting is unknown or out of range, or one comes twice.
    """
    names = [name.strip() for name in text.split(",")]
    known = [*OTHERS, *(name for name in all_methods() if name != "token")]
    for name in names:
        if name.partition(":")[0] not in known:
            raise UserError(f"--methods: {name!r} is unknown; {', '.join(known)} are allowed, with settings as in "
                            "locon:rank=16")  # fmt: skip
        if names.count(name) > 1:
            raise UserError(f"--methods: {name!r} comes twice")
        settings_of(name)
    return names


def settings_of(method: str) -> dict:
    """The settings in "atoms:m=9:m1=4".

    Raises:
        UserError: one is unknown, not the method's or out of range.
    """
    method_name, *texts = method.split(":")
    settings = {}
    for text in texts:
        name, _, value = text.partition("=")
        try:
            settings[name] = coerced(MethodSettings, name, {"true": True, "false": False}.get(value.lower(), value))
        except ValueError as error:
            raise UserError(f"--methods: {method}: {name}: {error}") from error
    allowed = ()
    if method_name not in OTHERS:
        chosen = get_method(method_name)
        allowed = (*chosen.settings, *["target"] * (chosen.default_target is not None))
    foreign = [name for name in settings if name not in allowed]
    if foreign:
        raise UserError(f"--methods: {method}: {foreign[0]}: {method_name} has {', '.join(allowed) or 'no settings'}")
    return settings


def description(method: str) -> str:
    """A method in one line."""
    name = method.partition(":")[0]
    return OTHERS[name] if name in OTHERS else get_method(name).help


def attach(unet: nn.Module, method: str) -> list[nn.Parameter]:
    """Freezes the UNet and puts the method's trainable parameters in; returns them (none for the floor)."""
    unet.requires_grad_(False)
    name, settings = method.partition(":")[0], settings_of(method)
    if name == NAIVE:
        put_naive(unet, "conv3x3")
    elif name != FLOOR:
        target = settings.pop("target", None)
        add_adapter(unet, get_method(name).make_config(unet, settings, target))
    return [parameter for parameter in unet.parameters() if parameter.requires_grad]


def put_naive(network: nn.Module, target: str) -> None:
    """Puts a NaiveAtomsConv2d in the place of every layer of a named set."""
    for layer in named_targets(network, target):
        parent, _, child = layer.rpartition(".")
        setattr(network.get_submodule(parent), child, NaiveAtomsConv2d(network.get_submodule(layer)))


class NaiveAtomsConv2d(nn.Module):
    """conv(x, F + F·Dᵀ·ΔD) as it is written, with the effective weight in autograd's graph."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv
        rows = filter_rows(conv.weight)
        atoms = svd_atoms(rows, min(USUAL_M, rows.shape[1]))
        self.register_buffer("atoms", atoms)
        self.atoms_delta = nn.Parameter(torch.zeros_like(atoms))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, i, H, W) -> (N, o, H', W')."""
        weight = self.conv.weight
        change = (self.atoms.T @ self.atoms_delta).to(weight.dtype)
        # (o*i, K) @ (K, K) -> (o*i, K)
        effective = weight + (filter_rows(weight) @ change).view(weight.shape)
        return self.conv._conv_forward(x, effective, self.conv.bias)

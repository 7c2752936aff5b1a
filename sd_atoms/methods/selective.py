"""Training some of a network's own parameters: BitFit (arXiv 2106.10199), norm layers, full fine-tuning."""

from dataclasses import dataclass, field

import torch
from peft import PeftConfig
from torch import nn

from sd_atoms.atoms import mixing_dtype
from sd_atoms.tuner import named_targets
from sd_atoms.tuner.config import TargetConfig, TunerType
from sd_atoms.tuner.shared import base_of
from sd_atoms.tuner.tuned import TunedLayer, TunedModel

KINDS = ("bias", "norm", "full")


@dataclass
class SelectiveConfig(TargetConfig):
    """Settings of an adapter that trains float32 copies of parameters in their place.

    Raises:
        ValueError: a setting is out of range; the message lists every such setting.
    """

    tuner_type = TunerType.SELECTIVE
    kind: str = field(
        default="full",
        metadata={"help": "What is trained: bias (every bias), norm (norm layers) or full (every parameter)."},
    )
    target_modules: str | list[str] | None = field(
        default="all",
        metadata={
            "help": "all, another named set (conv3x3, conv, conv+linear, attn, all-linear), a list of module names "
            "or endings, or a regular expression. Of a named set, layers without such parameters are left out."
        },
    )

    def problems(self):
        return [] if self.kind in KINDS else [f"kind={self.kind!r}: one of {', '.join(KINDS)} is allowed"]


def is_norm(layer: nn.Module) -> bool:
    """Whether a layer normalises: GroupNorm, LayerNorm, BatchNorm, RMSNorm and those that others define."""
    return "Norm" in type(layer).__name__


def parameters_of(layer: nn.Module, kind: str) -> list[str]:
    """The names of a layer's own parameters that are trained: kind is one of KINDS."""
    names = [name for name, _ in layer.named_parameters(recurse=False)]
    if kind == "bias":
        return [name for name in names if "bias" in name]
    return names if kind == "full" or is_norm(layer) else []


class SelectiveLayer(TunedLayer):
    """Any layer with parameters of its own. Trained, per adapter: `selective_<name>`, a copy of parameter <name>.

    What is trained and saved is the copy, not its difference from the base: full fine-tuning then costs no more
    memory or time than without an adapter, weight decay means what it always means, and p + 1·(copy − p) needs no
    rounding, so that a loaded copy computes the very same. A copy in float32 holds a bfloat16 or float16 parameter
    exactly, which gives the identity at the start.
    """

    prefix = "selective_"

    def __init__(self, base_layer, adapter_name):
        super().__init__(base_layer, adapter_name)
        self.adapter_layer_names = tuple(f"{self.prefix}{name}" for name, _ in base_layer.named_parameters())
        for part in self.adapter_layer_names:
            setattr(self, part, nn.ParameterDict())

    def copies(self, name: str) -> nn.ParameterDict:
        """Adapter -> its copy of the parameter of that name."""
        return getattr(self, f"{self.prefix}{name}")

    def trained_names(self, config: PeftConfig) -> list[str]:
        """Which parameters an adapter with these settings has copies of."""
        return parameters_of(self.base_layer, config.kind)

    def update_layer(self, adapter_name, config, name):
        for parameter in self.trained_names(config):
            self.copies(parameter)[adapter_name] = self._new(self.original(parameter))
        self._added(adapter_name, config)

    def values(self, adapters):
        found = {}
        for name, _ in self.base_layer.named_parameters():
            copies = [(self.copies(name)[key], self.scaling[key]) for key in adapters if key in self.copies(name)]
            if copies:
                found[name] = _mixture(self.original(name), copies)
        return found


def _mixture(original: torch.Tensor, copies: list[tuple[torch.Tensor, float]]) -> torch.Tensor:
    """p + Σ scale·(copy − p) in float32 at least."""
    dtype = mixing_dtype(original.dtype)
    if len(copies) == 1 and copies[0][1] == 1:
        return copies[0][0].to(dtype)
    start = original.to(dtype)
    total = start
    for copy, scale in copies:
        total = total + scale * (copy.to(dtype) - start)
    return total


class SelectiveModel(TunedModel):
    """The tuner behind `get_peft_model(model, SelectiveConfig(...))` and `unet.add_adapter(SelectiveConfig(...))`."""

    prefix = SelectiveLayer.prefix
    tuner_layer_cls = SelectiveLayer

    def layers_of(self, config, target_set):
        names = all_layers(self.model) if target_set == "all" else named_targets(self.model, target_set)
        found = [name for name in names if parameters_of(base_of(self.model.get_submodule(name)), config.kind)]
        if not found:
            raise ValueError(f"target_modules={target_set!r} holds no layer with {config.kind} parameters")
        return found

    def _refuse_unfit_layers(self, config):
        self._owners: dict[int, str] = {}
        super()._refuse_unfit_layers(config)

    def check_layer(self, config, name, layer):
        if not parameters_of(layer, config.kind):
            raise ValueError(f"has no {config.kind} parameters")
        check_parameters(name, layer, parameters_of(layer, config.kind), self._owners)


def all_layers(model: nn.Module) -> list[str]:
    """The names of all modules with parameters of their own, adapters' not counted, in module order."""
    return [
        name
        for name, module in model.named_modules()
        if "base_layer" not in name.split(".") and next(base_of(module).parameters(recurse=False), None) is not None
    ]


def check_parameters(name: str, layer: nn.Module, parameters: list[str], owners: dict[int, str]) -> None:
    """Whether copies of a layer's parameters can be trained in their place; `owners` gathers who has which.

    Raises:
        ValueError: they cannot; the message says why, without the name.
    """
    if next(layer.children(), None) is not None:
        raise ValueError("holds parameters beside its sub-modules; leave it out by exclude_modules")
    for parameter in parameters:
        tensor = getattr(layer, parameter)
        if not tensor.is_floating_point():
            raise ValueError(f"has {parameter} in {tensor.dtype}, which cannot be trained")
        owner = owners.setdefault(id(tensor), name)
        if owner != name:
            raise ValueError(f"shares its {parameter} with {owner}; tied parameters cannot be trained apart")

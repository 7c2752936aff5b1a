"""DiffFit (arXiv 2304.06648): scale vectors γ in the transformer blocks, with biases and norm layers."""

import math
from dataclasses import dataclass, field

import torch
from torch import nn

from sd_atoms.atoms import mixing_dtype
from sd_atoms.methods.selective import SelectiveLayer, SelectiveModel, all_layers, check_parameters, is_norm
from sd_atoms.tuner.config import TargetConfig, TunerType
from sd_atoms.tuner.shared import base_of

PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
BLOCK_ENDS = ("attn1.to_out.0", "attn2.to_out.0", "ff.net.2")


@dataclass
class DiffFitConfig(TargetConfig):
    """Settings of a DiffFit adapter; the defaults are the names of diffusers' transformer blocks.

    Raises:
        ValueError: a setting is out of range.
    """

    tuner_type = TunerType.DIFFFIT
    target_modules: str | list[str] | None = field(
        default="all", metadata={"help": "all, or module names as PEFT writes them into a saved adapter."}
    )
    projections: list[str] = field(
        default_factory=lambda: list(PROJECTIONS),
        metadata={"help": "Names or endings of the Linear layers of attention; each gets a scale vector after it."},
    )
    block_ends: list[str] = field(
        default_factory=lambda: list(BLOCK_ENDS),
        metadata={
            "help": "Names or endings of the Linear layers that attention and feed-forward end with; each gets a "
            "scale vector for the whole of it, beside that of a projection."
        },
    )

    def scales(self, name: str) -> list[str]:
        """Which scale vectors the layer of that name gets: `scale` of a projection, `block_scale` of a block's end."""
        return [
            part
            for part, ends in (("scale", self.projections), ("block_scale", self.block_ends))
            if f".{name}".endswith(tuple(f".{end}" for end in ends))
        ]


def difffit_parameters(layer: nn.Module) -> list[str]:
    """The names of a layer's own parameters that DiffFit trains: biases, and all of a norm layer."""
    return [name for name, _ in layer.named_parameters(recurse=False) if "bias" in name or is_norm(layer)]


class DiffFitLayer(SelectiveLayer):
    """A layer of DiffFit: y = g·layer(x), where g = 1 + Σ scale·(γ·γ_block − 1) over the adapters.

    Trained, per adapter: `difffit_scale` and `difffit_block_scale`, vectors γ (o,) over the outputs of a Linear layer,
    1 at the start, and copies `difffit_<name>` of biases and norm weights. Multiplying the output of the last layer
    of an attention or feed-forward is multiplying that of the whole: only dropout follows.
    """

    prefix = "difffit_"

    def __init__(self, base_layer, adapter_name):
        super().__init__(base_layer, adapter_name)
        self.difffit_scale = nn.ParameterDict()
        self.difffit_block_scale = nn.ParameterDict()
        self.adapter_layer_names = (*self.adapter_layer_names, "difffit_scale", "difffit_block_scale")

    def trained_names(self, config):
        return difffit_parameters(self.base_layer)

    def update_layer(self, adapter_name, config, name):
        for part in config.scales(name):
            ones = torch.ones(self.base_layer.out_features, device=self.base_layer.weight.device)
            getattr(self, f"difffit_{part}")[adapter_name] = self._new(ones)
        super().update_layer(adapter_name, config, name)

    def factor(self, adapters: list[str]) -> torch.Tensor | None:
        """g (o,) in float32 at least; None where no adapter scales the output."""
        total = None
        for adapter in adapters:
            vectors = [part[adapter] for part in (self.difffit_scale, self.difffit_block_scale) if adapter in part]
            if vectors:
                vectors = [vector.to(mixing_dtype(vector.dtype)) for vector in vectors]
                change = self.scaling[adapter] * (math.prod(vectors[1:], start=vectors[0]) - 1)
                total = 1 + change if total is None else total + change
        return total

    def _adapted(self, active, args, kwargs):
        y, factor = super()._adapted(active, args, kwargs), self.factor(active)
        return y if factor is None else (y * factor).to(y.dtype)

    def merged_values(self, adapters):
        values, factor = self.values(adapters), self.factor(adapters)
        if factor is None:
            return values
        for name, parameter in self.base_layer.named_parameters():
            value = values.get(name, self.original(name).to(mixing_dtype(parameter.dtype)))
            values[name] = value * factor.view(-1, *(1,) * (value.dim() - 1))  # (o, i) or (o,)
        return values


class DiffFitModel(SelectiveModel):
    """The tuner behind `get_peft_model(model, DiffFitConfig())` and `unet.add_adapter(DiffFitConfig())`."""

    prefix = DiffFitLayer.prefix
    tuner_layer_cls = DiffFitLayer

    def layers_of(self, config, target_set):
        if target_set != "all":
            raise ValueError(f"target_modules={target_set!r}: DiffFit has no named set but all")
        names = all_layers(self.model)
        if not any(config.scales(name) for name in names):
            ends = ", ".join((*config.projections, *config.block_ends))
            raise ValueError(f"projections, block_ends: no layer of {type(self.model).__name__} ends with {ends}")
        return [
            name
            for name in names
            if config.scales(name) or difffit_parameters(base_of(self.model.get_submodule(name)))
        ]

    def check_layer(self, config, name, layer):
        if config.scales(name) and type(layer) is not nn.Linear:
            raise ValueError(f"is a {type(layer).__name__}, scale vectors follow Linear")
        parameters = difffit_parameters(layer)
        if not parameters and not config.scales(name):
            raise ValueError("has no bias, no norm and no scale vector")
        check_parameters(name, layer, parameters, self._owners)

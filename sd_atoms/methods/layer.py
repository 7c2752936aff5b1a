"""The layer that our small tuners share: the base layer, computed with other values in place of its parameters."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn
from torch.func import functional_call

from sd_atoms.atoms import mixing_dtype
from sd_atoms.errors import UserError
from sd_atoms.tuner.shared import Strengths, refuse_leaf_offload


class TunedLayer(Strengths, nn.Module, BaseTunerLayer):
    """A layer whose adapters say what its parameters are; the base layer itself computes with them.

    So stride, groups, dilation and padding modes are right whatever they are, and the base is never written to. A
    subclass names its trained parts in `adapter_layer_names`, makes them in `update_layer`, where it ends with
    `_added`, and says in `values` what they mean.
    """

    other_param_names = ("scaling", "initial_scaling")

    def __init__(self, base_layer: nn.Module, adapter_name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.scaling: dict[str, float] = {}
        self.initial_scaling: dict[str, float] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._originals: dict[str, torch.Tensor] = {}  # while merged: parameters, to be put back bit for bit
        self._active_adapter = adapter_name

    def update_layer(self, adapter_name: str, config: PeftConfig, name: str) -> None:
        """Adds an adapter, whose name is not taken, with no change to the layer.

        Args:
            adapter_name: the adapter.
            config: its settings.
            name: of this layer in its model.
        """
        raise NotImplementedError

    def values(self, adapters: Sequence[str]) -> dict[str, torch.Tensor]:
        """Parameter name -> its value under these adapters, scale included; in float32 at least, not yet rounded."""
        raise NotImplementedError

    def merged_values(self, adapters: Sequence[str]) -> dict[str, torch.Tensor]:
        """As `values`, for the layer that needs no adapter any more; they differ where the output is scaled too."""
        return self.values(adapters)

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """What the adapter alone adds to the weight, scale included: shape of the weight, in float32 at least."""
        weight = self.original("weight")
        with _full_precision(weight):
            value = self.merged_values([adapter]).get("weight", weight)
            return value - weight.to(mixing_dtype(weight.dtype))

    def original(self, name: str) -> torch.Tensor:
        """A parameter of the base, detached, also while adapters are merged."""
        kept = self._originals.get(name)
        return getattr(self.base_layer, name).detach() if kept is None else kept

    def _new(self, value: torch.Tensor) -> nn.Parameter:
        """A trained part that starts as `value`, on the base's device: float32 at least, whatever the base is."""
        like = next(self.base_layer.parameters())
        return nn.Parameter(value.detach().to(like.device, mixing_dtype(like.dtype), copy=True))

    def _added(self, adapter_name: str, config: PeftConfig, scale: float = 1.0) -> None:
        self.scaling[adapter_name] = self.initial_scaling[adapter_name] = scale
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The layer with its active adapters; shapes as of the layer."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        active = [name for name in self.active_adapters if name in self.scaling]
        if self.disable_adapters or self.merged or not active:
            return self.base_layer(*args, **kwargs)
        return self._adapted(active, args, kwargs)

    def _adapted(self, active: list[str], args: tuple, kwargs: dict) -> Any:
        refuse_leaf_offload(self.base_layer)
        if next(self.base_layer.parameters()).is_meta:
            raise UserError(
                f"{type(self).__name__}: its layers cannot be computed while their weights are offloaded; use "
                "enable_model_cpu_offload, or fuse the adapter (pipe.fuse_lora()) before offloading"
            )
        with _full_precision(next(self.base_layer.parameters())):
            values = {name: value.to(self.original(name).dtype) for name, value in self.values(active).items()}
        return functional_call(self.base_layer, values, args, kwargs) if values else self.base_layer(*args, **kwargs)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Puts the adapters into the base's parameters, taken in float32 and rounded once.

        The originals are kept until `unmerge`, so that they come back bit for bit.

        Raises:
            ValueError: with `safe_merge`, when a merged parameter is not finite; nothing is changed then.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.scaling]
        if not names:
            return
        with _full_precision(next(self.base_layer.parameters())):
            values = self.merged_values(self.merged_adapters + names)
        if safe_merge and not all(torch.isfinite(value).all() for value in values.values()):
            raise ValueError(
                f"NaNs detected in the merged weights. The adapter {', '.join(names)} seems to be broken (not finite)"
            )
        for name, value in values.items():
            parameter = getattr(self.base_layer, name)
            self._originals.setdefault(name, parameter.data)
            parameter.data = value.to(parameter.dtype, copy=True)
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Puts the original parameters back."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        for name, original in self._originals.items():
            parameter = getattr(self.base_layer, name)
            parameter.data = original.to(parameter)  # which may have been moved and cast meanwhile
        self._originals.clear()
        self.merged_adapters.clear()


class DeltaLayer(TunedLayer):
    """A layer whose adapters each add something to its weight: a subclass says what, in `delta`."""

    def delta(self, adapter: str) -> torch.Tensor:
        """The change of the weight at a scale of 1: shape of the weight, in float32 at least."""
        raise NotImplementedError

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        with _full_precision(self.original("weight")):
            return self.delta(adapter) * self.scaling[adapter]

    def values(self, adapters):
        weight = self.original("weight")
        total = weight.to(mixing_dtype(weight.dtype))
        for adapter in adapters:
            total = total + self.get_delta_weight(adapter)
        return {"weight": total}


def _full_precision(like: torch.Tensor) -> torch.autocast:
    """Autocast would round what is trained to half precision."""
    return torch.autocast(like.device.type, enabled=False)

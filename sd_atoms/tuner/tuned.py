"""The layer and the model that our tuners share, and how PEFT comes to know them."""

import warnings
from collections.abc import Sequence
from typing import Any, ClassVar

import peft.mapping
import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from torch import nn
from torch.func import functional_call

from sd_atoms.atoms import mixing_dtype
from sd_atoms.errors import UserError
from sd_atoms.tuner.shared import base_of, refuse_leaf_offload, refuse_unfit
from sd_atoms.tuner.targets import TARGET_SETS, named_targets


class TunedLayer(nn.Module, BaseTunerLayer):
    """A layer whose adapters say what its parameters are; the base layer itself computes with them.

    So stride, groups, dilation and padding modes are right whatever they are, and the base is never written to. A
    subclass names its trained parts in `adapter_layer_names`, makes them in `update_layer`, where it ends with
    `_added`, and says in `values` what they mean. `AtomsLayer` alone has a `forward` of its own, since it needs no
    effective weight to compute with.
    """

    other_param_names = ("scaling", "initial_scaling")
    cast_input_dtype_enabled = True  # diffusers switches it, as LoRA's, for layer-wise casting; inputs are never cast

    def __init__(self, base_layer: nn.Module, adapter_name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.scaling: dict[str, float] = {}
        self.initial_scaling: dict[str, float] = {}  # what `scaling` is when the strength is set to 1
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
        """Parameter name -> its value under these adapters, scale included; in float32 at least, not yet rounded
        (of atoms rounded once to the base's dtype)."""
        raise NotImplementedError

    def merged_values(self, adapters: Sequence[str]) -> dict[str, torch.Tensor]:
        """As `values`, for the layer that needs no adapter any more; they differ where the output is scaled too."""
        return self.values(adapters)

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """What the adapter alone adds to the weight, scale included: shape of the weight, in float32 at least."""
        weight = self.original("weight")
        with full_precision(weight):
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

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT would also cast to the base's dtype; what is trained stays float32 at least, whatever the base is
        device = next(self.get_base_layer().parameters()).device if device is None else device
        parts = [getattr(self, part) for part in (*self.adapter_layer_names, *self.other_param_names)]
        for own in [held[adapter_name] for held in parts if adapter_name in held]:
            if torch.is_tensor(own) and not own.is_meta:
                own.data = own.data.to(device)

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
        with full_precision(next(self.base_layer.parameters())):
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
        with full_precision(next(self.base_layer.parameters())):
            values = self.merged_values(self.merged_adapters + names)
        if safe_merge and not all(torch.isfinite(value).all() for value in values.values()):
            raise ValueError(
                f"NaNs detected in the merged weights. The adapter {', '.join(names)} seems to be broken (not finite)"
            )
        own = {parameter.data_ptr() for parameter in self.parameters()}  # what is trained must not become the base's
        for name, value in values.items():
            parameter = getattr(self.base_layer, name)
            self._originals.setdefault(name, parameter.data)
            parameter.data = value.to(parameter.dtype, copy=value.data_ptr() in own)
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

    def set_scale(self, adapter: str, scale: float) -> None:
        """Sets the strength of one adapter; one that this layer lacks is passed over, as PEFT does."""
        if adapter in self.scaling:
            self.scaling[adapter] = float(scale) * self.initial_scaling[adapter]

    def scale_layer(self, scale: float) -> None:
        """Multiplies the strength of the active adapters."""
        for name in self.active_adapters:
            if name in self.scaling:
                self.scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Undoes `scale_layer(scale)`; without a scale the active adapters go back to their strength at the start."""
        for name in self.active_adapters:
            if name in self.scaling:
                self.scaling[name] = self.initial_scaling[name] if scale is None else self.scaling[name] / scale


def full_precision(like: torch.Tensor) -> torch.autocast:
    """Autocast would round what is trained to half precision."""
    return torch.autocast(like.device.type, enabled=False)


class TunedModel(BaseTuner):
    """The common part of our tuners; a subclass names its layer and says which layers it takes."""

    tuner_layer_cls: type[TunedLayer]
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}  # named sets stand in for per-architecture defaults

    def check_layer(self, config: PeftConfig, name: str, layer: nn.Module) -> None:
        """Whether `config` can be applied to the layer of that name.

        Raises:
            ValueError: it cannot; the message says why, without the name.
        """

    def layers_of(self, config: PeftConfig, target_set: str) -> list[str]:
        """The names of the modules that a named set means for these settings.

        Raises:
            ValueError: there is none.
        """
        return named_targets(self.model, target_set)

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict) -> PeftConfig:
        target = peft_config.target_modules
        if isinstance(target, str) and target in (*TARGET_SETS, "all"):
            peft_config.target_modules = self.layers_of(peft_config, target)
        self._refuse_unfit_layers(peft_config)
        return peft_config

    def _refuse_unfit_layers(self, config: PeftConfig) -> None:
        """Finds every target that the settings cannot take, before the model is touched."""
        modules, unfit = dict(self.model.named_modules()), []
        for name, module in modules.items():
            # bool(): PEFT answers with a match, or with a falsy object for an excluded module
            if "base_layer" in name.split(".") or not bool(self._check_target_module_exists(config, name)):
                continue
            try:
                self._check_place(modules.get(name.rpartition(".")[0]), module)
                self.check_layer(config, name, base_of(module))
            except ValueError as error:
                unfit.append(f"{name} {error}")
        refuse_unfit("target_modules", unfit)

    def _post_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        if isinstance(config.target_modules, set):  # PEFT shortens long lists to a set, whose order is no order
            config.target_modules = sorted(config.target_modules)

    def _check_place(self, parent: nn.Module | None, module: nn.Module) -> None:
        if isinstance(module, BaseTunerLayer) and not isinstance(module, self.tuner_layer_cls):
            raise ValueError(f"carries an adapter of another kind ({type(module).__name__})")
        if isinstance(parent, nn.MultiheadAttention):
            raise ValueError("is read by its MultiheadAttention, which would pass the adapter over")

    def _new_layer(self, target: nn.Module, adapter_name: str) -> TunedLayer:
        return self.tuner_layer_cls(target, adapter_name)

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, self.tuner_layer_cls):
            for part in (*target.adapter_layer_names, *target.other_param_names):
                if adapter_name in getattr(target, part):  # one of that name is started anew
                    del getattr(target, part)[adapter_name]
            target.update_layer(adapter_name, peft_config, current_key)
            return
        layer = self._new_layer(target, adapter_name)
        layer.update_layer(adapter_name, peft_config, current_key)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)


def register_tuner(config: type[PeftConfig], model: type[BaseTuner], peft_type: str) -> None:
    """Makes PEFT know a tuner by the kind that its configs carry.

    PEFT's own function takes only names of its enum, but every look-up is a dict keyed by strings.
    """
    peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[peft_type] = config
    peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING[peft_type] = model
    peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING[peft_type] = model.prefix

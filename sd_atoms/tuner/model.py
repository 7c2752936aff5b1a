"""Puts atom adapters into a model."""

import zlib
from collections.abc import Sequence
from typing import ClassVar

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from sd_atoms.tuner.combine import add_weighted_adapter
from sd_atoms.tuner.config import AtomsConfig
from sd_atoms.tuner.layer import AtomsConv, AtomsLayer, AtomsLinear
from sd_atoms.tuner.plan import layer_plan
from sd_atoms.tuner.targets import TARGET_SETS, named_targets

ERRORS_SHOWN = 4


class AtomsModel(BaseTuner):
    """The tuner behind `get_peft_model(model, AtomsConfig(...))` and `unet.add_adapter(AtomsConfig(...))`."""

    prefix = "atoms_"
    tuner_layer_cls = AtomsLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}  # named sets stand in for per-architecture defaults

    def _prepare_adapter_config(self, peft_config: AtomsConfig, model_config: dict) -> AtomsConfig:
        if peft_config.target_modules is None:
            peft_config.target_modules = "conv3x3"
        if isinstance(peft_config.target_modules, str) and peft_config.target_modules in TARGET_SETS:
            peft_config.target_modules = named_targets(self.model, peft_config.target_modules)
        self._refuse_unfit_layers(peft_config)
        return peft_config

    def _refuse_unfit_layers(self, config: AtomsConfig) -> None:
        """Finds every target that the settings cannot take, before the model is touched."""
        unfit = []
        for name, module in self.model.named_modules():
            # bool(): PEFT answers with a match, or with a falsy object for an excluded module
            if "base_layer" in name.split(".") or not bool(self._check_target_module_exists(config, name)):
                continue
            try:
                layer_plan(config, name, _base_layer(module))
            except ValueError as error:
                unfit.append(f"{name} {error}")
        if unfit:
            more = f" (and {len(unfit) - ERRORS_SHOWN} more)" if len(unfit) > ERRORS_SHOWN else ""
            raise ValueError(
                f"target_modules: {len(unfit)} layers do not fit: {'; '.join(unfit[:ERRORS_SHOWN])}{more}"
            )

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
        plan = layer_plan(peft_config, current_key, _base_layer(target))
        seed = zlib.crc32(f"{peft_config.seed}:{current_key}".encode())  # layers of one shape do not share their β
        if isinstance(target, AtomsLayer):
            target.update_layer(adapter_name, peft_config, plan, seed)
            return
        kind = AtomsLinear if isinstance(_base_layer(target), nn.Linear) else AtomsConv
        layer = kind(target, adapter_name, peft_config, plan, seed)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def add_weighted_adapter(self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str) -> None:
        """Adds an adapter that is a weighted sum of others; see `sd_atoms.add_weighted_adapter`."""
        add_weighted_adapter(self, adapters, weights, adapter_name)


def _base_layer(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module

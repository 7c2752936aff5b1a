"""Puts atom adapters into a model."""

import zlib
from collections.abc import Sequence
from typing import ClassVar

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from sd_atoms.tuner.combine import add_weighted_adapter
from sd_atoms.tuner.config import AtomsConfig
from sd_atoms.tuner.layer import AtomsConv, AtomsLayer, AtomsLinear
from sd_atoms.tuner.plan import layer_plan
from sd_atoms.tuner.shared import base_of, refuse_unfit_layers
from sd_atoms.tuner.targets import TARGET_SETS, named_targets


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
        refuse_unfit_layers(self, peft_config, lambda name, module: _check(peft_config, name, module))
        return peft_config

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
        plan = layer_plan(peft_config, current_key, base_of(target))
        seed = zlib.crc32(f"{peft_config.seed}:{current_key}".encode())  # layers of one shape do not share their β
        if isinstance(target, AtomsLayer):
            target.update_layer(adapter_name, peft_config, plan, seed)
            return
        kind = AtomsLinear if isinstance(base_of(target), nn.Linear) else AtomsConv
        layer = kind(target, adapter_name, peft_config, plan, seed)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def add_weighted_adapter(self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str) -> None:
        """Adds an adapter that is a weighted sum of others; see `sd_atoms.add_weighted_adapter`."""
        add_weighted_adapter(self, adapters, weights, adapter_name)


def _check(config: AtomsConfig, name: str, module: nn.Module) -> None:
    if isinstance(module, BaseTunerLayer) and not isinstance(module, AtomsLayer) and module._get_available_adapters():
        raise ValueError(f"carries an adapter of another kind ({type(module).__name__})")
    layer_plan(config, name, base_of(module))

"""Puts atom adapters into a model."""

from typing import ClassVar

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from sd_atoms.atoms import taps
from sd_atoms.tuner.config import AtomsConfig
from sd_atoms.tuner.layer import AtomsConv2d, AtomsLayer
from sd_atoms.tuner.targets import TARGET_SETS, conv_targets


class AtomsModel(BaseTuner):
    """The tuner behind `get_peft_model(model, AtomsConfig(...))` and `unet.add_adapter(AtomsConfig(...))`."""

    prefix = "atoms_"
    tuner_layer_cls = AtomsLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}  # named sets stand in for per-architecture defaults

    def _prepare_adapter_config(self, peft_config: AtomsConfig, model_config: dict) -> AtomsConfig:
        if peft_config.target_modules is None:
            peft_config.target_modules = "conv3x3"
        if isinstance(peft_config.target_modules, str) and peft_config.target_modules in TARGET_SETS:
            peft_config.target_modules = conv_targets(self.model, peft_config.target_modules)
        self._refuse_unfit_layers(peft_config)
        return peft_config

    def _refuse_unfit_layers(self, config: AtomsConfig) -> None:
        """Finds every target that the settings cannot take, before the model is touched."""
        unfit = []
        for name, module in self.model.named_modules():
            # bool(): PEFT answers with a match, or with a falsy object for an excluded module
            if "base_layer" in name.split(".") or not bool(self._check_target_module_exists(config, name)):
                continue
            layer = module.get_base_layer() if hasattr(module, "get_base_layer") else module
            if type(layer) is not nn.Conv2d:
                unfit.append(f"{name} is a {type(layer).__name__}, atoms take Conv2d")
            elif config.m > taps(layer.weight):
                unfit.append(f"{name} has filters of {taps(layer.weight)} taps, fewer than m={config.m}")
        if unfit:
            more = f" (and {len(unfit) - 4} more)" if len(unfit) > 4 else ""
            raise ValueError(f"target_modules: {len(unfit)} layers do not fit: {'; '.join(unfit[:4])}{more}")

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
        if isinstance(target, AtomsLayer):
            target.update_layer(adapter_name, peft_config)
            return
        layer = AtomsConv2d(target, adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

"""Puts our tuners into a model, and makes PEFT know them."""

from typing import ClassVar

import peft.mapping
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from sd_atoms.tuner.shared import base_of, refuse_unfit
from sd_atoms.tuner.targets import TARGET_SETS, named_targets


class TunedModel(BaseTuner):
    """The common part of our tuners; a subclass names its layer and says which layers it takes."""

    tuner_layer_cls: type[BaseTunerLayer]
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

    def _new_layer(self, target: nn.Module, adapter_name: str) -> BaseTunerLayer:
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

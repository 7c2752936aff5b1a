"""Puts atom adapters into a model."""

from collections.abc import Sequence

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from sd_atoms.tuner.combine import add_weighted_adapter
from sd_atoms.tuner.layer import AtomsConv, AtomsLayer, AtomsLinear
from sd_atoms.tuner.plan import layer_plan
from sd_atoms.tuner.shared import base_of
from sd_atoms.tuner.tuned import TunedModel


class AtomsModel(TunedModel):
    """The tuner behind `get_peft_model(model, AtomsConfig(...))` and `unet.add_adapter(AtomsConfig(...))`."""

    prefix = "atoms_"
    tuner_layer_cls = AtomsLayer

    def check_layer(self, config, name, layer):
        layer_plan(config, name, layer)

    def _prepare_adapter_config(self, peft_config, model_config):
        if peft_config.target_modules is None:
            peft_config.target_modules = "conv3x3"
        return super()._prepare_adapter_config(peft_config, model_config)

    def _check_place(self, parent, module):
        if not isinstance(module, BaseTunerLayer) or module._get_available_adapters():  # not around an empty one
            super()._check_place(parent, module)

    def _new_layer(self, target, adapter_name):
        kind = AtomsLinear if isinstance(base_of(target), nn.Linear) else AtomsConv
        return kind(target, adapter_name)

    def add_weighted_adapter(self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str) -> None:
        """Adds an adapter that is a weighted sum of others; see `sd_atoms.add_weighted_adapter`."""
        add_weighted_adapter(self, adapters, weights, adapter_name)

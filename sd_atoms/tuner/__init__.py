"""Filter atoms as a PEFT tuner: `import sd_atoms.tuner` makes PEFT know `AtomsConfig`."""

from sd_atoms.tuner.combine import add_weighted_adapter
from sd_atoms.tuner.config import PEFT_TYPE, AtomsConfig
from sd_atoms.tuner.layer import AtomsConv, AtomsLayer, AtomsLinear
from sd_atoms.tuner.model import AtomsModel
from sd_atoms.tuner.plan import LayerPlan, layer_plan
from sd_atoms.tuner.swap import check_swap, swap_adapter
from sd_atoms.tuner.targets import TARGET_SETS, named_targets
from sd_atoms.tuner.tuned import register_tuner

register_tuner(AtomsConfig, AtomsModel, PEFT_TYPE)

__all__ = [
    "TARGET_SETS",
    "AtomsConfig",
    "AtomsConv",
    "AtomsLayer",
    "AtomsLinear",
    "AtomsModel",
    "LayerPlan",
    "add_weighted_adapter",
    "check_swap",
    "layer_plan",
    "named_targets",
    "swap_adapter",
]

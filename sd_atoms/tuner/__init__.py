"""Filter atoms as a PEFT tuner: `import sd_atoms.tuner` makes PEFT know `AtomsConfig`.

PEFT's registration function accepts only names of its own enum, but every look-up is a dict keyed by strings, so
three entries are all it takes.
"""

import peft.mapping

from sd_atoms.tuner.combine import add_weighted_adapter
from sd_atoms.tuner.config import PEFT_TYPE, AtomsConfig
from sd_atoms.tuner.layer import AtomsConv, AtomsLayer, AtomsLinear
from sd_atoms.tuner.model import AtomsModel
from sd_atoms.tuner.plan import LayerPlan, layer_plan
from sd_atoms.tuner.swap import check_swap, swap_adapter
from sd_atoms.tuner.targets import TARGET_SETS, named_targets

peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] = AtomsConfig
peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING[PEFT_TYPE] = AtomsModel
peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING[PEFT_TYPE] = AtomsModel.prefix

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

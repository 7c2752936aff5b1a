"""The ways of training: PEFT tuners of ours beside filter atoms, and the registry of all methods.

Importing this package makes PEFT know `SelectiveConfig`, `DiffFitConfig`, `LoraConvConfig`, `LycorisConfig` and
`ImportedConfig`.
"""

from sd_atoms.methods.difffit import DiffFitConfig, DiffFitModel
from sd_atoms.methods.imported import ImportedConfig, ImportedModel
from sd_atoms.methods.lora_conv import LoraConvConfig, LoraConvModel
from sd_atoms.methods.lycoris import LycorisConfig, LycorisModel
from sd_atoms.methods.method import KINDS, Method, Sized, find_budget
from sd_atoms.methods.registry import all_methods, check_settings, from_peft_config, get_method
from sd_atoms.methods.selective import SelectiveConfig, SelectiveModel
from sd_atoms.tuner.config import TunerType
from sd_atoms.tuner.tuned import register_tuner

register_tuner(SelectiveConfig, SelectiveModel, TunerType.SELECTIVE.value)
register_tuner(DiffFitConfig, DiffFitModel, TunerType.DIFFFIT.value)
register_tuner(LoraConvConfig, LoraConvModel, TunerType.LORA_CONV.value)
register_tuner(LycorisConfig, LycorisModel, TunerType.LYCORIS.value)
register_tuner(ImportedConfig, ImportedModel, TunerType.IMPORTED.value)

__all__ = [
    "KINDS",
    "DiffFitConfig",
    "ImportedConfig",
    "LoraConvConfig",
    "LycorisConfig",
    "Method",
    "SelectiveConfig",
    "Sized",
    "all_methods",
    "check_settings",
    "find_budget",
    "from_peft_config",
    "get_method",
]

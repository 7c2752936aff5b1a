"""LoCon, LoHa and LoKr of LyCORIS (arXiv 2309.14859) as one PEFT tuner.

The maths is that of `lycoris.functional`; its wrapper, which patches modules and merges them its own way, is not used.
LyCORIS is imported when a layer is made, since that takes seconds.
"""

import importlib
from dataclasses import dataclass, field
from types import ModuleType

import torch
from torch import nn

from sd_atoms.atoms import mixing_dtype
from sd_atoms.methods.config import RankConfig
from sd_atoms.methods.layer import DeltaLayer
from sd_atoms.tuner.config import TunerType, is_count
from sd_atoms.tuner.plan import CONVOLUTIONS
from sd_atoms.tuner.tuned import TunedModel

# What `lycoris.functional` takes, in its order, by the names in LyCORIS' files (there with lora_, hada_ or lokr_).
PARTS = {
    "locon": ("down", "up", "mid"),
    "loha": ("w1_b", "w1_a", "w2_b", "w2_a", "t1", "t2"),
    "lokr": ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2"),
}
_IMPORTED: dict[str, ModuleType] = {}
ALL_PARTS = tuple(f"lycoris_{part}" for part in dict.fromkeys(part for parts in PARTS.values() for part in parts))


@dataclass
class LycorisConfig(RankConfig):
    """Settings of a LyCORIS adapter; o × i·K is the weight as a matrix.

    Raises:
        ValueError: a setting is out of range; the message lists every such setting.
    """

    tuner_type = TunerType.LYCORIS
    algo: str = field(
        default="locon",
        metadata={
            "help": "locon: up·down, r·(o + i·K) numbers; loha: the product, entry by entry, of two such; lokr: a "
            "Kronecker product, one side of low rank."
        },
    )
    factor: int = field(
        default=-1,
        metadata={
            "help": "Of lokr: the smaller side of the Kronecker product, -1 for as near to a square as can be. "
            "Larger means fewer numbers."
        },
    )

    def problems(self):
        wrong = super().problems()
        if self.algo not in PARTS:
            wrong.append(f"algo={self.algo!r}: one of {', '.join(PARTS)} is allowed")
        if self.factor != -1 and not is_count(self.factor, 1):
            wrong.append(f"factor={self.factor!r}: -1 or an integer from 1 on is allowed")
        if self.factor != -1 and self.algo in ("locon", "loha"):
            wrong.append(f"factor={self.factor!r}: {self.algo} has none, only lokr has")
        return wrong


class LycorisLayer(DeltaLayer):
    """A convolution or Linear layer. Trained, per adapter: `lycoris_<part>` for the parts of its algo in PARTS."""

    adapter_layer_names = ALL_PARTS
    other_param_names = (*DeltaLayer.other_param_names, "algo")

    def __init__(self, base_layer, adapter_name):
        super().__init__(base_layer, adapter_name)
        self.algo: dict[str, str] = {}
        for part in ALL_PARTS:
            setattr(self, part, nn.ParameterDict())

    def update_layer(self, adapter_name, config, name):
        weight = self.original("weight")
        options = {"factor": config.factor} if config.algo == "lokr" else {}
        if config.algo != "lokr":  # these know matrices, and convolutions in Tucker's form alone
            weight = weight.flatten(1)
        with torch.device("meta" if weight.is_meta else "cpu"):  # drawn alike whatever the device
            made = _functional(config.algo).weight_gen(weight, config.r, tucker=False, **options)
        for part, value in zip(PARTS[config.algo], made, strict=True):
            if value is not None:
                getattr(self, f"lycoris_{part}")[adapter_name] = self._new(value)
        self.algo[adapter_name] = config.algo
        # as LyCORIS has it: where no factor of lokr has a rank, alpha counts for nothing
        ranked = config.algo != "lokr" or adapter_name in self.lycoris_w2_a
        self._added(adapter_name, config, config.scale if ranked else 1.0)

    def delta(self, adapter):
        """up·down, (w1_a·w1_b)∘(w2_a·w2_b) or w1 ⊗ (w2 or w2_a·w2_b), in the shape of the weight."""
        weight, algo = self.original("weight"), self.algo[adapter]
        dtype = mixing_dtype(weight.dtype)
        dicts = [getattr(self, f"lycoris_{part}") for part in PARTS[algo]]
        parts = [values[adapter].to(dtype) if adapter in values else None for values in dicts]
        # lokr divides gamma by its rank; the other two multiply by it; loha wants a tensor
        unit = len(self.lycoris_w2_b[adapter]) if parts[-2] is not None and algo == "lokr" else 1
        gamma = torch.tensor(float(unit), dtype=dtype, device=weight.device) if algo == "loha" else float(unit)
        # in plain torch: other backends, which it picks by machine and call, round differently
        change = _functional(algo).diff_weight(*parts, gamma=gamma, backend="torch")
        return change.reshape(weight.shape)


class LycorisModel(TunedModel):
    """The tuner behind `get_peft_model(model, LycorisConfig(...))` and `unet.add_adapter(LycorisConfig(...))`."""

    prefix = "lycoris_"
    tuner_layer_cls = LycorisLayer

    def check_layer(self, config, name, layer):
        if type(layer) not in (*CONVOLUTIONS, nn.Linear):
            raise ValueError(f"is a {type(layer).__name__}, LyCORIS takes Conv1d, Conv2d, Conv3d and Linear")


def _functional(algo: str) -> ModuleType:
    if algo not in _IMPORTED:  # torch.compile follows a look-up, not an import
        _IMPORTED[algo] = importlib.import_module(f"lycoris.functional.{algo}")
    return _IMPORTED[algo]

"""The settings of a filter-atom adapter, and what those of our other tuners share with them."""

from dataclasses import dataclass, field
from enum import Enum
from typing import ClassVar

from peft import PeftConfig

from sd_atoms.atoms import FORMS

PEFT_TYPE = "FILTER_ATOMS"
SOLVERS = ("svd", "sparse")
BLOCK_LAYERS = ("pointwise", "all")


class TunerType(str, Enum):
    """PEFT's own kinds are strings of such an enum, and its callers ask for their `value`."""

    FILTER_ATOMS = PEFT_TYPE
    SELECTIVE = "SELECTIVE"
    DIFFFIT = "DIFFFIT"
    LORA_CONV = "LORA_CONV"
    LYCORIS = "LYCORIS"
    IMPORTED = "IMPORTED"


@dataclass
class TargetConfig(PeftConfig):
    """Which layers are tuned: what the settings of our tuners have in common.

    Raises:
        ValueError: a setting is out of range; the message lists every such setting.
    """

    tuner_type: ClassVar[TunerType | None] = None
    target_modules: str | list[str] | None = field(
        default=None,
        metadata={
            "help": "A named set (conv3x3, conv, conv+linear, attn, all-linear), a list of module names or endings, "
            "or a regular expression."
        },
    )
    exclude_modules: str | list[str] | None = field(
        default=None, metadata={"help": "Modules to leave out, as in `target_modules` (no named sets)."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Further modules to train and save in full, such as a new classifier head."}
    )

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = self.tuner_type or self.peft_type
        wrong = self.problems()
        if wrong:
            raise ValueError("; ".join(wrong))
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, (list, tuple, set)):
                setattr(self, name, sorted(value))  # a saved config must not depend on the order of a set

    def problems(self) -> list[str]:
        """What is wrong with the settings, one line each."""
        return []


@dataclass
class AtomsConfig(TargetConfig):
    """Settings of a filter-atom adapter (arXiv 2403.00269, section 3).

    The modes of the paper: D is the default; (β, D1) is `m1=3`; D_c is `kc=4` (with `m=0, block_layers="all"` also
    on k×k convolutions, in place of D); (β, D1) + D_c is `m1=3, kc=4`.

    Raises:
        ValueError: a setting is out of range; the message lists every such setting.
    """

    tuner_type = TunerType.FILTER_ATOMS
    m: int = field(
        default=9,  # 9 atoms of a 3×3 filter are exact, so the adapter can move every tap: 81 numbers a layer
        metadata={
            "help": "Atoms per layer, 1 to K with the svd solver (9 for 3×3). Fewer atoms: a smaller adapter, a "
            "coarser change. 0: none, only block atoms."
        },
    )
    m1: int = field(
        default=0,
        metadata={"help": "Overcomplete atoms: each atom of an input channel mixes m1 trained ones; 0: one for all."},
    )
    train_beta: bool = field(
        default=True,
        metadata={"help": "Train β, the mixing of overcomplete atoms, too. If not, it is drawn from seed, not saved."},
    )
    kc: int = field(
        default=0,
        metadata={
            "help": "Block atoms over kc×kc channels, for 1×1 convolutions and Linear layers (see block_layers); "
            "0: none. On a side that kc does not divide blocks are 1 wide."
        },
    )
    m_c: int = field(
        default=0,  # exact, so that a layer's block change is any kc·kc·K square matrix
        metadata={"help": "A layer has m_c·kc² block atoms of kc²·K entries; 0: K, which is exact."},
    )
    block_layers: str = field(
        default="pointwise",
        metadata={"help": "Which layers get block atoms: pointwise (K = 1; they then have no others) or all."},
    )
    solver: str = field(default="svd", metadata={"help": f"How the initial atoms are found: {', '.join(SOLVERS)}."})
    l1: float = field(
        default=1e-3,  # the authors' value
        metadata={"help": "Sparsity λ of the sparse solver."},
    )
    seed: int = field(default=0, metadata={"help": "Of the sparse solver's sample and of β."})
    target_modules: str | list[str] | None = field(
        default="conv3x3",  # where 63 % of the weights of SD v1-4's UNet are
        metadata=TargetConfig.__dataclass_fields__["target_modules"].metadata,
    )
    m_pattern: dict[str, int] = field(
        default_factory=dict,
        metadata={
            "help": "Module name, ending or regular expression -> atoms there instead of m (of m_c on a layer with "
            "block atoms alone), as PEFT's rank_pattern."
        },
    )
    scale_pattern: dict[str, float] = field(
        default_factory=dict,
        metadata={"help": "Module name, ending or regular expression -> strength of the adapter there, instead of 1."},
    )
    form: str = field(
        default="auto",
        metadata={"help": f"How the convolution is computed: {', '.join(FORMS)}. All give the same numbers."},
    )
    init_weights: bool = field(
        default=True,
        metadata={"help": "Start without any change. False: with a random one, for tests."},
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Only the layers of these numbers, as in PEFT's other methods."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the list that layers_to_transform counts in."}
    )

    def problems(self):
        wrong = [
            f"{name}={getattr(self, name)!r}: an integer from 0 on is allowed"
            for name in ("m", "m1", "kc", "m_c", "seed")
            if not is_count(getattr(self, name))
        ]
        if not wrong and not self.m and not self.kc:
            wrong.append("m=0, kc=0: no atoms at all; m=0 needs block atoms (kc from 1 on)")
        for name, allowed in (("solver", SOLVERS), ("form", FORMS), ("block_layers", BLOCK_LAYERS)):
            if getattr(self, name) not in allowed:
                wrong.append(f"{name}={getattr(self, name)!r}: one of {', '.join(allowed)} is allowed")
        if not isinstance(self.l1, (int, float)) or not 0 <= self.l1 < float("inf"):
            wrong.append(f"l1={self.l1!r}: a number from 0 on is allowed")
        wrong += [
            f"m_pattern[{key!r}]={value!r}: an integer from 1 on is allowed"
            for key, value in self.m_pattern.items()
            if not is_count(value, 1)
        ]
        wrong += [
            f"scale_pattern[{key!r}]={value!r}: a number is allowed"
            for key, value in self.scale_pattern.items()
            if isinstance(value, bool) or not isinstance(value, (int, float))
        ]
        if self.layers_pattern and self.layers_to_transform is None:
            wrong.append("layers_pattern needs layers_to_transform")
        return wrong


def is_count(value: object, least: int = 0) -> bool:
    """Whether a value is an integer from `least` on."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least

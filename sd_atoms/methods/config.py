"""What the settings of our small tuners have in common."""

from dataclasses import dataclass, field
from enum import Enum

from peft import PeftConfig

from sd_atoms.tuner.config import is_count


class TunerType(str, Enum):
    """PEFT's own kinds are strings of such an enum, and its callers ask for their `value`."""

    SELECTIVE = "SELECTIVE"
    DIFFFIT = "DIFFFIT"
    LORA_CONV = "LORA_CONV"
    LYCORIS = "LYCORIS"
    IMPORTED = "IMPORTED"


@dataclass
class TargetConfig(PeftConfig):
    """Which layers are tuned.

    Raises:
        ValueError: a setting is out of range; the message lists every such setting.
    """

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
class RankConfig(TargetConfig):
    """Settings of low-rank tuners: the change is scaled by alpha/r."""

    target_modules: str | list[str] | None = field(
        default="conv3x3", metadata=TargetConfig.__dataclass_fields__["target_modules"].metadata
    )
    r: int = field(default=4, metadata={"help": "Rank: larger means more trained numbers and richer changes."})
    alpha: float | None = field(
        default=None, metadata={"help": "The change is multiplied by alpha/r; None: alpha = r, which multiplies by 1."}
    )

    def problems(self):
        wrong = []
        if not is_count(self.r, 1):
            wrong.append(f"r={self.r!r}: an integer from 1 on is allowed")
        if self.alpha is not None and (isinstance(self.alpha, bool) or not isinstance(self.alpha, (int, float))):
            wrong.append(f"alpha={self.alpha!r}: a number is allowed, or None for alpha = r")
        return wrong

    @property
    def scale(self) -> float:
        """alpha/r."""
        return 1.0 if self.alpha is None else self.alpha / self.r

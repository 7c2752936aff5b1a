"""What the settings of low-rank tuners have in common."""

from dataclasses import dataclass, field

from sd_atoms.tuner.config import TargetConfig, is_count


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

"""The settings of a filter-atom adapter."""

from dataclasses import dataclass, field

from peft import PeftConfig

from sd_atoms.atoms import FORMS

PEFT_TYPE = "FILTER_ATOMS"
SOLVERS = ("svd",)


@dataclass
class AtomsConfig(PeftConfig):
    """Settings of a filter-atom adapter (arXiv 2403.00269, section 3).

    Raises:
        ValueError: a setting is out of range; the message lists every such setting.
    """

    m: int = field(
        default=9,  # 9 atoms of a 3×3 filter are exact, so the adapter can move every tap: 81 numbers a layer
        metadata={"help": "Atoms per layer, 1 to K (9 for 3×3). Fewer atoms: a smaller adapter, a coarser change."},
    )
    solver: str = field(default="svd", metadata={"help": f"How the initial atoms are found: {', '.join(SOLVERS)}."})
    target_modules: str | list[str] | None = field(
        default="conv3x3",  # where 63 % of the weights of SD v1-4's UNet are
        metadata={"help": "A named set (conv3x3, conv), a list of module names or endings, or a regular expression."},
    )
    exclude_modules: str | list[str] | None = field(
        default=None, metadata={"help": "Modules to leave out, as in `target_modules` (no named sets)."}
    )
    form: str = field(
        default="auto",
        metadata={"help": f"How the convolution is computed: {', '.join(FORMS)}. All give the same numbers."},
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Further modules to train and save in full, such as a new classifier head."}
    )

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        wrong = []
        if isinstance(self.m, bool) or not isinstance(self.m, int) or self.m < 1:
            wrong.append(f"m={self.m!r}: an integer from 1 on is allowed")
        if self.solver not in SOLVERS:
            wrong.append(f"solver={self.solver!r}: one of {', '.join(SOLVERS)} is allowed")
        if self.form not in FORMS:
            wrong.append(f"form={self.form!r}: one of {', '.join(FORMS)} is allowed")
        if wrong:
            raise ValueError("; ".join(wrong))
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, (list, tuple, set)):
                setattr(self, name, sorted(value))  # a saved config must not depend on the order of a set

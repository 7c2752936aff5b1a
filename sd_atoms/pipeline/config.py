"""The settings of an adapter between a file and PEFT."""

from collections.abc import Mapping
from dataclasses import fields
from enum import Enum
from pathlib import Path
from typing import Any

import peft.mapping
from peft import PeftConfig

from sd_atoms.errors import UserError
from sd_atoms.methods import all_methods
from sd_atoms.methods.adapters import one_line
from sd_atoms.tuner import AtomsConfig
from sd_atoms.tuner.config import PEFT_TYPE

UNET = "unet"
# settings of atoms that matter once they are trained
CONFIG_KEYS = (
    "m", "m1", "train_beta", "kc", "m_c", "block_layers", "solver", "l1", "seed", "m_pattern", "scale_pattern", "form",
)  # fmt: skip
# how an adapter starts, and what PEFT notes beside the settings
OF_NO_MATTER = ("init_", "inference_mode", "task_type", "auto_mapping", "base_model_name_or_path", "revision",
                "peft_version", "peft_type")  # fmt: skip


def peft_config(where: Path | str, settings: Mapping[str, Any]) -> PeftConfig:
    """The config that settings stand for, of whatever tuner PEFT knows; for an adapter that is not trained further.

    Raises:
        UserError: there is no such tuner, or PEFT refuses the settings; one line that begins with `where`.
    """
    kind, known = settings.get("peft_type"), _known()
    if kind not in known:
        all_methods()  # a package that brings a method makes PEFT know its tuner when it is imported
        known = _known()
    if kind not in known:
        raise UserError(f"{where}: peft_type is {kind!r}; one of {', '.join(known)} is allowed")
    allowed = CONFIG_KEYS if kind == PEFT_TYPE else [field.name for field in fields(known[kind]) if field.init]
    own = {key: value for key, value in settings.items() if key in allowed and not key.startswith(OF_NO_MATTER)}
    try:
        return known[kind](**own, inference_mode=True)
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{where}: {one_line(error)}") from error


def _known() -> dict[str, type[PeftConfig]]:
    """peft_type -> its config, of all tuners that PEFT knows by now."""
    return {str(getattr(name, "value", name)): made for name, made in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING.items()}


def plain_settings(config: PeftConfig) -> dict[str, Any]:
    """The same as JSON has it, in an order that does not depend on that of sets."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(key): plain(own) for key, own in value.items()}
        if isinstance(value, (set, frozenset)):
            return sorted(map(plain, value))
        if isinstance(value, (list, tuple)):
            return [plain(own) for own in value]
        return value.value if isinstance(value, Enum) else value

    return plain(config.to_dict())


def kept_settings(config: PeftConfig) -> dict[str, Any]:
    """What a header says of an adapter: of atoms what matters once they are trained, of others all."""
    if isinstance(config, AtomsConfig):
        return {"peft_type": PEFT_TYPE, **{key: getattr(config, key) for key in CONFIG_KEYS}}
    return plain_settings(config)

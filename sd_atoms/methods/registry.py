"""Which methods there are: ours, those of other packages, and any tuner of PEFT by its config."""

import copy
import json
from collections.abc import Iterable
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

import peft.mapping
from peft import PeftConfig

from sd_atoms.errors import UserError
from sd_atoms.methods.adapters import one_line
from sd_atoms.methods.method import Method, resolved_target
from sd_atoms.methods.table import METHODS, refuse_wrong_layers
from sd_atoms.tuner.config import TunerType

ENTRY_POINTS = "sd_atoms.methods"


def all_methods() -> dict[str, Method]:
    """Name -> method, ours first, then those of the entry point group `sd_atoms.methods` of other packages.

    Raises:
        UserError: one of those cannot be loaded, is no `Method`, or has a name that is taken.
    """
    found = dict(METHODS)
    for entry in entry_points(group=ENTRY_POINTS):
        method = _load(entry)
        if method.name in found:
            raise UserError(f"entry point {entry.name} = {entry.value}: there is a method {method.name!r} already")
        found[method.name] = method
    return found


def _load(entry: EntryPoint) -> Method:
    try:
        method = entry.load()
    except Exception as error:  # whatever the other package does at import
        raise UserError(f"entry point {entry.name} = {entry.value}: cannot be loaded ({one_line(error)})") from error
    if not isinstance(method, Method):
        raise UserError(f"entry point {entry.name} = {entry.value}: is a {type(method).__name__}, not a Method")
    return method


def get_method(name: str) -> Method:
    """The method of that name.

    Raises:
        UserError: there is none.
    """
    found = all_methods()
    if name not in found:
        raise UserError(f"method={name!r}: one of {', '.join(found)} is allowed")
    return found[name]


def check_settings(method: Method, given: Iterable[str]) -> list[str]:
    """What is wrong with a choice of flags: one line for each that is only other methods'.

    Args:
        method: the chosen one.
        given: names of the flags that somebody set; names that no method has are passed over.
    """
    owners = {}
    for other in all_methods().values():
        for name in other.settings:
            owners.setdefault(name, []).append(other.name)
    has = f"it has {', '.join(method.settings)}" if method.settings else "it has none"
    return [
        f"{name}: a setting of {', '.join(owners[name])}, not of method {method.name}; {has}"
        for name in given
        if name in owners and name not in method.settings
    ]


def from_peft_config(path: str | Path) -> Method:
    """Any tuner of PEFT as a method, by an `adapter_config.json` as PEFT writes it.

    Its parameters are all of the kind `lora`, and it has no default rate. What it computes, at the start too, is what
    its config says: FourierFT, for one, starts with no change only by `"init_weights": true`.

    Args:
        path: the file, or the folder it is in.

    Raises:
        UserError: the file cannot be read, or PEFT refuses it; one line.
    """
    path = Path(path)
    path = path / "adapter_config.json" if path.is_dir() else path
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or one_line(error)})") from error
    known = [str(getattr(kind, "value", kind)) for kind in peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING]
    kind = values.pop("peft_type", None) if isinstance(values, dict) else None
    if kind not in known:
        raise UserError(f"{path}: peft_type={kind!r}: one of {', '.join(known)} is allowed")
    if kind in TunerType.__members__:
        raise UserError(f"{path}: peft_type={kind!r} has a method of its own; see --method")
    try:
        config = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[kind](**{**values, "inference_mode": False})
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: {one_line(error)}") from error
    if getattr(config, "bias", "none") != "none":
        raise UserError(f"{path}: bias={config.bias!r}: only 'none' is allowed, the base itself is never trained")
    return Method(
        name=f"peft-{kind.lower()}",
        help=f"{kind} of PEFT, by {path.name}",
        build=lambda model, settings, target: _of_peft(model, config),
        kind=lambda name: "lora",
        main_kinds=("lora",),
        linear=False,  # some are not, and their configs do not say
    )


def _of_peft(model, config: PeftConfig) -> PeftConfig:
    config = copy.deepcopy(config)
    if getattr(config, "target_modules", None):
        config.target_modules = resolved_target(model, config.target_modules)
        refuse_wrong_layers(model, config)
    return config

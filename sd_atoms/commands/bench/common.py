"""What the benchmarks have in common."""

from dataclasses import dataclass
from typing import Any

from sd_atoms.files import check_outputs, write_json
from sd_atoms.machine import usable_cores
from sd_atoms.settings import section, setting

WHAT, HOW = "what is measured", "how"


@dataclass(frozen=True)
class Common:
    """What all have."""

    threads: int | None = setting(None, HOW, "CPU threads; none = all cores", low=1)
    json: str | None = setting(None, HOW, "also write the numbers to this file")
    overwrite: bool = setting(False, HOW, "replace that file where it exists")


@dataclass(frozen=True)
class Timing:
    """What those have that time something."""

    rounds: int = setting(3, HOW, "how often all is measured", low=1)
    common: Common = section(Common)


@dataclass(frozen=True)
class Device:
    """Where it runs."""

    device: str = setting("cpu", HOW, "where it runs", choices=("cpu", "cuda"))
    dtype: str = setting("fp32", HOW, "of the weights", choices=("fp32", "bf16", "fp16"))


@dataclass(frozen=True)
class Architecture:
    """The UNet that is measured."""

    arch: str = setting("sd-v1-4", WHAT, "the UNet", choices=("sd-v1-4", "pocket"))


@dataclass(frozen=True)
class Workload:
    """What goes through it."""

    resolution: int = setting(256, WHAT, "pixels", low=1)
    batch_size: int = setting(1, WHAT, "pictures at once", low=1)


def started(common: Common, **outputs: str | None) -> int:
    """The threads to run with.

    Raises:
        UserError: a file of results, the JSON or one of `outputs` (flag -> path), exists or cannot be written.
    """
    check_outputs(common.overwrite, json=common.json, **outputs)
    return common.threads or usable_cores()


def tell(text: str, result: dict[str, Any], common: Common) -> None:
    """Prints a table and writes the JSON file asked for."""
    print(text)
    if common.json:
        write_json(common.json, result)

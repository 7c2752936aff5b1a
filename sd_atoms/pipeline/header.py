"""What an adapter file says of its making: written at the end of a training, read wherever an adapter is used.

The header is a JSON object beside the tensors. `artefact` adds what it needs to read them (format, config, layers);
the entries here are for people and for drawing: base, tokens and the words they started from, instance prompt,
resolution, sampling, and how the training went. Local paths never enter it.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sd_atoms.errors import UserError
from sd_atoms.pipeline.sampling import SAMPLERS, Sampling
from sd_atoms.settings import read_yaml
from sd_atoms.sources import is_hub_id, packaged_path, public_name


@dataclass(frozen=True)
class Header:
    """The entries about an adapter's making.

    method: the name of what was trained. base: packaged name, hub id, or the last part of a local path. tokens:
    placeholder -> the word it started from. sampling: how its images were drawn, at the resolution of the training.
    training: images, steps, images per step, learning rate, seed.
    """

    method: str = "atoms"
    base: str | None = None
    tokens: Mapping[str, str] = field(default_factory=dict)
    instance_prompt: str | None = None
    sampling: Sampling = Sampling()
    training: Mapping[str, Any] = field(default_factory=dict)

    def entries(self) -> dict[str, Any]:
        """The JSON object."""
        sampling = asdict(self.sampling)
        return ({} if self.method == "atoms" else {"method": self.method}) | {
            "base": None if self.base is None else public_name(self.base),
            "tokens": dict(self.tokens),
            "instance_prompt": self.instance_prompt,
            "resolution": sampling.pop("resolution"),
            "sampling": sampling,
            "training": dict(self.training),
        }


def parse_header(adapter: str, about: Mapping[str, Any]) -> Header:
    """The header of an adapter; what it leaves out is as usual.

    Raises:
        UserError: it says something that cannot be.
    """
    base, tokens, sampling = about.get("base"), about.get("tokens", {}), about.get("sampling", {})
    method = about.get("method", "atoms")
    problem, made = None, Sampling()
    if base is not None and not isinstance(base, str):
        problem = "base"
    elif not isinstance(method, str):
        problem = "method"
    elif not isinstance(tokens, dict) or not all(isinstance(word, str) for word in tokens.values()):
        problem = "tokens"
    elif not isinstance(sampling, dict) or not sampling.keys() <= asdict(Sampling()).keys():
        problem = "sampling"
    else:
        made = Sampling(**{**sampling, "resolution": about.get("resolution")})
        fitting = {
            "guidance_scale": type(made.guidance_scale) in (int, float) and 0 <= made.guidance_scale < math.inf,
            "num_inference_steps": type(made.num_inference_steps) is int and 1 <= made.num_inference_steps <= 1000,
            "scheduler": made.scheduler in SAMPLERS,
            "resolution": made.resolution is None or (type(made.resolution) is int and 32 <= made.resolution <= 4096),
        }
        problem = next((name for name, fits in fitting.items() if not fits), None)
    if problem is not None:
        raise UserError(f"{adapter}: corrupt, its header says nothing sensible about {problem}")
    return Header(method, base, tokens, about.get("instance_prompt"), made, about.get("training") or {})


def find_base(given: str | None, adapter: str, header: Header) -> str:
    """The base to open with an adapter: as given, or as the adapter's header says.

    A header holds of a local base its last part only; where it lies is in the config.yaml of the run, which the
    adapter stands in.

    Raises:
        UserError: the base is not known, or known by its name only.
    """
    if given is not None:
        return given
    if header.base is None:
        raise UserError(f"pretrained_model_name_or_path (--base) is required: {adapter} does not name its base")
    if packaged_path(header.base) or is_hub_id(header.base) or Path(header.base).expanduser().exists():
        return header.base
    base = _of_run(adapter).get("pretrained_model_name_or_path")
    if isinstance(base, str) and public_name(base) == header.base:
        return base
    raise UserError(
        f"pretrained_model_name_or_path (--base) is required: {adapter} was trained on {header.base!r}, "
        "which is neither a hub id nor a folder here"
    )


def find_base_config(given: str | None, adapter: str, base: str) -> str | None:
    """The configs to open a base in one file with: as given, or as the adapter's run says of that base."""
    if given is not None or not Path(base).expanduser().is_file():
        return given
    run = _of_run(adapter)
    found = run.get("base_config") if run.get("pretrained_model_name_or_path") == base else None
    return found if isinstance(found, str) else None


def _of_run(adapter: str) -> dict[str, Any]:
    """The config.yaml of the run that an adapter stands in; empty where it stands in none."""
    place = Path(adapter).expanduser().resolve()
    for folder in (place, *place.parents[:2]):
        if (folder / "config.yaml").is_file():
            return read_yaml(folder / "config.yaml")
    return {}

"""A folder of pictures that can be stopped and continued."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from sd_atoms import __version__
from sd_atoms.data.images import read_image
from sd_atoms.errors import UserError
from sd_atoms.generation import SCHEDULERS, Request, Sampling, generate, picture_notes, save_picture
from sd_atoms.recipes.machine import on_main


@dataclass(frozen=True)
class Recorded:
    """What an adapter's header says of drawing with it: its base, the word each token started from, the sampling."""

    base: str | None
    words: Mapping[str, str]
    sampling: Sampling


def recorded(adapter: str, about: Mapping[str, Any]) -> Recorded:
    """The header of an adapter as far as drawing goes; what it leaves out is as usual.

    Raises:
        UserError: it says something that cannot be.
    """
    base, words, sampling = about.get("base"), about.get("tokens", {}), about.get("sampling", {})
    problem = None
    if base is not None and not isinstance(base, str):
        problem = "base"
    elif not isinstance(words, dict) or not all(isinstance(word, str) for word in words.values()):
        problem = "tokens"
    elif not isinstance(sampling, dict) or not sampling.keys() <= asdict(Sampling()).keys():
        problem = "sampling"
    else:
        made = Sampling(**{**sampling, "resolution": about.get("resolution")})
        fitting = {
            "guidance_scale": type(made.guidance_scale) in (int, float) and 0 <= made.guidance_scale < math.inf,
            "num_inference_steps": type(made.num_inference_steps) is int and 1 <= made.num_inference_steps <= 1000,
            "scheduler": made.scheduler in SCHEDULERS,
            "resolution": made.resolution is None or (type(made.resolution) is int and 32 <= made.resolution <= 4096),
        }
        problem = next((name for name, fits in fitting.items() if not fits), None)
    if problem is not None:
        raise UserError(f"{adapter}: corrupt, its header says nothing sensible about {problem}")
    return Recorded(base, words, made)


def check_size(pipe, resolution: int | None) -> None:
    """Refuses a size that the base cannot draw.

    Raises:
        UserError: it is not a whole number of latents.
    """
    if resolution is not None and resolution % pipe.vae_scale_factor:
        unit_px = pipe.vae_scale_factor
        raise UserError(f"resolution: {resolution} is not a multiple of {unit_px}, which this base needs")


def draw_missing(
    pipe,
    accelerator,
    requests: Sequence[Request],
    sampling: Sampling,
    folder: Path,
    notes: Mapping[str, str],
    overwrite: bool = False,
) -> None:
    """Draws the pictures that `folder` lacks, `<name>.png` each, with prompt, seed, sampling and `notes` inside.

    Args:
        pipe: the pipeline, adapters as they should be.
        accelerator: its processes share the work; the main process writes.
        requests: what the folder should hold.
        sampling: how pictures are drawn.
        folder: where they go.
        notes: what else a picture should say of its making, such as adapter and version.
        overwrite: draw all of them again.

    Raises:
        UserError: a file of that name exists and was made otherwise (prompt, seed, adapter, settings).
    """
    missing = on_main(
        accelerator,
        lambda: [
            request
            for request in requests
            if overwrite or not _is_there(folder / f"{request.name}.png", _notes(request, sampling, notes))
        ],
    )
    for request, image in generate(pipe, missing, sampling, accelerator):
        save_picture(folder / f"{request.name}.png", image, _notes(request, sampling, notes))


def adapter_notes(adapter: str, base: str) -> dict[str, str]:
    """What a picture says of its model; "none" is the base itself."""
    return {"adapter": adapter, "base": base, "sd_atoms": __version__}


def read_pictures(folder: Path, requests: Sequence[Request]) -> list[Image.Image]:
    """The drawn pictures in the order of `requests`."""
    return [read_image(folder / f"{request.name}.png") for request in requests]


def _is_there(path: Path, notes: Mapping[str, str]) -> bool:
    if not path.exists():
        return False
    found = picture_notes(path)
    for key, value in notes.items():
        if found.get(key) != value:
            raise UserError(f"{path}: exists with {key}={found.get(key)!r}, asked is {value!r}; pass --overwrite")
    return True


def _notes(request: Request, sampling: Sampling, notes: Mapping[str, str]) -> dict[str, str]:
    drawn = {"prompt": request.prompt, "seed": request.seed, **asdict(sampling)}
    return {key: str(value) for key, value in {**drawn, **notes}.items()}

"""A folder of images that can be stopped and continued."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from PIL import Image

from sd_atoms import __version__
from sd_atoms.data.images import read_image
from sd_atoms.errors import UserError
from sd_atoms.generation.conditions import Conditions
from sd_atoms.generation.generate import Request, drawn_together, generate
from sd_atoms.generation.png import image_notes, save_image
from sd_atoms.machine import on_main
from sd_atoms.pipeline.sampling import Sampling
from sd_atoms.sources import public_name


def generate_missing(
    pipe,
    accelerator,
    requests: Sequence[Request],
    sampling: Sampling,
    folder: Path,
    notes: Mapping[str, str],
    overwrite: bool = False,
    batch_size: int = 1,
    conditions: Conditions = Conditions(),
    record: Callable[[Request, int, int], Mapping[str, str]] | None = None,
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
        batch_size: how many a process draws together, see `generate`.
        conditions: what else they are drawn with, see `generate`; `notes` should say it.
        record: request, number of pictures drawn together, place among these -> what a picture should say besides,
            that makes no other picture of it.

    Raises:
        UserError: a file of that name exists and was made otherwise (prompt, seed, adapter, settings).
    """
    missing = on_main(
        accelerator,
        lambda: [
            request
            for request in requests
            if overwrite or not _is_there(folder / f"{request.name}.png", picture_notes(request, sampling, notes))
        ],
    )
    drawn = generate(pipe, missing, sampling, accelerator, batch_size, conditions)
    for index, (request, image) in enumerate(drawn):
        further = {}
        if record is not None:
            further = record(request, *drawn_together(index, len(missing), accelerator.num_processes, batch_size))
        save_image(folder / f"{request.name}.png", image, picture_notes(request, sampling, notes) | further)


def making_notes(adapter: str, base: str) -> dict[str, str]:
    """What a picture says of its model; "none" is the base itself."""
    return {"adapter": adapter, "base": public_name(base), "sd_atoms": __version__}


def read_images(folder: Path, requests: Sequence[Request]) -> list[Image.Image]:
    """The drawn pictures in the order of `requests`."""
    return [read_image(folder / f"{request.name}.png") for request in requests]


def _is_there(path: Path, notes: Mapping[str, str]) -> bool:
    if not path.exists():
        return False
    found = image_notes(path)
    for key, value in notes.items():
        if found.get(key, "") != value:
            raise UserError(f"{path}: exists with {key}={found.get(key, '')!r}, asked is {value!r}; pass --overwrite")
    return True


def picture_notes(request: Request, sampling: Sampling, notes: Mapping[str, str]) -> dict[str, str]:
    """What a picture says of itself; an empty entry, which no file has, is one that was not asked for."""
    drawn = {"prompt": request.prompt, "seed": request.seed, **asdict(sampling)}
    return {key: str(value) for key, value in {**drawn, **notes}.items()}

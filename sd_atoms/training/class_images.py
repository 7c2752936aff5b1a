"""Pictures of the class for prior preservation: those that the user has, and drawn ones for the rest."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from sd_atoms.data.images import EXTENSIONS, read_image, scan_folder
from sd_atoms.errors import UserError, refuse
from sd_atoms.generation import Request, generate, image_notes, save_image
from sd_atoms.machine import on_main
from sd_atoms.pipeline.sampling import Sampling
from sd_atoms.sources import public_name

# Run seed s draws from the seeds FIRST_SEED + s·SEEDS_PER_RUN on, in that order. They lie above those that people type
# (0 to 2^32 - 1, evaluation counts from 0) and below those of training, which have bit 62 set (`training.draws`); the
# largest is under 2^49.
FIRST_SEED = 2**40
SEEDS_PER_RUN = 100_000
MOST_PICTURES = SEEDS_PER_RUN // 2  # leaves as many seeds for blank pictures
MOST_BLANK = 20  # or as many as are missing, if that is more
LEAST_DEVIATION = 2.0  # of 255, in at least one channel


def class_image_paths(
    pipe,
    accelerator,
    folder: Path,
    prompt: str,
    count: int,
    sampling: Sampling,
    seed: int,
    base: str,
    batch_size: int = 1,
) -> list[Path]:
    """Exactly `count` pictures of the class; what `folder` lacks is drawn into it as `class-<seed number>.png`.

    First come the user's own pictures, of any name, in natural order, then drawn ones by rising seed, also those of
    another run seed; the first `count` of these are used. No file is ever overwritten, renamed or removed. A drawn
    picture depends on its own seed alone, and one that comes out blank gives way to the next seed, so an interrupted
    drawing ends with the files of one that was not.

    Args:
        pipe: the pipeline without an adapter.
        accelerator: its processes share the drawing, so all must call; the main process writes.
        folder: where the pictures are and go; need not exist.
        prompt: what a drawn picture shows.
        count: how many are needed.
        sampling: how pictures are drawn.
        seed: of the run.
        base: the model's name, for the notes in the pictures.
        batch_size: how many a process draws together, see `generate`.

    Returns:
        The paths, the same on every process.

    Raises:
        UserError: a picture in the folder cannot be read or is blank (all such are named), one was drawn with another
            prompt, base or sampling, the base draws too many blank ones, `count` is too large, or the folder cannot be
            used.
    """
    if count > MOST_PICTURES:
        raise UserError(f"num_class_images: {count} is too many; at most {MOST_PICTURES} class pictures are allowed")
    folder, notes = Path(folder), _notes(prompt, sampling, base)
    own, drawn, names = on_main(accelerator, lambda: _usable(folder, count, notes))
    first, missing = FIRST_SEED + seed * SEEDS_PER_RUN, count - len(own) - len(drawn)
    seeds = (number for number in range(first, first + SEEDS_PER_RUN) if _name(number) not in names)
    most_blank, blank = max(MOST_BLANK, missing), 0
    while missing:
        requests = [Request(prompt, number, _name(number)) for number in islice(seeds, missing)]
        new = _draw(pipe, accelerator, requests, sampling, folder, notes, batch_size)
        drawn |= new
        missing -= len(new)
        blank += len(requests) - len(new)
        if missing and blank >= most_blank:
            raise UserError(
                f"{folder}: {blank} pictures of class_prompt {prompt!r} came out black or in one colour, {missing} "
                "are still missing; word it in another way or put pictures of your own there"
            )
    return own + [drawn[number] for number in sorted(drawn)]


def _usable(folder: Path, count: int, notes: Mapping[str, str]) -> tuple[list[Path], dict[int, Path], set[str]]:
    """The first `count` pictures of the folder, the user's own and the drawn ones by seed, and all names taken."""
    paths = _pictures(folder)
    found = {path: _notes_of_drawn(path) for path in paths}
    own = [path for path in paths if found[path] is None][:count]
    drawn = {int(found[path]["seed"]): path for path in paths if found[path] is not None}
    drawn = {number: drawn[number] for number in sorted(drawn)[: count - len(own)]}
    for path in drawn.values():
        for key, value in notes.items():
            if found[path].get(key) != value:
                raise UserError(
                    f"{path}: drawn with {key}={found[path].get(key)!r}, asked is {value!r}; name another "
                    "class_data_dir or remove the pictures drawn before"
                )
    _check([*own, *drawn.values()])
    return own, drawn, {path.name for path in paths}


def _pictures(folder: Path) -> Sequence[Path]:
    """Those in the folder in natural order; unlike anywhere else there may be none, and no folder."""
    if not folder.exists():
        return ()
    if folder.is_dir() and os.access(folder, os.R_OK):
        names = [entry.name for entry in folder.iterdir()]
        if not any(Path(name).suffix.lower() in EXTENSIONS and not name.startswith(".") for name in names):
            return ()
    return scan_folder(folder).paths


def _check(paths: Sequence[Path]) -> None:
    problems = []
    for path in paths:
        try:
            if _is_blank(read_image(path)):
                problems.append(f"{path}: is blank (black or in one colour)")
        except UserError as error:
            problems.append(str(error))
    refuse(problems, f"{len(problems)} of {len(paths)} class pictures cannot be used:")


def _draw(
    pipe, accelerator, requests, sampling: Sampling, folder: Path, notes: Mapping[str, str], batch_size: int
) -> dict[int, Path]:
    """Draws each request once and keeps what is not blank: seed -> path, on every process."""
    saved = {}
    for request, image in generate(pipe, requests, sampling, accelerator, batch_size):
        if not _is_blank(image):
            saved[request.seed] = folder / request.name
            save_image(saved[request.seed], image, {**notes, "seed": str(request.seed)})
    return on_main(accelerator, lambda: saved)


def _is_blank(image: Image.Image) -> bool:
    """Whether every channel is the same all over, or nearly so: a safety checker's black, a failed decoding."""
    return np.asarray(image, dtype=np.float32).std(axis=(0, 1)).max() < LEAST_DEVIATION


def _name(number: int) -> str:
    return f"class-{number}.png"


def _notes(prompt: str, sampling: Sampling, base: str) -> dict[str, str]:
    """What all pictures of one drawing have in common."""
    return {
        key: str(value) for key, value in {"prompt": prompt, **asdict(sampling), "base": public_name(base)}.items()
    }


def _notes_of_drawn(path: Path) -> dict[str, str] | None:
    """The notes in a picture that was drawn here; None of any other file, whatever its name."""
    number = path.name.removeprefix("class-").removesuffix(".png")
    if not number.isdecimal() or path.name != _name(int(number)):
        return None
    try:
        notes = image_notes(path)
    except UserError:
        return None
    return notes if notes.get("seed") == number and {"prompt", "base"} <= notes.keys() else None

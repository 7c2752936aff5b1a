"""Masks of pictures: white where the subject is, black elsewhere, greys in between.

The mask of a.jpg is a.mask.png or a-masklabel.png beside it (any extension of a picture; the latter is OneTrainer's
name), or a.png in the folder masks/ beside it (as kohya's scripts keep them), or else its own alpha channel.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from sd_atoms.data.images import EXTENSIONS, alpha_of, file_content, grey_of, masked_stem, open_image, read_upright
from sd_atoms.errors import UserError, refuse

FOLDER = "masks"
MOST_COLOUR = 8  # of 255, between channels: what lossy files add to greys
LEAST_WHITE = 128  # of 255: the brightest grey of a mask
EXPECTED = "NAME.mask.png beside it or masks/NAME.png"


@dataclass(frozen=True, slots=True)
class Mask:
    """Where a picture shows its subject; read when it is needed, and can be pickled.

    name: what messages call it. content: gives the bytes of its file, or raises UserError. alpha: it is the alpha
    channel of that file. digest: SHA-256 of the file in hex, and share: how much of the picture is subject, in (0, 1];
    both once it was checked.
    """

    name: str
    content: Callable[[], bytes]
    alpha: bool = False
    digest: str | None = None
    share: float | None = None

    def read(self) -> Image.Image:
        """The mask, upright, in mode L.

        Raises:
            UserError: as `read_image`, or it holds colours or is transparent itself.
        """
        return self._decoded(self.content())

    def _decoded(self, data: bytes) -> Image.Image:
        return read_upright(data, alpha_of if self.alpha else partial(_greys, self.name), self.name)


def mask_files(folder: Path) -> list[tuple[str, Path]]:
    """(stem of the picture, file) of every file in a folder of pictures that is a mask by its name or place.

    Raises:
        UserError: a folder cannot be read.
    """
    inside = folder / FOLDER
    try:
        named = [path for path in folder.iterdir() if masked_stem(path)]
        placed = [*inside.iterdir()] if inside.is_dir() else []
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror}); expected a folder of masks") from error
    return [(masked_stem(path) or path.stem, path) for path in [*sorted(named), *sorted(placed)] if _is_picture(path)]


def folder_masks(folder: Path, paths: Sequence[Path]) -> dict[Path, Mask]:
    """The masks in files of `paths`, all directly inside `folder`; those of no file are left out, none is opened.

    Raises:
        UserError: everything that is wrong: a mask of no picture, two masks of one.
    """
    files: dict[str, list[Path]] = {}
    for stem, path in mask_files(folder):
        files.setdefault(stem, []).append(path)
    pictures = {path.stem for path in paths if masked_stem(path) is None}
    problems = []
    for stem, own in files.items():
        if stem not in pictures:
            problems += [f"{path}: is the mask of no picture; expected one named {stem} in {folder}" for path in own]
        elif len(own) > 1:
            names = ", ".join(str(path.relative_to(folder)) for path in own)
            problems.append(f"{folder}: {stem} has {len(own)} masks, {names}; expected one")
    refuse(problems, f"{folder}: {len(problems)} mistakes in the masks:")
    found = {path: files[path.stem][0] for path in paths if path.stem in files}
    return {path: Mask(str(own), partial(file_content, own, expected="a mask")) for path, own in found.items()}


def examined(mask: Mask | None, picture: str, content: Callable[[], bytes], size: tuple[int, int]) -> Mask | None:
    """The mask of a picture once it was looked at, or its alpha channel where there is no file of it.

    Args:
        mask: in a file; None where there is none.
        picture: what messages call the picture.
        content: the bytes of the picture's file.
        size: (width, height) of the picture in px, upright.

    Returns:
        the mask with digest and share; None of a picture that is opaque and has no file.

    Raises:
        UserError: the mask cannot be read, is of another size, holds colours, or no white.
    """
    mask = mask or Mask(picture, content, alpha=True)
    data = mask.content()
    if mask.alpha:
        with open_image(data) as file:
            if not file.has_transparency_data:
                return None
    image, label = mask._decoded(data), f"{mask.name}: its alpha channel" if mask.alpha else mask.name
    darkest, brightest = image.getextrema()
    if mask.alpha and darkest == 255:
        return None
    if image.size != size:
        shown = "{} x {} px".format(*image.size), "{} x {} px".format(*size)
        raise UserError(f"{label}: is of {shown[0]}, its picture {picture} of {shown[1]}; expected one size")
    if brightest < LEAST_WHITE:
        what = "is all black" if brightest == 0 else f"has no brighter grey than {brightest} of 255"
        raise UserError(f"{label}: {what}; expected white (255) where the subject is")
    share = float(np.asarray(image, dtype=np.float64).mean() / 255)
    return replace(mask, digest=hashlib.sha256(data).hexdigest(), share=share)


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in EXTENSIONS and not path.name.startswith(".") and path.is_file()


def _greys(label: str, image: Image.Image) -> Image.Image:
    alpha = alpha_of(image)
    if alpha is not None and alpha.getextrema()[0] < 255:
        raise UserError(f"{label}: is transparent in places; expected an opaque mask, white where the subject is")
    if image.mode not in ("1", "L", "LA") and not image.mode.startswith(("I", "F")):
        channels = np.asarray(image.convert("RGB")).astype(np.int16)
        if np.ptp(channels, axis=2).max() > MOST_COLOUR:
            raise UserError(f"{label}: holds colours; expected a mask of greys, white where the subject is")
    return grey_of(image)

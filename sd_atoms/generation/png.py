"""PNG files whose text chunks say how they were made."""

from collections.abc import Mapping
from pathlib import Path

from PIL import Image, PngImagePlugin

from sd_atoms.errors import UserError
from sd_atoms.files import replacing

GRID_NOTE = "grid of"  # in the text of a grid, which is no image by itself
AGAIN_NOTE = "again"  # in the text of a picture drawn once more, with the name of the first


def save_image(path: str | Path, image: Image.Image, notes: Mapping[str, str]) -> None:
    """Writes a PNG whose text chunks say how it was made, but for empty ones; all or nothing."""
    text = PngImagePlugin.PngInfo()
    for key, value in notes.items():
        if value != "":
            text.add_itxt(key, str(value))
    with replacing(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=text)


def image_notes(path: str | Path) -> dict[str, str]:
    """The text chunks of a PNG.

    Raises:
        UserError: it is not a whole PNG file.
    """
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.load()  # text may follow the pixels
            return {key: str(value) for key, value in image.text.items()}
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: not a whole PNG picture ({error}); remove it or pass --overwrite") from error

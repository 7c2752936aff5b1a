"""Images from prompts and seeds, one by one or into a folder that can be stopped and continued."""

from sd_atoms.generation.conditions import Conditions
from sd_atoms.generation.folder import generate_missing, making_notes, picture_notes, read_images
from sd_atoms.generation.generate import Request, generate
from sd_atoms.generation.png import GRID_NOTE, image_notes, save_image

__all__ = [
    "GRID_NOTE",
    "Conditions",
    "Request",
    "generate",
    "generate_missing",
    "image_notes",
    "making_notes",
    "picture_notes",
    "read_images",
    "save_image",
]

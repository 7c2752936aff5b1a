"""Whether what surrounds the subject in the photos comes along: images beside photos, both without the subject."""

import io
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch.nn import functional as F

from sd_atoms.data.images import fit
from sd_atoms.data.masks import EXPECTED
from sd_atoms.data.records import ImageRecord
from sd_atoms.errors import UserError
from sd_atoms.evaluation.metrics import nearest
from sd_atoms.evaluation.networks import Network, features_of

NAME = "surroundings"
SIDE_PX = 128  # of the squares that are compared
LEAST_FREE = 0.1  # share of the square that no photo fills with its subject
GREY = (128, 128, 128)


def subject_places(photos: Sequence[ImageRecord]) -> Image.Image:
    """SIDE_PX square, mode L: 255 where any photo shows its subject, or nearly so.

    Raises:
        UserError: a photo has no mask, or they leave next to nothing free.
    """
    without = [photo.name for photo in photos if photo.mask is None]
    if without:
        raise UserError(f"{NAME}: {without[0]} has no mask, which says where the subject is; expected {EXPECTED}")
    masks = [fit(photo.mask.read(), SIDE_PX, center_crop=True, resample="box", rng=None) for photo in photos]
    most = Image.fromarray(np.max([np.asarray(mask) for mask in masks], axis=0))
    places = most.point(lambda value: 255 if value > 8 else 0).filter(ImageFilter.MaxFilter(7))
    free = 1 - np.asarray(places).mean() / 255
    if free < LEAST_FREE:
        raise UserError(f"{NAME}: the subjects of the photos leave {free:.0%} of a square free, too little to compare")
    return places


def surroundings(
    network: Network, images: Sequence[ImageRecord], photos: Sequence[ImageRecord], resize: str, accelerator=None
) -> torch.Tensor:
    """Cosine of each image's surroundings to those of the photo that they are most alike to, (N,).

    Surroundings are the middle square with grey wherever any photo has its subject, alike in all. Lower is better; how
    alike they are by chance is what images of the base have.

    Args:
        network: makes the features.
        images: of the subject.
        photos: checked, each with its mask.
        resize: the network was opened with.
        accelerator: its processes share the work; all must call it.

    Raises:
        UserError: as `subject_places`.
    """
    places = subject_places(photos)
    made, real = (
        F.normalize(features_of(network, [_blanked(record, places) for record in records], resize, None, accelerator))
        for records in (images, photos)
    )
    return nearest(made, real)


def _blanked(record: ImageRecord, places: Image.Image) -> ImageRecord:
    return replace(record, content=partial(_content, record, places), stats=None, mask=None)


def _content(record: ImageRecord, places: Image.Image) -> bytes:
    square = fit(record.read(), SIDE_PX, center_crop=True, resample="lanczos", rng=None)
    square.paste(GREY, mask=places)
    file = io.BytesIO()
    square.save(file, format="PNG", compress_level=0)
    return file.getvalue()

"""Checking the images of a run, each decoded once; what is known of a file's content from before is not made again.

`cache_dir`/images/<version of Pillow>/*.safetensors: digests (N, 32), cells (N, 8) uint8, sizes (N, 2) int32, flags
(N, 2) uint8 (turned, of one colour). A file is written whole or not at all; its name is a hash of its digests.
"""

import contextlib
import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from sd_atoms.data.masks import Mask, examined
from sd_atoms.data.records import ImageRecord, ImageStats, image_stats
from sd_atoms.errors import UserError, refuse
from sd_atoms.files import replacing
from sd_atoms.machine import on_main, read_ahead, shared_work
from sd_atoms.progress import followed


def usable(
    pictures: Sequence[ImageRecord], on_bad_image: str, accelerator=None, cache: Path | None = None
) -> tuple[list[ImageRecord], tuple[str, ...]]:
    """Reads every picture once, so that no long run stops at the last one, and keeps what is to be seen of it.

    Args:
        pictures: what to read.
        on_bad_image: "error", or "skip" to leave out those that cannot be read.
        accelerator: its processes share the work; all must call it.
        cache: folder in which what was seen stays for the next time; None for none.

    Returns:
        The pictures that can be read, with their stats, and one line on each that was left out.

    Raises:
        UserError: all that cannot be read at once, if that is an error or no other picture is left.
    """
    known = load_checked(cache) if cache else {}

    def recognise(picture: ImageRecord) -> ImageStats | None:
        try:
            stats = known.get(picture.digest())
        except UserError:
            return None  # said when it is looked at
        return stats and replace(stats, name=Path(picture.name).name)

    def look(picture: ImageRecord) -> ImageStats | str:
        try:
            return image_stats(picture)
        except UserError as error:
            return str(error)

    def look_at(share: Sequence[ImageRecord]) -> list[ImageStats | str]:
        # threads serve decoding; for hashing alone they would wait for each other
        found = [recognise(picture) for picture in share] if known else [None] * len(share)
        unseen = [picture for picture, stats in zip(share, found, strict=True) if stats is None]
        looked = followed(read_ahead(look, unseen), len(unseen), "Checking images", "image")
        return [next(looked) if stats is None else stats for stats in found]

    found = shared_work(look_at, pictures, accelerator)
    problems = tuple(stats for stats in found if isinstance(stats, str))
    good = [
        replace(picture, stats=stats)
        for picture, stats in zip(pictures, found, strict=True)
        if isinstance(stats, ImageStats)
    ]
    if on_bad_image == "error" or not good:
        refuse(problems, f"{len(problems)} of {len(pictures)} images cannot be used:")
    new = [picture.stats for picture in good if picture.stats.digest not in known]
    if cache is not None:
        on_main(accelerator, lambda: save_checked(cache, new))
    return good, problems


def with_masks(pictures: Sequence[ImageRecord], accelerator=None) -> list[ImageRecord]:
    """Reads every mask once; a picture whose mask is in no file has its alpha channel for one, unless it is opaque.

    Args:
        pictures: checked, with the masks that are files.
        accelerator: as for `usable`.

    Raises:
        UserError: all masks that cannot be used at once.
    """

    def look(picture: ImageRecord) -> dict[str, Any] | str | None:
        try:
            mask = examined(picture.mask, picture.name, picture.content, picture.stats.size)
        except UserError as error:
            return str(error)
        # without what reads it, which may carry a whole table to the other processes
        return mask and dict(alpha=mask.alpha, digest=mask.digest, share=mask.share)

    def look_at(share: Sequence[ImageRecord]) -> list[dict[str, Any] | str | None]:
        return list(followed(read_ahead(look, share), len(share), "Checking masks", "mask"))

    found = shared_work(look_at, pictures, accelerator)
    problems = [seen for seen in found if isinstance(seen, str)]
    refuse(problems, f"{len(problems)} of {len(pictures)} masks cannot be used:")
    masks = [picture.mask or Mask(picture.name, picture.content) for picture in pictures]
    return [
        replace(picture, mask=seen and replace(mask, **seen))
        for picture, mask, seen in zip(pictures, masks, found, strict=True)
    ]


def load_checked(cache: Path) -> dict[str, ImageStats]:
    """Digest in hex -> stats without a name, of all images checked with this cache; a broken file of it is none."""
    found = {}
    for path in sorted(_folder(cache).glob("[!.]*.safetensors")):
        with contextlib.suppress(SafetensorError, OSError, KeyError, ValueError):
            parts = load_file(path)
            columns = (parts["digests"], parts["sizes"].tolist(), parts["flags"].tolist(), parts["cells"])
            for digest, size, (turned, plain), cells in zip(*columns, strict=True):
                key = digest.tobytes().hex()
                found[key] = ImageStats("", tuple(size), key, bool(turned), None if plain else cells.tobytes())
    return found


def save_checked(cache: Path, stats: Sequence[ImageStats]) -> None:
    """Adds what was found of images; none is nothing to write.

    Raises:
        UserError: the folder cannot be written to, or the disk is full.
    """
    if not stats:
        return
    digests = np.array([list(bytes.fromhex(own.digest)) for own in stats], dtype=np.uint8)
    parts = {
        "digests": digests,
        "cells": np.array([list(own.cells or bytes(8)) for own in stats], dtype=np.uint8),
        "sizes": np.array([own.size for own in stats], dtype=np.int32),
        "flags": np.array([(own.turned, own.cells is None) for own in stats], dtype=np.uint8),
    }
    name = hashlib.sha256(digests.tobytes()).hexdigest()[:16]
    with replacing(_folder(cache) / f"{name}.safetensors") as temporary:
        save_file(parts, temporary)


def _folder(cache: Path) -> Path:
    return cache / "images" / PIL.__version__

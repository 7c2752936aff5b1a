"""Images from IDX files, the format of MNIST: a magic number, the sizes as big-endian 32-bit numbers, bytes."""

import functools
import gzip
import io
import math
import struct
import zlib
from functools import partial
from pathlib import Path

from PIL import Image

from sd_atoms.data.images import file_content
from sd_atoms.data.records import ImageRecord
from sd_atoms.errors import UserError

PARTS = {"train": "train", "test": "t10k"}  # split -> how its files begin


def find_idx(folder: Path, split: str, what: str) -> Path | None:
    """The file of "images" or "labels" of a split, packed with gzip or not; None where there is none."""
    return next(iter(sorted(folder.glob(f"{PARTS.get(split, split)}-{what}*"))), None)


def idx_images(images: Path, labels: Path) -> list[ImageRecord]:
    """The images and labels of two IDX files, none decoded; of a packed file all are held in memory, as bytes.

    Args:
        images: grey images (N, height, width) of unsigned bytes.
        labels: (N,) of unsigned bytes.

    Raises:
        UserError: a file cannot be read, is no IDX file of that shape, or is cut short; or N differs.
    """
    sizes = _sizes(images, 3)
    if sizes[0] != (count := _sizes(labels, 1)[0]):
        raise UserError(f"{labels}: has {count} labels for {sizes[0]} images of {images.name}")
    own = _read(labels, 8, count)
    return [
        ImageRecord(f"{images} image {number}", None, partial(_content, images, number, *sizes[1:]), label=own[number])
        for number in range(count)
    ]


def _sizes(path: Path, dimensions: int) -> tuple[int, ...]:
    head = _read(path, 0, 4 + 4 * dimensions)
    if len(head) < 4 + 4 * dimensions or head[:4] != bytes((0, 0, 8, dimensions)):
        raise UserError(f"{path}: begins with {head[:4].hex() or 'nothing'}; expected an IDX file of bytes in "
                        f"{dimensions} dimensions, 000008{dimensions:02d}")  # fmt: skip
    sizes = struct.unpack(f">{dimensions}I", head[4:])
    length = len(_unpacked(path)) if path.suffix == ".gz" else path.stat().st_size
    if length != len(head) + math.prod(sizes):
        raise UserError(
            f"{path}: has {length - len(head):,} bytes after its head, which announces {math.prod(sizes):,}: it is "
            "cut short, or no IDX file"
        )
    return sizes


def _read(path: Path, start: int, size: int) -> bytes:
    if path.suffix == ".gz":
        return _unpacked(path)[start : start + size]
    return file_content(path, start, size, expected="an IDX file")


def _unpacked(path: Path) -> bytes:
    try:
        return _unpacked_once(path, path.stat().st_mtime_ns, path.stat().st_size)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be unpacked ({error}); it is cut short, or no gzip file") from error


@functools.lru_cache(maxsize=4)
def _unpacked_once(path: Path, changed_ns: int, size: int) -> bytes:
    """All of a packed file, which cannot be entered in the middle."""
    return gzip.decompress(path.read_bytes())


def _content(path: Path, number: int, height: int, width: int) -> bytes:
    """An image as a BMP file, which is the same bytes with every version of Pillow."""
    pixels = _read(path, 16 + number * height * width, height * width)
    file = io.BytesIO()
    Image.frombytes("L", (width, height), pixels).save(file, format="BMP")
    return file.getvalue()

"""Training pictures from webdataset shards: tar files whose entries of one name before the first dot are a sample."""

import tarfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from sd_atoms.data.captions import tidy
from sd_atoms.data.images import EXTENSIONS, file_content
from sd_atoms.data.masks import Mask
from sd_atoms.data.records import ImageRecord
from sd_atoms.errors import UserError

CAPTION, CLASS, MASK = ".txt", ".cls", ".mask"


class _Place(NamedTuple):
    """Where the content of an entry lies in its shard, in bytes."""

    start: int
    size: int


def find_shards(place: str | Path) -> list[Path]:
    """The tar files that a path stands for: itself, or those directly inside a folder without pictures, by name."""
    place = Path(place)
    if place.is_file():
        return [place] if place.suffix.lower() == ".tar" else []
    # hidden files such as ._0.tar, as macOS leaves them on other disks, are none
    found = sorted(path for path in place.iterdir() if not path.name.startswith(".")) if place.is_dir() else []
    if any(path.suffix.lower() in EXTENSIONS for path in found):
        return []
    return [path for path in found if path.suffix == ".tar" and path.is_file()]


def shard_images(
    shards: Sequence[Path], captions: bool, classes: bool = False, masks: bool = False
) -> list[ImageRecord]:
    """The pictures in shards, in the order of the tar files; only their headers are read, none is decoded.

    Args:
        shards: uncompressed tar files.
        captions: each picture's prompt is the entry NAME.txt beside it.
        classes: each picture's label is the number in the entry NAME.cls beside it.
        masks: a picture's mask is the entry NAME.mask.png, or of another extension, beside it, where there is one.

    Raises:
        UserError: a file is no tar file or is cut short, holds no picture, or lacks captions or classes.
    """
    found = []
    for path in shards:
        entries = _entries(path)
        samples: dict[str, dict[str, str]] = {}  # name before the first dot -> extension -> name
        for name in entries:
            folder, _, file = name.rpartition("/")
            stem, _, extension = file.partition(".")
            samples.setdefault(f"{folder}/{stem}", {})[f".{extension.lower()}"] = name
        for parts in samples.values():
            name = next((parts[extension] for extension in EXTENSIONS if extension in parts), None)
            if name is None:
                continue
            caption = _caption(path, name, parts.get(CAPTION), entries) if captions else None
            label = _class(path, name, parts.get(CLASS), entries) if classes else None
            content = partial(file_content, str(path), *entries[name])
            mask = _mask(path, parts, entries) if masks else None
            found.append(ImageRecord(f"{path}/{name}", caption, content, label=label, mask=mask))
    if not found:
        raise UserError(f"{shards[0]}: no pictures in it; expected entries named {', '.join(EXTENSIONS)}")
    return found


def _entries(path: Path) -> dict[str, _Place]:
    length, entries = path.stat().st_size, {}
    try:
        with tarfile.open(path, "r:") as shard:
            for entry in shard:
                if entry.isfile():
                    entries[entry.name] = _Place(entry.offset_data, entry.size)
                    if entry.offset_data + entry.size > length:
                        raise tarfile.ReadError(f"{entry.name} is cut short")
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"{path}: cannot be read ({error}); expected an uncompressed tar file") from error
    return entries


def _caption(path: Path, picture: str, name: str | None, entries: dict[str, _Place]) -> str:
    if name is None:
        raise UserError(f"{path}/{picture}: has no caption; expected an entry {Path(picture).stem}{CAPTION} beside it")
    try:
        text = tidy(file_content(str(path), *entries[name]).decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}/{name}: is not UTF-8 text; expected a caption") from error
    if not text:
        raise UserError(f"{path}/{name}: is empty; expected a caption")
    return text


def _mask(path: Path, parts: dict[str, str], entries: dict[str, _Place]) -> Mask | None:
    name = next((parts[f"{MASK}{end}"] for end in EXTENSIONS if f"{MASK}{end}" in parts), None)
    return None if name is None else Mask(f"{path}/{name}", partial(file_content, str(path), *entries[name]))


def _class(path: Path, picture: str, name: str | None, entries: dict[str, _Place]) -> int:
    if name is None:
        raise UserError(f"{path}/{picture}: has no class; expected an entry {Path(picture).stem}{CLASS} beside it")
    text = file_content(str(path), *entries[name]).strip()
    if not text.isdigit() or len(text) > 9:
        raise UserError(f"{path}/{name}: {text[:40]!r} is no class; expected a whole number from 0 on")
    return int(text)

"""Training pictures from a folder or a table of `datasets`: what they are called, their captions, how to read them."""

import hashlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from sd_atoms.data.captions import caption_files, folder_captions, tidy
from sd_atoms.data.images import file_content, ignored_notes, open_image, read_image, scan_folder
from sd_atoms.data.masks import Mask, folder_masks, mask_files
from sd_atoms.errors import UserError, refuse

_A_TABLE = "the id of a data set on the hub, a folder written by save_to_disk, or one of images or parquet files"


@dataclass(frozen=True, slots=True)
class ImageStats:
    """What is to be seen of a picture.

    size: (width, height) in px, upright. digest: SHA-256 of its file's content, in hex. turned: the file holds it
    turned, and says so. cells: which of 8×8 are brighter than the mean, a bit each; None of a picture in one colour.
    """

    name: str
    size: tuple[int, int]
    digest: str
    turned: bool = False
    cells: bytes | None = None


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """A picture that is read when it is needed; it can be pickled.

    name: what messages call it: its path, or "name[train] row 12", rows counted from 0. caption: its own prompt; None
    is the run's. content: gives the bytes of its file, or raises UserError. stats: once it was checked. label: of its
    class, from 0 on, where it has one. mask: where its subject is, where that is said in a file or was found out.
    """

    name: str
    caption: str | None
    content: Callable[[], bytes]
    stats: ImageStats | None = None
    label: int | None = None
    mask: Mask | None = None

    def read(self) -> Image.Image:
        """The picture, upright, in mode RGB; raises as `read_image` does."""
        return read_image(self.content(), self.name)

    def digest(self) -> str:
        """SHA-256 of the file's content in hex."""
        return self.stats.digest if self.stats else hashlib.sha256(self.content()).hexdigest()


def image_record(path: Path, caption: str | None = None, mask: Mask | None = None) -> ImageRecord:
    """The picture in a file, which is not opened yet."""
    return ImageRecord(str(path), caption, partial(file_content, str(path), expected="a picture"), mask=mask)


def image_stats(record: ImageRecord) -> ImageStats:
    """Reads and decodes an image once; raises as `read_image` does."""
    content = record.content()
    image = read_image(content, record.name)
    with open_image(content) as file:
        orientation = file.getexif().get(ExifTags.Base.Orientation, 1)
    grey = np.asarray(image.convert("L").resize((8, 8), Image.Resampling.BOX), dtype=np.float64).ravel()
    cells = np.packbits(grey > grey.mean()).tobytes() if np.ptp(grey) > 8 else None
    digest = hashlib.sha256(content).hexdigest()
    return ImageStats(Path(record.name).name, image.size, digest, orientation not in (0, 1), cells)


def folder_images(
    folder: str | Path, captions: bool, masks: bool = False
) -> tuple[list[ImageRecord], tuple[str, ...]]:
    """The pictures directly inside a folder in the order of `scan_folder`, and a few words on what else lay there.

    Args:
        folder: where they are; no picture is opened.
        captions: read the caption files, if there are any.
        masks: find the masks that are files. Masks, and captions in use, are not among what else lay there.

    Raises:
        UserError: the folder cannot be used, or its captions or masks cannot.
    """
    folder = Path(folder)
    found = scan_folder(folder)
    own = folder_captions(folder, found.paths) if captions else {}
    used = set(caption_files(folder, found.paths)) if captions else set()
    masked = folder_masks(folder, found.paths) if masks else {}
    for _, path in mask_files(folder):
        used |= {path, path.parent}
    pictures = [image_record(path, own.get(path), masked.get(path)) for path in found.paths]
    return pictures, ignored_notes([path for path in found.others if path not in used])


def table_images(
    name: str,
    *,
    config: str | None = None,
    split: str = "train",
    revision: str | None = None,
    image_column: str = "image",
    caption_column: str | None = None,
    label_column: str | None = None,
    label_of: Callable[[Sequence[str]], list[int]] | None = None,
    most: int | None = None,
) -> list[ImageRecord]:
    """The pictures in a table of the library `datasets`, none of them decoded yet.

    Args:
        name: a folder that `save_to_disk` wrote, a folder of images or parquet files, or the id of a data set.
        config: which configuration, where there are several; none for a folder of `save_to_disk`.
        split: which part.
        revision: branch, tag or commit of a data set on the hub.
        image_column: column of the pictures.
        caption_column: column of their captions.
        label_column: column of their classes, whole numbers.
        label_of: the names that the column's numbers stand for, where it has any -> the label of each.
        most: only the first so many rows.

    Raises:
        UserError: `datasets` is not installed, the table cannot be loaded, the split or a column is not there or
            holds something else, or captions are empty.
    """
    table = _load(name, config, split, revision)
    label = f"{name}[{split}]"
    if len(table) == 0:
        raise UserError(f"{label}: has no rows; expected pictures")
    if most is not None:
        table = table.select(range(min(most, len(table))))
    for column in (image_column, caption_column, label_column):
        if column is not None and column not in table.column_names:
            raise UserError(f"{label}: no column {column!r}; expected one of {', '.join(table.column_names)}")
    images = _undecoded(table, image_column, label)
    captions = [None] * len(table) if caption_column is None else _captions(table, caption_column, label)
    labels = [None] * len(table) if label_column is None else _labels(table, label_column, label, label_of)
    pictures = []
    for row, (caption, own) in enumerate(zip(captions, labels, strict=True)):
        name = f"{label} row {row}"
        pictures.append(ImageRecord(name, caption, partial(_row_content, images, row, name), label=own))
    return pictures


def _load(name: str, config: str | None, split: str, revision: str | None):
    try:
        import datasets
    except ImportError as error:
        raise UserError(f'{name}: tables of pictures need `pip install "sd-atoms[datasets]"`') from error
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()  # in a log they are lines without end
    try:
        if any((Path(name) / file).is_file() for file in ("dataset_dict.json", "state.json")):
            if config is not None:
                raise ValueError(f"dataset_config_name={config!r}: what save_to_disk wrote has no configurations")
            found = datasets.load_from_disk(name)
        else:
            found = datasets.load_dataset(name, config, revision=revision)
    except Exception as error:  # builders, readers and the hub's client raise whatever they trip over
        if type(error).__name__ == "DatasetGenerationError" and error.__cause__ is not None:
            error = error.__cause__
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{name}: cannot be loaded ({reason}); expected {_A_TABLE}") from error
    splits = found if isinstance(found, dict) else {str(found.split or "train"): found}
    if split not in splits:
        raise UserError(f"{name}: no split {split!r}; expected one of {', '.join(splits)}")
    return splits[split].with_format(None)


def _undecoded(table, column: str, label: str):
    """The one column as {"bytes": ..., "path": ...}: `read_image` opens the files, and turns them upright once."""
    import datasets

    feature = table.features[column]
    encoded = isinstance(feature, dict) and "bytes" in feature  # as pictures are in parquet files that others wrote
    binary = getattr(feature, "dtype", None) in ("binary", "large_binary")
    if not (isinstance(feature, datasets.Image) or encoded or binary):
        raise UserError(f"{label}: column {column!r} holds {feature}; expected pictures")
    return table.select_columns([column]).cast_column(column, datasets.Image(decode=False))


def _captions(table, column: str, label: str) -> list[str]:
    feature = table.features[column]
    if getattr(feature, "dtype", None) not in ("string", "large_string"):
        raise UserError(f"{label}: column {column!r} holds {feature}; expected text")
    captions = [tidy(text or "") for text in table[column]]
    problems = [
        f"{label} row {row}: column {column!r} is empty; expected a caption"
        for row, caption in enumerate(captions)
        if not caption
    ]
    refuse(problems, f"{len(problems)} of {len(captions)} captions cannot be used:")
    return captions


def _labels(table, column: str, label: str, label_of: Callable[[Sequence[str]], list[int]] | None) -> list[int]:
    feature = table.features[column]
    if "int" not in str(getattr(feature, "dtype", "")):
        raise UserError(f"{label}: column {column!r} holds {feature}; expected classes as whole numbers")
    labels = list(table[column])
    if None in labels:
        raise UserError(f"{label} row {labels.index(None)}: column {column!r} is empty; expected a class")
    names = getattr(feature, "names", None)
    if label_of is None or not names:
        return labels
    places = label_of(names)
    return [places[own] if 0 <= own < len(places) else own for own in labels]


def _row_content(images, row: int, name: str) -> bytes:
    (value,) = images[row].values()
    content, path = (value or {}).get("bytes"), (value or {}).get("path")
    if content is None and path is None:
        raise UserError(f"{name}: holds no picture; expected one in every row")
    if content is None and "://" in path:  # zip://a.png::/pictures.zip
        import fsspec

        try:
            with fsspec.open(path, "rb") as file:
                content = file.read()
        except Exception as error:  # every kind of store has errors of its own
            reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"{name}: cannot be read ({reason})") from error
    return file_content(path, expected="a picture", name=name) if content is None else content

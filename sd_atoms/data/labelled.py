"""Labelled images of a task in the layouts that people have; nothing is decoded before it is read.

- VTAB-1k as distributed: images/*/000000.jpg; train800.txt, val200.txt, train800val200.txt, test.txt of `path label`;
- IDX files: train-images-idx3-ubyte(.gz), train-labels-…, t10k-…;
- webdataset: train/nshards.txt, train/0.tar of s0000000.webp and s0000000.cls, test/…, classnames.txt;
- a folder per class: train/CLASS/*.png, test/CLASS/*.png;
- a table of `datasets`, by id or path.
"""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath

from sd_atoms.data.idx import find_idx, idx_images
from sd_atoms.data.images import EXTENSIONS, scan_folder
from sd_atoms.data.records import ImageRecord, image_record, table_images
from sd_atoms.data.shards import shard_images
from sd_atoms.data.vtab import Task, is_folder_of_a_task
from sd_atoms.errors import UserError, refuse, shortlist
from sd_atoms.sources import is_hub_id

LISTS = ("train800", "val200", "train800val200", "test")
LIST_OF = {"train": "train800val200"}  # split -> list, of VTAB-1k
SPLITS = ("train", "test")
LAYOUTS = (
    "train800val200.txt and test.txt of VTAB-1k, train-images-idx3-ubyte(.gz), train/nshards.txt of webdataset, "
    "train/CLASS/ and test/CLASS/, or what `datasets` reads"
)


def task_images(
    task: Task, place: str, split: str = "train", *, image_column: str = "image", label_column: str = "label"
) -> list[ImageRecord]:
    """The images of a split with their labels, and the prompts of their classes as captions.

    Args:
        task: whose images they are.
        place: the folder of the task, or one that holds it under one of its names, or the id of a data set on the hub.
        split: train, test or, of VTAB-1k, the name of a list: train800, val200, train800val200.
        image_column, label_column: of a table of `datasets`.

    Raises:
        UserError: nothing of the task is there, or everything that is wrong with it.
    """
    folder = task_folder(task, place)
    layout = layout_of(folder) if folder is not None else "datasets"
    if layout == "VTAB-1k":
        found = _listed(folder, LIST_OF.get(split, split), task)
    elif layout == "datasets":
        name, columns = str(folder or place), dict(image_column=image_column, label_column=label_column)
        found = table_images(name, split=split, label_of=partial(_labels_of, task, name), **columns)
    elif split not in SPLITS:
        raise UserError(f"dataset_split: {split!r}: {folder} has {' and '.join(SPLITS)}")
    else:
        found = READERS[layout](folder, split, task)
    wrong = [
        f"{image.name}: has label {image.label}; the {task.classes} classes of {task.name} are 0 to {task.classes - 1}"
        for image in found
        if not 0 <= image.label < task.classes
    ]
    refuse(wrong, f"{place}: {len(wrong)} of {len(found)} labels are out of range:")
    prompts = task.prompts
    return [replace(image, caption=prompts[image.label]) for image in found]


def task_folder(task: Task, place: str) -> Path | None:
    """The folder of a task; None for a name on the hub.

    Raises:
        UserError: there is no such folder, or it holds no layout that is known.
    """
    root = Path(place).expanduser()
    if not root.is_dir():
        if is_hub_id(place) and not root.exists():
            return None
        raise UserError(f"dataset_dir: {place}: is no folder; expected that of {task.name}, or one that holds it")
    for folder in (*(root / name for name in task.folders), root):
        if folder.is_dir() and layout_of(folder):
            if folder == root and root.name not in task.folders and is_folder_of_a_task(root.name):
                raise UserError(f"dataset_dir: {place}: is the folder of another task than {task.name}")
            return folder
    names = " or ".join(f"{name}/" for name in task.folders)
    raise UserError(f"dataset_dir: {place}: holds no images of {task.name}, in {names} or itself; expected {LAYOUTS}")


def layout_of(folder: Path) -> str | None:
    """What a folder holds: VTAB-1k, webdataset, IDX, class folders or datasets; None for nothing that is known."""
    if any((folder / f"{name}.txt").is_file() for name in LISTS):
        return "VTAB-1k"
    if any((folder / split / "nshards.txt").is_file() for split in SPLITS):
        return "webdataset"
    if any(find_idx(folder, split, "images") for split in SPLITS):
        return "IDX"
    if any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")) or any(
        next(folder.glob(pattern), None) for pattern in ("*.parquet", "data/*.parquet")
    ):
        return "datasets"
    if any(_class_folders(folder / split) for split in SPLITS):
        return "class folders"
    return None


def _listed(folder: Path, name: str, task: Task) -> list[ImageRecord]:
    """The images of a list of VTAB-1k; equal content under two paths is usual there, one path twice is not."""
    path = folder / f"{name}.txt"
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "is not UTF-8"
        raise UserError(f"{path}: cannot be read ({reason}); expected lines of `path label`") from error
    found, problems, seen, there = [], [], {}, {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            image, label = _entry(line.strip(), task)
        except ValueError as error:
            problems.append(f"{path}, line {number}: {error}")
            continue
        if image in seen:
            problems.append(f"{path}, line {number}: {image} is in line {seen[image]} already")
            continue
        seen[image] = number
        place = folder / image
        if place.parent not in there:  # one look at a folder: of thousands of files it is far quicker
            there[place.parent] = set(os.listdir(place.parent)) if place.parent.is_dir() else set()
        if place.name not in there[place.parent]:
            problems.append(f"{path}, line {number}: {image} is missing")
            continue
        found.append(replace(image_record(place), label=label))
    refuse(problems, f"{path}: {len(problems)} mistakes:")
    if not found:
        raise UserError(f"{path}: is empty; expected lines of `path label`")
    return found


def _entry(line: str, task: Task) -> tuple[str, int]:
    """The path and the label of a line; ValueError says what is wrong with it."""
    image, space, label = line.rpartition(" ")
    if not space or not re.fullmatch(r"-?\d{1,9}", label):
        raise ValueError(f"{line[:80]!r} is not `path label`")
    image = image.strip()
    if not 0 <= int(label) < task.classes:
        raise ValueError(f"label {label} is out of range; the {task.classes} classes are 0 to {task.classes - 1}")
    if PurePosixPath(image).is_absolute() or PureWindowsPath(image).drive or "\\" in image:
        raise ValueError(f"{image} is absolute or of another system; expected a path from the folder of the list on")
    if ".." in PurePosixPath(image).parts:
        raise ValueError(f"{image} leaves the folder of the list")
    return image, int(label)


def _idx(folder: Path, split: str, task: Task) -> list[ImageRecord]:
    images, labels = (find_idx(folder, split, what) for what in ("images", "labels"))
    if images is None or labels is None:
        raise UserError(f"{folder}: lacks the {'images' if images is None else 'labels'} of split {split}")
    return idx_images(images, labels)


def _shards(folder: Path, split: str, task: Task) -> list[ImageRecord]:
    names = folder / "classnames.txt"
    places = list(range(task.classes))
    if names.is_file():
        own = [line.strip() for line in names.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
        if len(own) != task.classes:
            raise UserError(f"{names}: has {len(own)} classes; {task.name} has {task.classes}")
        places = _labels_of(task, str(names), own)
    path = folder / split / "nshards.txt"
    text = path.read_text(encoding="utf-8-sig", errors="replace").strip() if path.is_file() else ""
    if not re.fullmatch(r"\d{1,6}", text) or not int(text):
        raise UserError(f"{path}: says {text[:40]!r}; expected the number of shards")
    shards = [folder / split / f"{number}.tar" for number in range(int(text))]
    refuse([f"{shard}: is missing; {path.name} says {text}" for shard in shards if not shard.is_file()],
            f"{folder / split}: shards are missing:")  # fmt: skip
    found = shard_images(shards, captions=False, classes=True)
    return [replace(image, label=places[image.label]) if 0 <= image.label < task.classes else image for image in found]


def _of_class_folders(folder: Path, split: str, task: Task) -> list[ImageRecord]:
    folders = _class_folders(folder / split)
    names = [path.name for path in folders]
    known = {_plain(name): label for label, name in enumerate(task.class_names)}
    if all(name.isdecimal() and _plain(name) not in known for name in names):  # classes without names go by number
        known = {str(label): label for label in range(task.classes)}
        names = [str(int(name)) for name in names]
    labels = [known.get(_plain(name)) for name in names]
    unknown = [path.name for path, label in zip(folders, labels, strict=True) if label is None]
    missing = [name for name in known if known[name] not in labels]
    if unknown or missing or len(set(labels)) < len(labels):
        kinds = {"not of it": unknown, "missing": missing}
        said = [f"{kind}: {shortlist(own)}" for kind, own in kinds.items() if own]
        raise UserError(
            f"{folder / split}: has {len(folders)} folders of classes, {task.name} has {task.classes} classes"
            + "".join(f"; {part}" for part in said)
        )
    return [
        replace(image_record(path), label=label)
        for place, label in sorted(zip(folders, labels, strict=True), key=lambda pair: pair[1])
        for path in scan_folder(place).paths
    ]


READERS: dict[str, Callable[[Path, str, Task], list[ImageRecord]]] = {
    "IDX": _idx,
    "webdataset": _shards,
    "class folders": _of_class_folders,
}


def _class_folders(folder: Path) -> list[Path]:
    """Folders directly inside a folder that hold images; hidden ones do not count."""
    if not folder.is_dir():
        return []
    inside = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    return [
        path
        for path in inside
        if any(name.lower().endswith(EXTENSIONS) and not name.startswith(".") for name in os.listdir(path))
    ]


def _plain(name: str) -> str:
    """A class's name without its letter case, spaces and signs."""
    return re.sub(r"[\W_]+", "", name.casefold())


def _labels_of(task: Task, where: str, names: Sequence[str]) -> list[int]:
    """The label in a task of each of a source's classes, by their names; by their order where it has none of these.

    Raises:
        UserError: some names are the task's, but at other places, and the rest are not.
    """
    known = {_plain(name): label for label, name in enumerate(task.class_names)}
    labels = [known.get(_plain(name)) for name in names]
    if None not in labels and len(set(labels)) == len(labels):
        return labels
    wrong = [name for place, (name, label) in enumerate(zip(names, labels, strict=True)) if label not in (None, place)]
    if wrong:
        raise UserError(
            f"{where}: its class {wrong[0]!r} has number {names.index(wrong[0])}, in {task.name} another, and not all "
            "of its classes go by the names of the task"
        )
    return list(range(len(names)))

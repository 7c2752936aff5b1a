"""What is on disk of the tasks of VTAB: counts, missing files, class balance, broken archives."""

import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from sd_atoms.data.labelled import LISTS, SPLITS, layout_of, task_folder, task_images
from sd_atoms.data.vtab import DEMO, Task
from sd_atoms.errors import UserError, shortlist

ARCHIVES = (".zip", ".tar", ".tgz", ".tar.gz")
USUAL = {"train800": 800, "val200": 200, "train800val200": 1000}
CHUNK = 2**20  # bytes


@dataclass(frozen=True)
class OnDisk:
    """What is on disk of a task.

    layout: as `layout_of`; None where nothing is there. train_images, test_images: 0 where a split cannot be read.
    smallest, largest: images of a class in the training split. problems: what is wrong. notes: what is odd.
    """

    task: Task
    layout: str | None = None
    train_images: int = 0
    test_images: int = 0
    smallest: int | None = None
    largest: int | None = None
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def state(self) -> str:
        """missing, broken, odd or whole."""
        if self.problems:
            return "broken"
        return "missing" if self.layout is None else "odd" if self.notes else "whole"


def check_task(task: Task, place: str, alone: bool) -> OnDisk:
    """Reads all lists and labels of a task, and sees that every file is there; no image is decoded.

    Args:
        task: whose images they are.
        place: the folder that holds the task's.
        alone: it may be the task's own folder.
    """
    try:
        folder = task_folder(task, place)
    except UserError:
        return OnDisk(task)
    if folder == Path(place).expanduser() and not alone:
        return OnDisk(task)
    layout, problems, found = layout_of(folder), [], {}
    for split in LISTS if layout == "VTAB-1k" else SPLITS:
        try:
            found[split] = Counter(image.label for image in task_images(task, str(folder), split))
        except UserError as error:
            problems += str(error).split("\n  ")
    counts = {split: sum(labels.values()) for split, labels in found.items()}
    train = found.get("train800val200", found.get("train"))
    notes = []
    for split, labels in found.items():
        empty = [name for label, name in enumerate(task.class_names) if not labels[label]]
        if empty:
            notes.append(f"{split}: {len(empty)} of {task.classes} classes have no image: {shortlist(empty)}")
    usual = {"test": task.test_images} | (USUAL if layout == "VTAB-1k" else {})
    notes += [
        f"{split}: {counts[split]:,} images, {count:,} are usual"
        for split, count in usual.items()
        if task.name not in DEMO and counts.get(split, count) != count
    ]
    if USUAL.keys() <= counts.keys() and counts["train800"] + counts["val200"] != counts["train800val200"]:
        notes.append("train800 and val200 together are not as many as train800val200")
    sizes = [train[label] for label in range(task.classes)] if train else []
    return OnDisk(
        task,
        layout,
        sum(sizes),
        counts.get("test", 0),
        min(sizes, default=None),
        max(sizes, default=None),
        tuple(problems),
        tuple(notes),
    )


def check_archives(tasks: Sequence[Task], folder: Path) -> list[tuple[str, bool]]:
    """A line on each zip or tar file directly inside a folder, and whether it is broken; all of it is read."""
    found = []
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.name.lower().endswith(ARCHIVES) and not path.name.startswith("."):
            try:
                names = _tested_zip(path) if path.suffix.lower() == ".zip" else _tested_tar(path)
            except (OSError, EOFError, zlib.error, zipfile.BadZipFile, tarfile.TarError, NotImplementedError,
                    RuntimeError, ValueError) as error:  # fmt: skip
                found.append((f"{path}: broken ({' '.join(str(error).split())}); download it again", True))
                continue
            folders = {part for name in names for part in PurePosixPath(name).parts[:-1]}
            missing = [task.name for task in tasks if not folders & set(task.folders)]
            lacks = f", not {', '.join(missing)}" if 0 < len(missing) < len(tasks) else ""
            text = f"{path}: whole, holds {len(tasks) - len(missing)} of {len(tasks)} tasks{lacks}; unpack it here"
            found.append((text, False))
    return found


def _tested_zip(path: Path) -> list[str]:
    with zipfile.ZipFile(path) as archive:
        broken = archive.testzip()
        if broken is not None:
            raise zipfile.BadZipFile(f"{broken} is damaged")
        return archive.namelist()


def _tested_tar(path: Path) -> list[str]:
    names = []
    with tarfile.open(path) as archive:
        for entry in archive:
            names.append(entry.name)
            content, left = archive.extractfile(entry) if entry.isfile() else None, entry.size
            while content and (part := content.read(CHUNK)):
                left -= len(part)
            if content and left:
                raise tarfile.ReadError(f"{entry.name} is cut short")
    return names

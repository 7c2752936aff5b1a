"""Labelled images in the layouts that people have, as a training set, a test set and the names of the classes."""

import csv
import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from io import BytesIO
from pathlib import Path

from PIL import Image

from sd_atoms.data.images import natural_key, scan_folder
from sd_atoms.data.labelled import task_images
from sd_atoms.data.records import ImageRecord, image_record
from sd_atoms.data.vtab import PREFIX, load_task
from sd_atoms.errors import UserError, refuse, shortlist

TEST_FOLDERS = ("test", "val", "valid", "validation")
CIFAR_SIDE_PX = 32
CIFAR_PIXELS = 3 * CIFAR_SIDE_PX**2
LAYOUTS = (
    "train/CLASS/ with test/CLASS/ or val/CLASS/, CLASS/ alone, a CSV file of path,label, images.txt of CUB-200-2011, "
    "train.bin of CIFAR-100"
)


@dataclass(frozen=True)
class LabelledSet:
    """What a classifier learns and is tested on; `label` of each record counts in class_names."""

    train: list[ImageRecord]
    test: list[ImageRecord]
    class_names: tuple[str, ...]


def open_set(
    data: str,
    *,
    dataset_dir: str | None = None,
    test_data: str | None = None,
    test_share: float | None = 0.2,
    seed: int | None = 0,
) -> LabelledSet:
    """The labelled images of a place.

    Args:
        data: vtab:TASK, or a folder or CSV file in one of the layouts above.
        dataset_dir: where the images of a VTAB task are, or the id of a table of `datasets`.
        test_data: a second folder of classes, or CSV file, to test on.
        test_share: of each class, where the place has no test images of its own; drawn by the seed. None refuses that.
        seed: of that.

    Raises:
        UserError: there are none, or everything that is wrong with them.
    """
    if dataset_dir is not None and not data.startswith(PREFIX):
        raise UserError(f"dataset_dir: {dataset_dir}: data={data} has its own images; {PREFIX}TASK needs a folder")
    if data.startswith(PREFIX):
        _refuse_test_data(data, test_data)
        task = load_task(data.removeprefix(PREFIX))
        if dataset_dir is None:
            raise UserError(f"dataset_dir is required: the folder that holds the images of {data}")
        sets = [task_images(task, dataset_dir, split) for split in ("train", "test")]
        return LabelledSet(*sets, task.class_names)
    place = Path(data).expanduser()
    if not place.exists():
        raise UserError(f"data: {data}: no such file or folder; expected {LAYOUTS}, or {PREFIX}TASK")
    if place.is_file():
        train, names = _listed(place)
        test, names = test_images(test_data, names)
    elif (place / "images.txt").is_file() and (place / "image_class_labels.txt").is_file():
        _refuse_test_data(data, test_data)
        return _cub(place)
    elif (place / "train.bin").is_file():
        _refuse_test_data(data, test_data)
        return _cifar(place)
    elif any((place / name).is_file() for name in ("train", "meta", "data_batch_1")):
        raise UserError(f"{place}: holds CIFAR as pickles, which can run code; take the binary version (train.bin)")
    else:
        inner = place / "train" if (place / "train").is_dir() else place
        own_test = (
            next((place / name for name in TEST_FOLDERS if (place / name).is_dir()), None) if inner != place else None
        )
        train, names = _class_folders(inner)
        test, names = test_images(test_data or own_test, names)
    if not test:
        if test_share is None or seed is None:
            raise UserError(
                f"seed, test_share: {data} has no test images of its own, and the classifiers kept different ones "
                "from their trainings; say which"
            )
        train, test = _split(train, test_share, seed)
    learned = {Path(record.name).resolve() for record in train}
    both = [record.name for record in test if Path(record.name).resolve() in learned]
    if both:
        raise UserError(f"{len(both)} images to test on are also among those to learn from, such as {both[0]}")
    missing = sorted(set(range(len(names))) - {record.label for record in train})
    if missing:
        raise UserError(f"{data}: no image to learn {names[missing[0]]!r} from")
    return LabelledSet(train, test, names)


def _refuse_test_data(data: str, test_data: str | None) -> None:
    if test_data is not None:
        raise UserError(f"test_data: {test_data}: {data} has test images of its own")


def test_images(place: str | Path | None, names: tuple[str, ...]) -> tuple[list[ImageRecord], tuple[str, ...]]:
    """The images of a folder of classes or a CSV file, by what a classifier calls its classes; of None there are none.

    Raises:
        UserError: there are none, everything that is wrong with them, or a class that it does not know.
    """
    if place is None:
        return [], names
    place = Path(place).expanduser()
    if not place.exists():
        raise UserError(f"test_data: {place}: no such file or folder")
    found, own = _listed(place, 1) if place.is_file() else _class_folders(place, 1)
    unknown = [name for name in own if name not in names]
    if unknown:
        raise UserError(f"{place}: class {unknown[0]!r} is not among those learned: {shortlist(names)}")
    return [replace(record, label=names.index(own[record.label])) for record in found], names


def _class_folders(place: Path, least: int = 2) -> tuple[list[ImageRecord], tuple[str, ...]]:
    """A folder per class, labels in the order of their names (ImageNet's synsets come in theirs)."""
    folders = sorted(path for path in place.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not folders:
        raise UserError(f"{place}: holds no folders of classes; expected {LAYOUTS}")
    if len(folders) < least:
        raise UserError(f"{place}: has one class, {folders[0].name}; two are needed to tell apart")
    found, empty = [], []
    for label, folder in enumerate(folders):
        try:
            found += [replace(image_record(path), label=label) for path in scan_folder(folder).paths]
        except UserError as error:
            empty.append(str(error))
    refuse(empty, f"{place}: {len(empty)} of {len(folders)} classes cannot be used:")
    return found, tuple(folder.name for folder in folders)


def _listed(path: Path, least: int = 2) -> tuple[list[ImageRecord], tuple[str, ...]]:
    """A file of `path,label` lines with that heading, or of any two columns without one; paths count from there."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            rows = [(reader.line_num, row) for row in reader if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as CSV ({getattr(error, 'strerror', None) or error})") from error
    columns = (0, 1)
    if rows and {"path", "label"} <= {cell.strip().lower() for cell in rows[0][1]}:
        head = [cell.strip().lower() for cell in rows.pop(0)[1]]
        columns = (head.index("path"), head.index("label"))
    problems, entries, lines = [], [], {}
    for line, row in rows:
        if len(row) <= max(columns) or not all(row[column].strip() for column in columns):
            problems.append(f"{path}, line {line}: {','.join(row)[:80]!r} is not path,label")
            continue
        image, label = (row[column].strip() for column in columns)
        if not (path.parent / image).is_file():
            heading = "; a heading would say path,label" * (line == rows[0][0])
            problems.append(f"{path}, line {line}: {image} is missing{heading}")
        elif image in lines:  # it could be learned and tested on at once
            problems.append(f"{path}, line {line}: {image} is on line {lines[image]} already")
        lines[image] = line
        entries.append((image, label))
    refuse(problems, f"{path}: {len(problems)} of {len(rows)} lines cannot be used:")
    names = sorted({label for _, label in entries}, key=natural_key)
    if len(names) < least:
        raise UserError(f"{path}: has {len(names)} classes; {least} or more are needed")
    known = {name: label for label, name in enumerate(names)}
    return [replace(image_record(path.parent / image), label=known[label]) for image, label in entries], tuple(names)


def _cub(place: Path) -> LabelledSet:
    """CUB-200-2011 as distributed: images.txt, image_class_labels.txt, train_test_split.txt, classes.txt."""
    paths, labels, of_train, classes = (
        _numbered(place / name)
        for name in ("images.txt", "image_class_labels.txt", "train_test_split.txt", "classes.txt")
    )
    for name, table in (("image_class_labels.txt", labels), ("train_test_split.txt", of_train)):
        if table.keys() != paths.keys():
            odd = sorted(paths.keys() ^ table.keys(), key=natural_key)[0]
            raise UserError(f"{place / name}: does not list the images of images.txt; they differ in number {odd}")
    order = {number: label for label, number in enumerate(sorted(classes, key=natural_key))}
    names = tuple(classes[number] for number in order)
    sets, missing = {"0": [], "1": []}, []
    for number, name in paths.items():
        path = place / "images" / name
        missing += [] if path.is_file() else [name]
        if labels[number] not in order or of_train[number] not in sets:
            raise UserError(f"{place}: image {number} is of class {labels[number]}, split {of_train[number]}, unknown")
        sets[of_train[number]].append(replace(image_record(path), label=order[labels[number]]))
    if missing:
        count = f"{len(missing):,} of the {len(paths):,} images of images.txt"
        raise UserError(f"{place / 'images'}: {count} are missing: {shortlist(missing)}")
    return LabelledSet(sets["1"], sets["0"], names)


def _numbered(path: Path) -> dict[str, str]:
    """number -> what stands behind it on its line."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    entries = [line.strip().split(None, 1) for line in lines if line.strip()]
    if not entries or any(len(entry) < 2 for entry in entries):
        raise UserError(f"{path}: is no list of numbers and entries, as CUB-200-2011 has it")
    return dict(entries)


def _cifar(place: Path) -> LabelledSet:
    """CIFAR-100's binary version: a coarse label, a fine label, 3,072 bytes of red, green and blue, over and over."""
    names = place / "fine_label_names.txt"
    if not names.is_file():
        raise UserError(f"{place}: lacks {names.name}; only CIFAR-100 is read, in its binary version")
    class_names = tuple(line.strip() for line in names.read_text(encoding="utf-8").splitlines() if line.strip())
    sets = []
    for split in ("train", "test"):
        path, size = place / f"{split}.bin", CIFAR_PIXELS + 2
        length = path.stat().st_size if path.is_file() else 0
        if not length or length % size:
            raise UserError(
                f"{path}: has {length:,} bytes; expected a multiple of {size:,}: it is missing or cut short"
            )
        labels = path.read_bytes()[1::size]
        if max(labels) >= len(class_names):
            raise UserError(f"{path}: has label {max(labels)}; {names.name} names {len(class_names)} classes")
        sets.append(
            [
                ImageRecord(f"{path} image {number}", None, partial(_cifar_image, str(path), number), label=label)
                for number, label in enumerate(labels)
            ]
        )
    return LabelledSet(*sets, class_names)


def _cifar_image(path: str, number: int) -> bytes:
    """An image as a BMP file."""
    planes = _cifar_bytes(path)[number * (CIFAR_PIXELS + 2) + 2 :][:CIFAR_PIXELS]
    area = CIFAR_PIXELS // 3
    bands = [Image.frombytes("L", (CIFAR_SIDE_PX,) * 2, planes[area * band : area * (band + 1)]) for band in range(3)]
    file = BytesIO()
    Image.merge("RGB", bands).save(file, format="BMP")
    return file.getvalue()


@functools.lru_cache(maxsize=2)
def _cifar_bytes(path: str) -> memoryview:
    return memoryview(Path(path).read_bytes())


def _split(records: Sequence[ImageRecord], share: float, seed: int) -> tuple[list[ImageRecord], list[ImageRecord]]:
    """Training and test images: of each class a share, at least one, by its images' names and the seed."""
    by_class: dict[int, list[ImageRecord]] = {}
    for record in records:
        by_class.setdefault(record.label, []).append(record)
    train, test = [], []
    for label, own in sorted(by_class.items()):
        order = sorted(own, key=lambda record: record.name)
        random.Random(f"{seed}/{label}").shuffle(order)
        count = max(1, round(share * len(order)))
        if count >= len(order):
            raise UserError(f"data: a class has {len(order)} images; test_share={share} leaves none to learn from")
        test += order[:count]
        train += order[count:]
    return train, test


def some_of(records: Sequence[ImageRecord], most: int | None, seed: str) -> list[ImageRecord]:
    """At most so many, drawn by a seed, in their order."""
    if most is None or most >= len(records):
        return list(records)
    places = sorted(random.Random(seed).sample(range(len(records)), most))
    return [records[place] for place in places]


def labels_among(records: Sequence[ImageRecord], names: Sequence[str], known: Sequence[str], whose: str) -> list[int]:
    """Labels of images, which count in `names`, as a classifier counts that knows the classes `known`.

    Raises:
        UserError: it does not know one of them.
    """
    unknown = [names[record.label] for record in records if names[record.label] not in known]
    if unknown:
        raise UserError(f"data: class {unknown[0]!r} is not among the {len(known)} of {whose}")
    places = {name: label for label, name in enumerate(known)}
    return [places[names[record.label]] for record in records]

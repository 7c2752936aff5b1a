"""Small real data sets laid out as VTAB-1k is: four lists of `path label`, and the images that they name."""

import io
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from PIL import Image

from sd_atoms.data.dsprites import COUNT, draw_sprite, factors_of, location_class, orientation_class
from sd_atoms.data.idx import find_idx, idx_images
from sd_atoms.errors import UserError
from sd_atoms.files import write_text
from sd_atoms.pocket.world import LANDMARKS, render, sample
from sd_atoms.progress import followed

DEBIAN = "/usr/share/datasets/fashion-mnist"  # of the package dataset-fashion-mnist
TRAIN_SHARE = 0.8  # of the training images; the others are val200
SPLITS = ("train", "test")
Labelled = tuple[Image.Image, dict[str, int]]  # an image, and its label in each task of its set


def make_dsprites(folder: Path, train_images: int, test_images: int, seed: int) -> None:
    """dsprites_loc and dsprites_ori: the same images of all factors, none twice, under two labellings."""
    count = train_images + test_images
    if count > COUNT:
        raise UserError(f"train_images and test_images: {count:,} are more than the {COUNT:,} images of dSprites")
    numbers = random.Random(f"{seed}/dsprites").sample(range(COUNT), count)

    def made(place: int) -> Labelled:
        factors = factors_of(numbers[place])
        labels = {"dsprites_loc": location_class(factors), "dsprites_ori": orientation_class(factors)}
        return draw_sprite(factors), labels

    _write(folder, ("dsprites_loc", "dsprites_ori"), made, train_images, test_images)


def make_fashion_mnist(folder: Path, train_images: int, test_images: int, seed: int, source: Path) -> None:
    """fashion_mnist: images of its own splits, from the IDX files in a folder."""
    records = []
    for split, count in zip(SPLITS, (train_images, test_images), strict=True):
        images, labels = (find_idx(source, split, what) for what in ("images", "labels"))
        if images is None or labels is None:
            raise UserError(f"fashion_mnist_dir: {source}: lacks the IDX files of split {split}")
        found = idx_images(images, labels)
        if count > len(found):
            raise UserError(f"{split}_images: {count:,} are more than the {len(found):,} of {source}")
        records += random.Random(f"{seed}/fashion_mnist/{split}").sample(found, count)

    def made(place: int) -> Labelled:
        return records[place].read(), {"fashion_mnist": records[place].label}

    _write(folder, ("fashion_mnist",), made, train_images, test_images)


def make_pocket_world(folder: Path, train_images: int, test_images: int, seed: int) -> None:
    """pocket_world: landmarks of the pocket world in autumn, 128 px; some classes are rarer, as they are there."""

    def made(place: int) -> Labelled:
        scene = replace(sample(random.Random(f"{seed}/pocket_world/{place}")), setting="autumn", special="none")
        return render(scene), {"pocket_world": list(LANDMARKS).index(scene.landmark)}

    _write(folder, ("pocket_world",), made, train_images, test_images)


def is_there(folder: Path, task: str, train_images: int, test_images: int) -> bool:
    """Whether a task of so many images was laid out before; the lists are written last.

    Raises:
        UserError: it was, with other numbers of images.
    """
    lists = [folder / task / f"{name}.txt" for name in ("train800val200", "test")]
    if not all(path.is_file() for path in lists):
        return False
    counts = [len(path.read_text(encoding="utf-8").splitlines()) for path in lists]
    if counts != [train_images, test_images]:
        raise UserError(
            f"{folder / task}: is there with {counts[0]:,} images for training and {counts[1]:,} for the test, asked "
            f"are {train_images:,} and {test_images:,}; remove it, or name another folder"
        )
    return True


def _write(
    folder: Path, tasks: Sequence[str], made: Callable[[int], Labelled], train_images: int, test_images: int
) -> None:
    lines: dict[tuple[str, str], list[str]] = {}
    count, first = train_images + test_images, round(TRAIN_SHARE * train_images)

    def lists_of(place: int) -> Iterator[tuple[str, int]]:
        """The lists that an image is in, and its number in each."""
        if place >= train_images:
            yield "test", place - train_images
            return
        yield ("train800", place) if place < first else ("val200", place - first)
        yield "train800val200", place

    for place in followed(range(count), count, f"Images of {tasks[0]}", "image"):
        image, labels = made(place)
        content = _jpeg(image)
        for task in tasks:
            for name, number in lists_of(place):
                path = f"images/{name}/{number:06d}.jpg"
                (folder / task / path).parent.mkdir(parents=True, exist_ok=True)
                (folder / task / path).write_bytes(content)
                lines.setdefault((task, name), []).append(f"{path} {labels[task]}\n")
    for (task, name), own in lines.items():
        write_text(folder / task / f"{name}.txt", "".join(own))


def _jpeg(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, format="JPEG", quality=95, subsampling=0)
    return file.getvalue()

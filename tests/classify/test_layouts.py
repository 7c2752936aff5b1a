"""Labelled images in the layouts that people have, and what is said of broken ones."""

import pickle
import random

import pytest
from small import COLOURS, coloured, write_classes

from sd_atoms.classify.images import open_set
from sd_atoms.errors import UserError

NAMES = tuple(COLOURS)


def shown(records):
    """(label, colour) of each: what its mean says."""
    found = []
    for record in records:
        mean = record.read().resize((1, 1)).getpixel((0, 0))
        found.append(
            (record.label, min(NAMES, key=lambda n: sum((a - b) ** 2 for a, b in zip(mean, COLOURS[n], strict=True))))
        )
    return found


def assert_right(records, count):
    assert len(records) == count
    assert all(NAMES[label] == colour for label, colour in shown(records))


def test_folders_of_classes_with_and_without_test_images(tmp_path):
    write_classes(tmp_path / "set" / "train", 4)
    write_classes(tmp_path / "set" / "val", 2)
    found = open_set(str(tmp_path / "set"))
    assert found.class_names == NAMES
    assert_right(found.train, 12)
    assert_right(found.test, 6)
    alone = open_set(str(tmp_path / "set" / "train"), test_share=0.25, seed=3)
    assert_right(alone.train, 9)
    assert_right(alone.test, 3)
    assert {record.name for record in alone.train}.isdisjoint(record.name for record in alone.test)
    again = open_set(str(tmp_path / "set" / "train"), test_share=0.25, seed=3)
    assert [record.name for record in again.test] == [record.name for record in alone.test]
    other = open_set(str(tmp_path / "set" / "train"), test_data=str(tmp_path / "set" / "val"))
    assert_right(other.test, 6)


def test_a_csv_file(tmp_path):
    write_classes(tmp_path / "images", 3)
    rows = [f"images/{name}/{number}.png,{name}" for name in NAMES for number in range(3)]
    (tmp_path / "a.csv").write_text("\n".join(rows))
    assert_right(open_set(str(tmp_path / "a.csv"), test_share=0.3).train, 6)
    turned = [f"{label},x,{path}" for path, _, label in (row.partition(",") for row in rows)]
    (tmp_path / "b.csv").write_text("label,other,path\r\n" + "\r\n".join(turned))
    write_classes(tmp_path / "others", 3)
    (tmp_path / "c.csv").write_text("\n".join(rows).replace("images/", "others/"))
    found = open_set(str(tmp_path / "b.csv"), test_data=str(tmp_path / "c.csv"))
    assert_right(found.train, 9)
    assert_right(found.test, 9)


def test_cub_as_distributed(tmp_path):
    folders = [f"{number:03d}.{name}" for number, name in enumerate(NAMES, 1)]
    images, labels, split = [], [], []
    for label, (folder, name) in enumerate(zip(folders, NAMES, strict=True), 1):
        (tmp_path / "images" / folder).mkdir(parents=True)
        for number in range(3):
            coloured(name, number).save(tmp_path / "images" / folder / f"{number}.jpg")
            images.append(f"{len(images) + 1} {folder}/{number}.jpg")
            labels.append(f"{len(images)} {label}")
            split.append(f"{len(images)} {int(number < 2)}")
    texts = {
        "images.txt": images, "image_class_labels.txt": labels, "train_test_split.txt": split,
        "classes.txt": [f"{n} {folder}" for n, folder in enumerate(folders, 1)],
    }  # fmt: skip
    for name, lines in texts.items():
        (tmp_path / name).write_text("\n".join(lines) + "\n")
    found = open_set(str(tmp_path))
    assert found.class_names == tuple(folders)
    assert_right(found.train, 6)
    assert_right(found.test, 3)
    (tmp_path / "train_test_split.txt").write_text("\n".join(split[:-1]))
    with pytest.raises(UserError, match="differ in number 9"):
        open_set(str(tmp_path))
    (tmp_path / "train_test_split.txt").write_text("\n".join(split))
    for folder in folders:
        (tmp_path / "images" / folder / "1.jpg").unlink()
    with pytest.raises(
        UserError, match=r"images: 3 of the 9 images of images.txt are missing: 001.blue/1.jpg, 002.green/1.jpg, 00"
    ):
        open_set(str(tmp_path))


def cifar(folder, count):
    folder.mkdir()
    (folder / "fine_label_names.txt").write_text("\n".join(NAMES))
    for split in ("train", "test"):
        content = b""
        for number in range(count):
            for label, name in enumerate(NAMES):
                image = coloured(name, number).resize((32, 32))
                content += bytes((7, label)) + b"".join(band.tobytes() for band in image.split())
        (folder / f"{split}.bin").write_bytes(content)
    return folder


def test_cifar_100_in_its_binary_version(tmp_path):
    folder = cifar(tmp_path / "cifar", 2)
    found = open_set(str(folder))
    assert found.class_names == NAMES
    assert_right(found.train, 6)
    assert_right(found.test, 6)
    (folder / "test.bin").write_bytes((folder / "test.bin").read_bytes()[:-5])
    with pytest.raises(UserError, match="multiple of 3,074"):
        open_set(str(folder))
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "train").write_bytes(pickle.dumps({}))
    with pytest.raises(UserError, match="pickles, which can run code"):
        open_set(str(pickled))


def empty_class(folder):
    write_classes(folder, 2)
    (folder / "yellow").mkdir()
    return folder


def one_class(folder):
    return write_classes(folder, 2, ("red",))


def too_few(folder):
    return write_classes(folder, 1)


def unknown_label(folder):
    write_classes(folder / "train", 2, ("red", "blue"))
    write_classes(folder / "test", 2, ("red", "green"))
    return folder


def missing_image(folder):
    folder.mkdir()
    (folder / "a.csv").write_text("a.png,red\nb.png,blue\n")
    return folder / "a.csv"


def bad_row(folder):
    folder.mkdir()
    coloured("red", 0).save(folder / "a.png")
    (folder / "a.csv").write_text("a.png,red\na.png\n")
    return folder / "a.csv"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (empty_class, "yellow: no images"),
        (one_class, "has one class, red"),
        (too_few, "leaves none to learn from"),
        (unknown_label, "class 'green' is not among those learned"),
        (missing_image, "line 1: a.png is missing"),
        (bad_row, "line 2: 'a.png' is not path,label"),
        (lambda folder: folder / "nowhere", "no such file or folder"),
    ],
)
def test_what_cannot_be_learned_from_is_said(tmp_path, make, message):
    with pytest.raises(UserError, match=message):
        open_set(str(make(tmp_path / "x")))


def test_an_image_is_not_learned_and_tested_on(tmp_path):
    for number in range(3):
        coloured("red", number).save(tmp_path / f"{number}.png")
    (tmp_path / "train.csv").write_text("0.png,red\n1.png,blue\n")
    (tmp_path / "test.csv").write_text("2.png,red\n1.png,blue\n")
    with pytest.raises(UserError, match="1 images to test on are also among those to learn from, such as .*1.png"):
        open_set(str(tmp_path / "train.csv"), test_data=str(tmp_path / "test.csv"))


def test_some_of_many_are_the_same_ones_each_time():
    from sd_atoms.classify.images import some_of

    records = list(range(100))
    random.seed(1)
    first = some_of(records, 7, "0/train")
    assert first == sorted(first) == some_of(records, 7, "0/train")
    assert first != some_of(records, 7, "1/train")
    assert some_of(records, 100, "0") == records

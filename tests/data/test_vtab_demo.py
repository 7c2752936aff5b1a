"""The demonstration sets: dSprites against its definition, Fashion-MNIST against its source, all as VTAB-1k."""

import gzip
import struct
from collections import Counter

import numpy as np
import pytest

from sd_atoms.commands.vtab import make_demo
from sd_atoms.data.dsprites import COUNT, SHAPES, Factors, draw_sprite, factors_of, orientation_class
from sd_atoms.data.labelled import task_images
from sd_atoms.data.vtab import load_task
from sd_atoms.data.vtab_check import check_task
from sd_atoms.errors import UserError


def mask(factors: Factors) -> np.ndarray:
    """(64, 64) of 0 and 1."""
    pixels = np.asarray(draw_sprite(factors))
    assert set(np.unique(pixels)) == {0, 255}
    assert (pixels[..., 0] == pixels[..., 1]).all()
    return pixels[..., 0] // 255


def area(factors: Factors) -> float:
    """Pixels of a shape, the mean over orientations."""
    return np.mean([mask(factors._replace(orientation=orientation)).sum() for orientation in range(1, 40, 4)])


def middle(pixels: np.ndarray) -> np.ndarray:
    return np.argwhere(pixels).mean(0)[::-1]  # x, y


@pytest.mark.parametrize("shape", range(3))
def test_factors_mean_what_they_say(shape):
    first = Factors(shape, 5, 0, 3, 8)
    x, y = middle(mask(first))
    assert np.allclose(middle(mask(first._replace(x=30))), (x + 27, y))
    assert np.allclose(middle(mask(first._replace(y=20))), (x, y + 12))
    assert np.array_equal(mask(first), mask(first._replace(orientation=39)))  # 0 and 2π
    areas = [area(first._replace(scale=scale)) for scale in range(6)]
    for scale, own in enumerate(areas):  # linear from half to all of the size, so the area goes with the square
        assert own / areas[5] == pytest.approx((0.5 + 0.1 * scale) ** 2, rel=0.05)


def test_shapes_are_those_of_dsprites():
    areas = {name: area(Factors(number, 5, 0, 16, 16)) for number, name in enumerate(SHAPES)}
    radius = 15.5
    assert areas["square"] == pytest.approx(2 * radius**2, rel=0.05)
    assert areas["ellipse"] == pytest.approx(np.pi * radius**2 / 2, rel=0.05)
    heart = mask(Factors(2, 5, 0, 16, 16))
    assert np.array_equal(heart, heart[:, ::-1]) or (heart != heart[:, ::-1]).mean() < 0.02  # left and right alike
    widths = heart.sum(1)[heart.any(1)]
    assert widths[-1] < widths[len(widths) // 3]  # point down


@pytest.mark.parametrize("corner", [(0, 0), (31, 0), (0, 31), (31, 31)])
def test_no_shape_leaves_the_image(corner):
    for shape in range(3):
        for orientation in range(0, 40, 7):
            whole, own = mask(Factors(shape, 5, orientation, 16, 16)), mask(Factors(shape, 5, orientation, *corner))
            assert own.sum() == whole.sum()


def test_numbers_go_through_all_factors_once():
    assert COUNT == 737_280
    assert factors_of(0) == (0, 0, 0, 0, 0)
    assert factors_of(33) == (0, 0, 0, 1, 1)
    assert factors_of(COUNT - 1) == (2, 5, 39, 31, 31)
    sizes = Counter(orientation_class(Factors(0, 0, o, 0, 0)) for o in range(40))
    assert [sizes[label] for label in range(16)] == [3, 2] * 8


@pytest.fixture
def garments(tmp_path):
    """IDX files as Debian has them, of other pixels."""
    folder = tmp_path / "idx"
    folder.mkdir()
    for begin, count in (("train", 40), ("t10k", 30)):
        pixels = (np.arange(count * 28 * 28) % 251).astype(np.uint8)
        labels = bytes(number % 10 for number in range(count))
        for name, head, body in (
            ("images-idx3", struct.pack(">4I", 0x803, count, 28, 28), pixels.tobytes()),
            ("labels-idx1", struct.pack(">2I", 0x801, count), labels),
        ):
            (folder / f"{begin}-{name}-ubyte.gz").write_bytes(gzip.compress(head + body))
    return folder


def settings(folder, garments, **changes) -> make_demo.Settings:
    given = dict(folder=str(folder), train_images=20, test_images=10, fashion_mnist_dir=str(garments))
    return make_demo.Settings(**given | changes)


def test_three_sets_as_vtab_1k_once_and_the_same_again(tmp_path, garments, capsys):
    for name in ("a", "b"):
        make_demo.run(settings(tmp_path / name, garments))
    capsys.readouterr()
    make_demo.run(settings(tmp_path / "a", garments))
    assert capsys.readouterr().out.count(": is there") == 3
    for name in ("dsprites_loc", "dsprites_ori", "fashion_mnist", "pocket_world"):
        task = load_task(name)
        look = check_task(task, str(tmp_path / "a"), False)
        assert (look.layout, look.train_images, look.test_images) == ("VTAB-1k", 20, 10)
        assert not look.problems
        for split, count in (("train800", 16), ("val200", 4), ("train800val200", 20), ("test", 10)):
            first, second = (task_images(task, str(tmp_path / place), split) for place in ("a", "b"))
            assert len(first) == count
            assert [image.content() for image in first] == [image.content() for image in second]
            assert [image.label for image in first] == [image.label for image in second]
    location, orientation = (
        task_images(load_task(f"dsprites_{name}"), str(tmp_path / "a")) for name in ("loc", "ori")
    )
    assert [image.content() for image in location] == [image.content() for image in orientation]
    for image in location:  # the label is where the shape is; a heart's middle lies off its centre, at most by 2 px
        x = middle(np.asarray(image.read())[..., 0] > 127)[0]
        assert abs((x - 16.5) / 2 - image.label - 0.25) < 2


def test_images_of_fashion_mnist_are_those_of_its_source(tmp_path, garments):
    make_demo.run(settings(tmp_path / "demo", garments, sets="fashion_mnist", train_images=40, test_images=30))
    own = task_images(load_task("fashion_mnist"), str(tmp_path / "demo"))
    source = task_images(load_task("fashion_mnist"), str(garments))
    assert sorted(image.label for image in own) == sorted(image.label for image in source)
    made = [np.asarray(image.read(), dtype=int)[..., 0] for image in source]
    for image in own[:5]:
        pixels = np.asarray(image.read(), dtype=int)[..., 0]
        nearest = min(range(40), key=lambda number: np.abs(made[number] - pixels).mean())
        assert source[nearest].label == image.label


def test_what_cannot_be_made_is_said(tmp_path, garments):
    make_demo.run(settings(tmp_path / "demo", garments, sets="dsprites"))
    for changes, why in (
        (dict(sets="dsprites", test_images=11), "is there with 20 images for training and 10 for the test"),
        (dict(sets="cifar"), "sets: cifar: of dsprites, fashion_mnist, pocket_world"),
        (dict(sets="fashion_mnist", train_images=41), "train_images: 41 are more than the 40 of"),
        (dict(sets="fashion_mnist", fashion_mnist_dir="nowhere"), "apt-get install dataset-fashion-mnist"),
        (dict(sets="fashion_mnist", fashion_mnist_dir=str(tmp_path)), "lacks the IDX files of split train"),
    ):
        with pytest.raises(UserError, match=why):
            make_demo.run(settings(tmp_path / "demo", garments, **changes))
    with pytest.raises(UserError, match="is a file"):
        make_demo.run(settings(garments / "t10k-images-idx3-ubyte.gz", garments))

"""`classify cam`: which layers have maps, what goes through the classifiers, and what the sheet shows."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from small import coloured, write_classes, write_model
from torch import nn

from sd_atoms.classify import cam as maps
from sd_atoms.classify.cam import maps_of
from sd_atoms.classify.models import Classifier, Preprocessing, open_classifier
from sd_atoms.cli import main
from sd_atoms.commands.classify import cam
from sd_atoms.data.records import ImageRecord
from sd_atoms.report.classifier import cam_sheet

SIDE = 32


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Runs of two sizes, "small/run" and "large/run", on one ResNet, and images."""
    folder = tmp_path_factory.mktemp("cam")
    write_model(folder / "model", "resnet")
    write_classes(folder / "set", 6)
    for name, size_px in (("small", 32), ("large", 48)):
        own = ["--max_train_steps=1", "--train_batch_size=2", "--report_to=none", f"--size_px={size_px}"]
        own += [f"--model={folder / 'model'}", f"--data={folder / 'set'}", f"--output_dir={folder / name / 'run'}"]
        assert main(["classify", "train", "--method=head", *own]) == 0
    return folder


@pytest.fixture
def draw(place, tmp_path, monkeypatch):
    """Draws both, with three images, and returns the exit code."""
    monkeypatch.chdir(place)
    words = ["classify", "cam", "--classifiers=small/run,large/run", "--data=set", f"--model={place / 'model'}"]
    outputs = [f"--out={tmp_path / 'cam.png'}", f"--json={tmp_path / 'cam.json'}"]
    return lambda *more: main([*words, "--images=3", *outputs, *more])


class Several(nn.Module):
    """Two maps as a tuple, as blocks of some transformers have it."""

    def forward(self, x):
        return x, x


class Network(nn.Module):
    """A convolution, a layer that returns a tuple, one with channels at the end, one that is never asked, a head."""

    def __init__(self):
        super().__init__()
        self.conv, self.several, self.last = nn.Conv2d(3, 8, 3, stride=4), Several(), nn.LayerNorm(8)
        self.idle, self.head = nn.Identity(), nn.Linear(8, 3)

    def forward(self, pixels):
        x, _ = self.several(self.conv(pixels))
        return self.head(self.last(x.permute(0, 2, 3, 1)).mean((1, 2)))


@pytest.mark.parametrize(
    ("layer", "what"),
    [
        ("several", "gives no tensor, no map"),
        ("idle", "gives no tensor, no map"),
        ("last", r"gives \(1, 15, 15, 8\), no map \(N, c, h, w\) of a square image"),
    ],
)
def test_a_layer_without_maps_is_one_line(layer, what):
    classifier = Classifier(Network(), "head", Preprocessing(60)).eval()
    assert maps_of(classifier, [coloured("red", 1)], [0], "conv").shape == (1, 60, 60)
    with pytest.raises(maps.UserError, match=f"layer: {layer} {what}"):
        maps_of(classifier, [coloured("red", 1)], [0], layer)


def test_channels_at_the_end_are_told_from_a_map_in_a_published_block(tmp_path):
    classifier = open_classifier(str(write_model(tmp_path / "convnext", "convnext")), 3)
    with pytest.raises(maps.UserError, match=r"\(1, 4, 4, 64\), no map"):
        maps_of(classifier, [coloured("red", 1)], [0], "convnext.encoder.stages.1.layers.0.pwconv1")


def test_images_go_through_one_at_a_time_and_are_counted(tmp_path, monkeypatch):
    classifier, sizes, told = Classifier(Network(), "head", Preprocessing(SIDE)).eval(), [], []
    classifier.network.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))

    def followed(items, total, what, unit):
        told.append((total, unit))
        return items

    monkeypatch.setattr(maps, "followed", followed)
    maps_of(classifier, [coloured("red", number) for number in range(5)], [0] * 5, "conv")
    assert set(sizes) == {1}
    assert told == [(5, "image")]


def test_classifiers_are_drawn_by_their_paths_on_their_own_crops(draw, monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(cam, "cam_sheet", lambda names, columns: drawn.append(columns) or cam_sheet(names, columns))
    assert draw() == 0
    (columns,) = drawn
    assert [title for title, *_ in columns] == ["head: small/run", "head: large/run"]
    for (_, images, said, shown), side in zip(columns, (32, 48), strict=True):
        assert [image.shape for image in images] == [(side, side, 3)] * 3
        assert shown.shape == (3, side, side)
        assert set(said) <= {"blue", "green", "red"}
    told = json.loads((tmp_path / "cam.json").read_text())
    assert [entry["classifier"] for entry in told] == ["small/run", "large/run"]
    assert [entry["accuracy"]["n"] for entry in told] == [3, 3]


def test_what_is_said_is_what_the_classifier_says(draw, monkeypatch, tmp_path):
    """A head that always says the first class is right about the images of that class."""

    def blue(path, model):
        classifier, file = load(path, model)
        nn.init.zeros_(classifier.head.weight)
        classifier.head.bias.data = torch.tensor([1.0, 0.0, 0.0])
        return classifier, file

    load, drawn = cam.load_classifier, []
    monkeypatch.setattr(cam, "load_classifier", blue)
    monkeypatch.setattr(cam, "cam_sheet", lambda names, columns: drawn.append(names) or cam_sheet(names, columns))
    assert draw() == 0
    told = json.loads((tmp_path / "cam.json").read_text())
    assert {entry["accuracy"]["value"] for entry in told} == {drawn[0].count("blue") / 3}


def test_classifiers_work_where_accelerate_says(draw, monkeypatch):
    moved, load = [], cam.load_classifier

    def watched(path, model):
        classifier, file = load(path, model)
        monkeypatch.setattr(classifier, "to", moved.append)
        return classifier, file

    monkeypatch.setattr(cam, "load_classifier", watched)
    here = SimpleNamespace(device="where it says", is_main_process=True)
    monkeypatch.setattr(cam, "make_accelerator", lambda: here)
    assert draw() == 0
    assert moved == ["where it says"] * 2
    here.is_main_process = False  # the others leave it to the first one
    assert draw("--overwrite") == 0
    assert len(moved) == 2


def test_images_are_read_once_for_the_maps_of_all(draw, monkeypatch):
    read, own = [], ImageRecord.read
    monkeypatch.setattr(ImageRecord, "read", lambda record: read.append(record.name) or own(record))
    monkeypatch.setattr(cam, "logits_of", lambda classifier, records: torch.zeros(len(records), 3))
    assert draw() == 0
    assert len(read) == len(set(read)) == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--block=1", "--layer=resnet.embedder"], "block: 1: layer 'resnet.embedder' is in its place"),
        (["--layer="], "layer: '': the network has none of that name"),
        (["--classifiers=,"], "classifiers: ',': one or more are needed"),
    ],
)
def test_a_place_that_is_two_or_none_is_refused(draw, capsys, tmp_path, words, message):
    assert draw(*words) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "cam.png").exists()


def test_each_column_of_a_sheet_has_its_own_images_and_a_title_that_fits():
    rng = np.random.default_rng(0)
    columns = [
        (f"atoms: runs/of/a/long/comparison/runs/atoms_{side}/seed-0", rng.random((2, side, side, 3)), ["a", "b"],
         rng.random((2, side, side)))
        for side in (8, 12)
    ]  # fmt: skip
    figure, _ = cam_sheet(["a", "a"], columns)
    shapes = [[image.get_array().shape[:2] for image in axes.get_images()] for axes in figure.axes]
    assert shapes == [[(8, 8)], [(8, 8)] * 2, [(12, 12)] * 2] * 2
    FigureCanvasAgg(figure).draw()
    first, second = (figure.axes[column].title.get_window_extent() for column in (1, 2))
    assert first.x1 < second.x0
    assert second.x1 <= figure.bbox.x1
    assert first.y1 <= figure.bbox.y1
    assert figure.axes[2].get_title().replace("\n", "").endswith("atoms_12/seed-0")
    assert figure.axes[5].get_title() == "said b"

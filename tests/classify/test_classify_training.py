"""What a classifier's training follows: its seed, the images that it kept for testing, and what its options say."""

import csv
import json
import random

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from small import SIDE, coloured, write_classes, write_model
from torch import nn
from transformers import AutoImageProcessor, AutoModelForImageClassification, ResNetForImageClassification

from sd_atoms.classify.config import ClassDataSettings, ClassifyConfig
from sd_atoms.classify.file import NAME, load_classifier
from sd_atoms.classify.images import open_set
from sd_atoms.classify.models import Classifier, Preprocessing
from sd_atoms.classify.scores import logits_of
from sd_atoms.classify.training import adapt, centre_crop, random_box, training_image
from sd_atoms.cli import main
from sd_atoms.data.records import image_record
from sd_atoms.settings import build


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    write_model(folder / "resnet", "resnet")
    write_model(folder / "vit", "vit")
    write_classes(folder / "set", 10)
    return folder


def train(place, out, *switches, **settings):
    own = {
        "model": place / "resnet", "data": place / "set", "output_dir": out, "max_train_steps": 2,
        "train_batch_size": 4, "lr_warmup_steps": 0, "head_learning_rate": 0.05, "report_to": "none", **settings,
    }  # fmt: skip
    return main(["classify", "train", *(f"--{name}={value}" for name, value in own.items()), *switches])


def metrics_of(run):
    return json.loads((run / "metrics.json").read_text())


def evaluated(place, run, tmp_path, *words):
    path = tmp_path / "evaluated.json"
    model = f"--model={place / 'resnet'}"
    assert main(["classify", "evaluate", f"--classifier={run}", model, f"--json={path}", "--overwrite", *words]) == 0
    return json.loads(path.read_text())


@pytest.mark.parametrize("method", ["lora", "loha", "lokr", "lora-conv"])
def test_a_seed_fixes_what_an_adapter_begins_with(place, tmp_path, method):
    runs = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(ord(name))  # whatever the process drew before
        assert train(place, tmp_path / name, method=method, seed=seed) == 0
        runs[name] = load_file(tmp_path / name / NAME)
    assert all(torch.equal(runs["a"][key], runs["b"][key]) for key in runs["a"])
    adapter = [key for key in runs["a"] if key.startswith("adapter.")]
    assert any(not torch.equal(runs["a"][key], runs["c"][key]) for key in adapter)


def test_it_is_tested_on_what_its_training_kept(place, tmp_path, capsys):
    run = tmp_path / "run"
    assert train(place, run, seed=3, test_share=0.3) == 0
    assert evaluated(place, run, tmp_path, f"--data={place / 'set'}") == metrics_of(run)["test"]
    other = evaluated(place, run, tmp_path, f"--data={place / 'set'}", "--seed=0", "--test_share=0.5")
    assert other["accuracy"]["n"] == 15
    assert train(place, tmp_path / "second", seed=4) == 0
    capsys.readouterr()
    both = f"--classifiers={run},{tmp_path / 'second'}"
    cam = ["classify", "cam", both, f"--data={place / 'set'}", f"--model={place / 'resnet'}"]
    assert main([*cam, f"--out={tmp_path / 'cam.png'}"]) == 2
    assert "kept different ones" in capsys.readouterr().err


def test_it_is_tested_on_a_list_of_its_own(place, tmp_path, capsys):
    with open(tmp_path / "test.csv", "w", newline="") as file:
        csv.writer(file).writerows([(place / "set" / name / "0.png", name) for name in ("red", "blue")])
    with open(tmp_path / "train.csv", "w", newline="") as file:
        csv.writer(file).writerows(
            [(place / "set" / name / f"{n}.png", name) for name in ("red", "blue") for n in (1, 2)]
        )
    lists = dict(data=tmp_path / "train.csv", test_data=tmp_path / "test.csv")
    assert train(place, tmp_path / "run", **lists) == 0
    scores = evaluated(place, tmp_path / "run", tmp_path, *(f"--{name}={path}" for name, path in lists.items()))
    assert scores == metrics_of(tmp_path / "run")["test"]
    assert scores["accuracy"]["n"] == 2


def test_a_merged_folder_makes_images_ready_as_the_training_did(place, tmp_path):
    run, out = tmp_path / "run", tmp_path / "plain"
    assert train(place, run, size_px=36, normalisation="imagenet", max_train_steps=8, method="lora") == 0
    model = f"--model={place / 'resnet'}"
    assert main(["classify", "merge", f"--classifier={run}", model, f"--out={out}"]) == 0
    image = coloured("red", 50)
    image.save(tmp_path / "red.png")
    classifier, file = load_classifier(run, str(place / "resnet"))
    assert (file.preprocessing.size_px, file.preprocessing.mean[0]) == (36, pytest.approx(0.485))
    expected = logits_of(classifier, [image_record(tmp_path / "red.png")])
    pixels = AutoImageProcessor.from_pretrained(out)(image, return_tensors="pt")["pixel_values"]
    plain = AutoModelForImageClassification.from_pretrained(out).eval()
    with torch.no_grad():
        torch.testing.assert_close(plain(pixels).logits, expected, atol=2e-3, rtol=0)
    assert plain.config.id2label == dict(enumerate(("blue", "green", "red")))


def test_after_a_mixed_training_it_is_tested_as_it_will_be_used(place, tmp_path):
    run = tmp_path / "run"
    assert train(place, run, mixed_precision="bf16") == 0
    tested = evaluated(place, run, tmp_path, f"--data={place / 'set'}")
    assert tested["cross_entropy"]["value"] == metrics_of(run)["test"]["cross_entropy"]["value"]


def test_a_finished_run_without_checkpoints_is_not_begun_anew(place, tmp_path, capsys):
    run = tmp_path / "run"
    assert train(place, run) == 0
    for path in (run / "checkpoints").iterdir():
        path.unlink()
    before = (run / NAME).read_bytes()
    assert train(place, run, resume_from_checkpoint="latest") == 2
    assert (run / NAME).read_bytes() == before


def test_a_target_with_the_head_in_it_is_refused(place, tmp_path, capsys):
    assert (
        train(place, tmp_path / "run", model=place / "vit", method="lora", target=".*(q_proj|query|classifier)") == 2
    )
    assert "target: takes in classifier, the head" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_every_option_of_samples_and_steps_does_something(place, tmp_path, capsys):
    write_classes(tmp_path / "set", 10)
    (tmp_path / "set" / "red" / "9.png").write_bytes(b"no picture")
    data = dict(data=tmp_path / "set", max_test_samples=4, max_train_samples=20, on_bad_image="skip", seed=1)
    assert train(place, tmp_path / "plain", **data) == 0
    plain = load_file(tmp_path / "plain" / NAME)
    assert metrics_of(tmp_path / "plain")["test"]["accuracy"]["n"] <= 4
    assert "9.png" in capsys.readouterr().out
    for number, (name, value) in enumerate(
        dict(crop_scale=0.5, label_smoothing=0.2, lr_warmup_epochs=0.4, ema_decay=0.5, normalisation="imagenet",
             size_px=40, head_dropout=0.5).items()
    ):  # fmt: skip
        assert train(place, tmp_path / f"{number}", **data, **{name: value}) == 0
        other = load_file(tmp_path / f"{number}" / NAME)
        assert not torch.equal(plain["head.weight"], other["head.weight"]), name
    assert train(place, tmp_path / "flipped", "--random_flip", **data) == 0
    assert not torch.equal(plain["head.weight"], load_file(tmp_path / "flipped" / NAME)["head.weight"])


def test_a_head_of_the_same_classes_is_kept(place, tmp_path):
    model = ResNetForImageClassification.from_pretrained(place / "resnet", num_labels=3, ignore_mismatched_sizes=True)
    model.save_pretrained(tmp_path / "three")
    AutoImageProcessor.from_pretrained(place / "resnet").save_pretrained(tmp_path / "three")
    settings = dict(model=tmp_path / "three", method="head", head_learning_rate=0)
    assert train(place, tmp_path / "run", "--keep_head", **settings) == 0
    kept = load_file(tmp_path / "run" / NAME)["head.weight"]
    assert torch.equal(kept, model.classifier[-1].weight)


def test_a_sample_depends_on_its_seed_and_number_alone():
    image, ready = coloured("red", 0), Preprocessing(SIDE)
    data = ClassDataSettings(data="x", random_flip=True, crop_scale=0.3)
    views = [np.asarray(training_image(image, ready, data, 0, number)) for number in range(8)]
    random.seed(5)
    assert all(np.array_equal(view, training_image(image, ready, data, 0, n)) for n, view in enumerate(views))
    assert all(not np.array_equal(views[0], other) for other in views[1:])
    assert not np.array_equal(views[0], training_image(image, ready, data, 1, 0))
    middle = centre_crop(image, ready)
    turned = middle.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    flips = [training_image(image, ready, ClassDataSettings(data="x", random_flip=True), 0, n) for n in range(40)]
    assert {flip.tobytes() for flip in flips} == {middle.tobytes(), turned.tobytes()}


@pytest.mark.parametrize("size", [(300, 90), (90, 300), (90, 91)])
def test_a_random_crop_is_never_wider_than_four_to_three(size):
    for number in range(50):
        left, top, right, bottom = random_box(size, 0.9, random.Random(number))
        assert 0 <= left < right <= size[0]
        assert 0 <= top < bottom <= size[1]
        assert 0.74 <= (right - left) / (bottom - top) <= 1.35


def test_labels_that_read_alike_keep_their_order_and_an_image_has_one_line(tmp_path):
    from sd_atoms.errors import UserError

    for number in range(4):
        coloured("red", number).save(tmp_path / f"{number}.png")
    (tmp_path / "a.csv").write_text("path,label\n0.png,1\n1.png,01\n2.png,1\n3.png,01\n")
    assert open_set(str(tmp_path / "a.csv"), test_share=0.5).class_names == ("01", "1")
    (tmp_path / "b.csv").write_text("path,label\n0.png,1\n1.png,2\n0.png,1\n")
    with pytest.raises(UserError, match="line 4: 0.png is on line 2 already"):
        open_set(str(tmp_path / "b.csv"))


def test_a_layer_is_meant_by_its_whole_name():
    """A stem that is called like every block's pointwise convolution, as timm has it."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x):
            return x + self.conv2(self.conv1(x))

    network = nn.Sequential()
    network.add_module("conv1", nn.Conv2d(3, 4, 3))
    network.add_module("layer1", nn.Sequential(Block(), Block()))
    network.add_module("pool", nn.AdaptiveAvgPool2d(1))
    network.add_module("flat", nn.Flatten())
    network.add_module("fc", nn.Linear(4, 3))
    classifier = Classifier(network.requires_grad_(False), "fc", Preprocessing(SIDE)).eval()
    adapt(classifier, build(ClassifyConfig, {"model": "x", "data": "x", "method": "atoms"}))
    adapted = {name.partition(".base_layer")[0] for name, _ in network.named_modules() if "base_layer" in name}
    assert adapted == {"conv1", "layer1.0.conv2", "layer1.1.conv2"}


def test_a_size_that_a_network_cannot_take_is_one_line(place, tmp_path, capsys):
    assert train(place, tmp_path / "run", model=place / "vit", method="head", size_px=40) == 2
    assert "cannot take images of 40 px" in capsys.readouterr().err

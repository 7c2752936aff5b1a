"""A whole data set as what is learned: a prompt for each class, classes drawn alike, the same run in two goes."""

from collections import Counter

import numpy as np
import pytest
from helpers import tiny_base, train_config
from PIL import Image
from safetensors.torch import load_file
from tiny import one_core

from sd_atoms.commands import train
from sd_atoms.data.concepts import find_images
from sd_atoms.data.vtab import load_task
from sd_atoms.errors import UserError
from sd_atoms.generation import image_notes
from sd_atoms.settings import replaced
from sd_atoms.training import dataset
from sd_atoms.training.noise import image_number

NAMES = ("without", "with")  # of patch_camelyon
PROMPTS = tuple(f"This is a histopathologic scans {name} tumor." for name in NAMES)


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """Five images of the one class and two of the other, as a folder per class."""
    folder = tmp_path_factory.mktemp("vtab") / "patch_camelyon"
    for name, count in zip(NAMES, (5, 2), strict=True):
        (folder / "train" / name).mkdir(parents=True)
        for number in range(count):
            pixels = np.random.default_rng(number).integers(0, 255, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "train" / name / f"{name}-{number}.png")
    return folder


def config(scans, **changes):
    settings = dict(
        pretrained_model_name_or_path=tiny_base(),
        dataset_name="vtab:patch_camelyon",
        dataset_dir=str(scans.parent),
        train_batch_size=1,
        max_train_steps=4,
        lr_warmup_steps=0,
        num_instance_images=3,
        num_inference_steps=1,
        report_to="none",
    )
    return train_config(**settings | changes)


def test_each_image_is_shown_with_the_prompt_of_its_class_and_the_last_pictures_take_them_in_turn(
    scans, tmp_path, monkeypatch
):
    seen, make = [], train.make_dataset
    monkeypatch.setattr(train, "make_dataset", lambda *args: seen.append(make(*args)) or seen[0])
    with one_core():
        folder = train.run(config(scans, output_dir=str(tmp_path / "run"), caption_dropout=0.1))
    (learned,) = seen
    assert learned.prompts == [*PROMPTS, ""]
    assert [own for (own,) in learned.examples.prompts] == [0] * 5 + [1] * 2
    for kind in ("instance", "base-instance"):
        drawn = [image_notes(folder / "images" / f"{kind}-{n:02d}.png")["prompt"] for n in range(3)]
        assert drawn == [PROMPTS[0], PROMPTS[1], PROMPTS[0]]
    assert (folder / "run.safetensors").exists()


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not(scans, tmp_path):
    once = config(scans, output_dir=str(tmp_path / "once"), class_balanced=True, lr_scheduler="constant")
    parts = replaced(once, output_dir=str(tmp_path / "parts"))
    with one_core():
        train.run(once)
        train.run(replaced(parts, max_train_steps=2))
        train.run(replaced(parts, resume_from_checkpoint="latest"))
    whole, ours = (load_file(tmp_path / name / f"{name}.safetensors") for name in ("once", "parts"))
    assert all((ours[key] == whole[key]).all() for key in whole)


def test_balanced_classes_come_alike_and_every_image_comes():
    labels = np.array([0] * 7 + [1] * 3 + [4] * 2)
    places = np.arange(12) + 100
    order = dataset.balanced(places, labels, seed=3)
    counts = Counter(labels[order - 100].tolist())
    assert counts == {0: 7, 1: 7, 4: 7}
    assert set(order) == set(places)
    of_images = Counter(order.tolist())
    assert {of_images[place] for place in (107, 108, 109)} == {2, 3}
    assert np.array_equal(order, dataset.balanced(places, labels, seed=3))
    epoch = [labels[order[image_number(0, n, len(order))] - 100] for n in range(len(order))]
    assert Counter(epoch) == counts  # an epoch goes through all of it once


def test_so_many_samples_are_taken_from_all_classes(scans):
    data = config(scans, max_train_samples=4).data
    (source,), _ = find_images(data, config(scans).all_concepts)
    assert [image.label for image in source.images] == [0, 0, 0, 1]


def test_a_bad_image_is_named_and_skipped_only_on_demand(scans, tmp_path):
    folder = tmp_path / "patch_camelyon"
    for path in scans.rglob("*.png"):
        place = folder / path.relative_to(scans)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(path.read_bytes() if path.stem != "with-1" else b"no picture")
    settings = config(folder)
    with pytest.raises(UserError, match="with-1.png: holds no picture"):
        find_images(settings.data, settings.all_concepts)
    (source,), notes = find_images(replaced(settings.data, on_bad_image="skip"), settings.all_concepts)
    assert len(source.images) == 6
    assert "with-1.png" in notes[0]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (dict(dataset_name="vtab:cifar10"), "vtab:cifar10: no such task; there is caltech101"),
        (dict(dataset_dir=None, instance_prompt="x"), "dataset_dir is required with dataset_name=vtab:patch_camelyon"),
        (dict(dataset_name="some/table", instance_prompt="x"), "dataset_dir needs dataset_name=vtab:TASK"),
        (dict(instance_prompt="a photo"), "dataset_name=vtab:patch_camelyon stands in place of instance_prompt"),
        (dict(caption_column="text"), "stands in place of caption_column"),
        (dict(instance_data_dir="x"), "dataset_name stands in place of instance_data_dir"),
        (dict(placeholder_token="<x>", initializer_token="x"), "lacks the placeholder <x>"),
    ],
)
def test_settings_that_do_not_go_with_a_task_are_named(scans, changes, why):
    with pytest.raises(UserError) as error:
        config(scans, **changes)
    assert why in str(error.value)


def test_a_task_s_own_prompts_make_the_settings(scans):
    (concept,) = config(scans).all_concepts
    assert concept.instance_prompt == load_task("patch_camelyon").prompts[0]

"""Masks in training: the loss they make, how they follow a picture, and that without one nothing changes."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import tiny_base
from PIL import Image
from test_training import config_of, dataset_of, log, numbers, run, same, samples_of, source_of
from tiny import PHOTOS, one_core, write_photos

from sd_atoms.cli import train_main
from sd_atoms.data.checked import usable, with_masks
from sd_atoms.data.config import DataSettings
from sd_atoms.data.records import folder_images
from sd_atoms.errors import UserError
from sd_atoms.pipeline import open_base
from sd_atoms.training.examples import Cropping, crop
from sd_atoms.training.latents import latent_masks
from sd_atoms.training.objective import losses, mask_weights, noising


@pytest.fixture(autouse=True, scope="module")
def _one_core():
    with one_core():
        yield


@pytest.fixture(scope="module")
def base():
    return open_base(tiny_base())


def masked_photos(folder, white=None):
    """The tiny photos with masks: the left half, or what `white` says of (width, height)."""
    write_photos(folder)
    for name, (width, height, _) in PHOTOS.items():
        image = Image.new("L", (width, height))
        image.paste(255, white(width, height) if white else (0, 0, width // 2, height))
        image.save(folder / f"{name}.mask.png")
    return folder


def whole(width, height):
    return 0, 0, width, height


# --- the loss --------------------------------------------------------------------------------------------------------


def test_the_weights_are_the_formula_and_their_mean_is_one():
    mask = torch.tensor([[255, 0, 51], [0, 0, 255]], dtype=torch.uint8)
    part = torch.tensor([[1, 0, 0.2], [0, 0, 1]], dtype=torch.float64)
    wanted = part + 0.1 * (1 - part)
    got = mask_weights(mask, 0.1)
    torch.testing.assert_close(got.double(), wanted / wanted.mean(), rtol=1e-6, atol=0)
    assert got.mean().item() == pytest.approx(1, abs=1e-6)
    assert mask_weights(mask, 0.0)[0, 1] == 0
    with pytest.raises(ValueError, match="black all over"):
        mask_weights(torch.zeros(2, 2, dtype=torch.uint8), 0.0)


@pytest.mark.parametrize("kind", ["l2", "huber", "smooth_l1"])
def test_a_white_mask_or_a_weight_of_one_leaves_loss_and_gradient_bit_for_bit(kind):
    prediction = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    target = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    plain = losses(prediction, target, kind)
    (gradient,) = torch.autograd.grad(plain.sum(), prediction)
    half = torch.zeros(8, 8, dtype=torch.uint8)
    half[:, :4] = 255
    for mask, outside in ((torch.full((8, 8), 255, dtype=torch.uint8), 0.1), (half, 1.0)):
        got = losses(prediction, target, kind, places=torch.stack([mask_weights(mask, outside)] * 2))
        assert torch.equal(got, plain)
        assert torch.equal(torch.autograd.grad(got.sum(), prediction)[0], gradient)
    assert not torch.equal(losses(prediction, target, kind, places=torch.stack([mask_weights(half, 0.1)] * 2)), plain)


def test_the_loss_is_the_weighted_mean_and_does_not_shrink_with_the_subject():
    target, prediction = torch.zeros(2, 4, 8, 8), torch.zeros(2, 4, 8, 8)
    prediction[:, :, :, 0] = 3  # wrong in the first column alone, by 9
    narrow, wide = torch.zeros(8, 8, dtype=torch.uint8), torch.zeros(8, 8, dtype=torch.uint8)
    narrow[:, :1] = wide[:, :4] = 255
    got = losses(prediction, target, places=torch.stack([mask_weights(narrow, 0.0), mask_weights(wide, 0.0)]))
    torch.testing.assert_close(got, torch.tensor([9.0, 9.0 / 4]))
    prediction[:] = 3  # wrong everywhere alike
    got = losses(prediction, target, places=torch.stack([mask_weights(narrow, 0.1), mask_weights(wide, 0.1)]))
    torch.testing.assert_close(got, torch.tensor([9.0, 9.0]))


# --- a mask goes with its picture ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [{}, dict(center_crop=True), dict(aspect_ratio_buckets=True), dict(random_flip=True)]
)
def test_a_mask_is_cropped_and_scaled_by_area_as_its_picture(base, tmp_path, settings):
    draws = np.random.default_rng(0)
    for name, size in (("a", (96, 64)), ("b", (64, 112)), ("c", (200, 144))):
        blocks = Image.fromarray(draws.integers(0, 2, (size[1] // 16, size[0] // 16), dtype=np.uint8) * 255)
        image = blocks.resize(size, Image.Resampling.NEAREST)
        image.save(tmp_path / f"{name}.mask.png")
        image.convert("RGB").save(tmp_path / f"{name}.png")  # the picture shows its own mask
    how = Cropping(DataSettings(**settings, image_interpolation_mode="box"), 64, 16, 3)
    records = with_masks(usable(folder_images(tmp_path, False, True)[0], "error")[0])
    masks = latent_masks(base.vae, records, how)
    for record, mask in zip(records, masks, strict=True):
        image = np.asarray(crop(record, how).convert("L"), dtype=np.float64)
        places = image.reshape(image.shape[0] // 8, 8, image.shape[1] // 8, 8).mean((1, 3))
        assert tuple(mask.shape) == places.shape
        assert mask.dtype == torch.uint8
        assert np.abs(mask.numpy() - places).max() <= 1
    assert latent_masks(base.vae, [*usable(folder_images(tmp_path, False)[0], "error")[0]], how) is None


def test_a_line_of_one_pixel_is_left_and_a_crop_without_the_subject_refused(base, tmp_path):
    image = Image.new("L", (256, 64))
    image.paste(255, (100, 0, 101, 64))
    Image.new("RGB", (256, 64)).save(tmp_path / "a.png")
    image.save(tmp_path / "a.mask.png")
    (record,) = with_masks(usable(folder_images(tmp_path, False, True)[0], "error")[0])
    (mask,) = latent_masks(base.vae, [record], Cropping(DataSettings(center_crop=True), 64, 16, 0))
    assert mask.max() == 32  # an eighth of 255
    image = Image.new("L", (256, 64))
    image.paste(255, (0, 0, 8, 64))
    image.save(tmp_path / "a.mask.png")
    with pytest.raises(UserError, match=r"a\.png: its crop has nothing of its subject by .*a\.mask\.png$"):
        latent_masks(base.vae, [record], Cropping(DataSettings(center_crop=True), 64, 16, 0))


def test_a_mirrored_sample_has_its_mask_mirrored_and_the_prior_has_none(base, tmp_path):
    folder = masked_photos(tmp_path / "photos")
    settings = dict(instance_data_dir=str(folder), masks=True, random_flip=True, resolution=64)
    base_settings = dict(pretrained_model_name_or_path=tiny_base(), prior="teacher", class_prompt="a castle")
    config = config_of(**settings, **base_settings)
    records = with_masks(usable(folder_images(folder, False, True)[0], "error")[0])
    data = dataset_of(base, config, [source_of(config, records)])
    schedule = noising(base.scheduler, None)
    samples = samples_of(range(40), config, data.examples, schedule, data.empty)
    left = [sample.places[0, 0] > sample.places[0, -1] for sample in samples]
    assert 5 < sum(left) < 35
    prior = samples_of(range(4), config, data.prior, schedule, data.empty, purpose="prior", from_teacher=True)
    assert [sample.places for sample in prior] == [None] * 4


# --- runs ------------------------------------------------------------------------------------------------------------


def test_a_run_with_white_masks_is_the_run_without_and_others_differ(tmp_path):
    white, half = masked_photos(tmp_path / "white", whole), masked_photos(tmp_path / "half")
    both = dict(train_batch_size=2, random_flip=True, prior="teacher", class_prompt="a castle")
    plain = run(tmp_path / "plain", instance_data_dir=str(white), **both)
    same_run = run(tmp_path / "same", instance_data_dir=str(white), masks=True, **both)
    assert same(numbers(plain), numbers(same_run))
    masked = run(tmp_path / "masked", instance_data_dir=str(half), masks=True, **both)
    open_ = run(tmp_path / "open", instance_data_dir=str(half), masks=True, mask_weight=1.0, **both)
    assert not same(numbers(plain), numbers(masked))
    assert same(numbers(plain), numbers(open_))


def test_batches_accumulation_and_buckets_make_the_same_masked_steps(tmp_path):
    folder = masked_photos(tmp_path / "photos")
    (folder / "2.mask.png").unlink()  # one learned whole beside the others
    common = dict(instance_data_dir=str(folder), masks=True, aspect_ratio_buckets=True, max_train_steps=3)
    together = run(tmp_path / "together", train_batch_size=4, **common)
    apart = run(tmp_path / "apart", gradient_accumulation_steps=4, **common)
    for one, other in zip(log(together), log(apart), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
    one, other = numbers(together), numbers(apart)
    for key in one:
        torch.testing.assert_close(one[key], other[key], rtol=1e-3, atol=1e-5)


def test_a_masked_run_resumes_bit_for_bit_and_a_changed_mask_is_noticed(tmp_path, capsys):
    folder = masked_photos(tmp_path / "photos")
    common = dict(instance_data_dir=str(folder), masks=True, checkpointing_steps=2, lr_scheduler="constant")
    common |= dict(cache_dir=str(tmp_path / "cache"), validation_loss_steps=2)
    unbroken = run(tmp_path / "whole", max_train_steps=4, **common)
    run(tmp_path / "part", max_train_steps=2, **common)
    resumed = run(tmp_path / "part", max_train_steps=4, resume_from_checkpoint="latest", **common)
    assert same(numbers(unbroken), numbers(resumed))
    assert log(unbroken)[-1]["validation_loss"] == log(resumed)[-1]["validation_loss"]
    weightless = dict(learning_rate=0.0, token_learning_rate=0.0, max_train_steps=2)
    measured = [log(run(tmp_path / f"{on}", **common | weightless | {"masks": on}))[-1] for on in (True, False)]
    assert measured[0]["validation_loss"] != measured[1]["validation_loss"]  # masks weigh there too
    image = Image.open(folder / "1.mask.png")
    image.paste(0, (0, 0, 9, 9))
    image.save(folder / "1.mask.png")
    capsys.readouterr()
    words = ["--config", str(tmp_path / "part.yaml"), "--strict_resume"]
    assert train_main([*words, "--max_train_steps", "5"]) == 2
    assert "changed: mask of 1.png of <castle>" in capsys.readouterr().err
    assert train_main([*words, "--max_train_steps", "5", "--mask_weight", "0.3"]) == 2
    assert "mask_weight was 0.1, now 0.3" in capsys.readouterr().err
    other = run(tmp_path / "other", max_train_steps=4, **common)  # the cache holds no mask
    assert not same(numbers(unbroken), numbers(other))


def test_a_weight_without_masks_is_refused_and_a_bad_mask_writes_nothing(tmp_path, capsys):
    folder = masked_photos(tmp_path / "photos")
    words = ["--pretrained_model_name_or_path", tiny_base(), "--instance_data_dir", str(folder)]
    words += ["--instance_prompt", "a castle", "--output_dir", str(tmp_path / "run"), "--mask_weight", "0.2"]
    assert train_main(words) == 2
    assert "mask_weight needs masks" in capsys.readouterr().err
    Image.new("L", (8, 8), 255).save(folder / "1.mask.png")
    assert train_main([*words, "--masks"]) == 2
    assert "1.mask.png" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_processes_make_the_same_masked_steps(tmp_path):
    folder = masked_photos(tmp_path / "photos")
    common = dict(instance_data_dir=str(folder), masks=True, max_train_steps=3)
    one = run(tmp_path / "one", train_batch_size=2, **common)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    words = ["--config", tmp_path / "one.yaml", "--output_dir", tmp_path / "two", "--train_batch_size", "1"]
    done = subprocess.run(
        [*launch, "train_dreambooth_atoms.py", *map(str, words)], env=dict(os.environ, ACCELERATE_USE_CPU="true"),
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "two" / "env.json").read_text())["processes"] == 2
    first, second = numbers(one), numbers(tmp_path / "two")
    assert all((first[key] - second[key]).norm() <= 1e-5 * first[key].norm() for key in first)

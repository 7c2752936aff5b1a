"""Pictures from a picture, in a mask, away from a text, of other sizes, by every sampler: as diffusers draws them."""

import dataclasses

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline, UNet2DConditionModel
from helpers import tiny_base
from PIL import Image

from sd_atoms.errors import UserError
from sd_atoms.generation import Conditions, Request, generate
from sd_atoms.generation.conditions import check_conditions, read_conditions_images
from sd_atoms.generation.generate import drawn_together
from sd_atoms.pipeline import open_base
from sd_atoms.pipeline.sampling import (
    SAMPLERS,
    Sampling,
    check_sampler,
    make_scheduler,
    read_options,
    scheduler_class,
)

SAMPLING = Sampling(4.0, 4, "ddim", None)
SEEDS = (3, 4, 5)
REQUESTS = [Request("a castle", seed, "") for seed in SEEDS]
WAVES = np.add.outer(np.arange(64) * 3, np.arange(64)) % 256
PICTURE = Image.fromarray(np.stack([WAVES, WAVES[::-1], WAVES.T], axis=2).astype(np.uint8))
MASK = Image.new("L", (64, 64))
MASK.paste(255, (16, 24, 48, 64))  # whole latents, so that diffusers sees the same


@pytest.fixture(scope="module")
def base():
    return open_base(tiny_base())


@pytest.fixture(scope="module")
def inpainting_base(base):
    """A UNet that sees mask and picture, with random weights."""
    wide = open_base(tiny_base())
    unet = UNet2DConditionModel.from_config({**base.unet.config, "in_channels": 9})
    state = dict(base.unet.state_dict())
    state["conv_in.weight"] = torch.cat([state["conv_in.weight"]] * 3, dim=1)[:, :9]
    unet.load_state_dict(state)
    wide.register_modules(unet=unet)
    return wide


def drawn(pipe, conditions=Conditions(), sampling=SAMPLING, requests=REQUESTS, **settings):
    return [np.asarray(image) for _, image in generate(pipe, requests, sampling, conditions=conditions, **settings)]


def theirs(pipe, kind, seed, sampling=SAMPLING, options=None, **settings):
    """One picture by a pipeline of diffusers, called as its users do."""
    pipe = kind(**pipe.components, requires_safety_checker=False)
    pipe.scheduler = make_scheduler(sampling.scheduler, pipe.scheduler, options)
    pipe.set_progress_bar_config(disable=True)
    how = dict(guidance_scale=sampling.guidance_scale, num_inference_steps=sampling.num_inference_steps)
    made = pipe("a castle", generator=torch.Generator().manual_seed(seed), **how, **settings)
    return np.asarray(made.images[0])


def test_a_picture_to_start_from_is_diffusers_img2img(base):
    conditions = Conditions(size_px=(64, 64), image=PICTURE, image_strength=0.6)
    how = dict(image=PICTURE, strength=0.6)
    expected = [theirs(base, StableDiffusionImg2ImgPipeline, seed, **how) for seed in SEEDS]
    found = drawn(base, conditions)
    assert all(map(np.array_equal, found, expected))
    assert not np.array_equal(found[0], found[1])


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("width", [4, 9])
def test_inside_a_mask_it_is_diffusers_inpainting_and_outside_the_picture_itself(
    base, inpainting_base, strength, width
):
    pipe = base if width == 4 else inpainting_base
    conditions = Conditions(size_px=(64, 64), image=PICTURE, mask=MASK, image_strength=strength)
    how = dict(image=PICTURE, mask_image=MASK, strength=strength, width=64, height=64)
    inside = np.asarray(MASK) == 255
    for seed, found in zip(SEEDS, drawn(pipe, conditions), strict=True):
        expected = theirs(pipe, StableDiffusionInpaintPipeline, seed, **how)
        assert np.array_equal(found[inside], expected[inside])
        assert np.array_equal(found[~inside], np.asarray(PICTURE)[~inside])
        assert not np.array_equal(found[inside], np.asarray(PICTURE)[inside])


def test_latents_of_any_width_can_be_painted_in(pocket):
    picture, mask = PICTURE.resize((128, 128)), MASK.resize((128, 128), Image.Resampling.NEAREST)
    conditions = Conditions(size_px=(128, 128), image=picture, mask=mask)
    [found] = drawn(pocket, conditions, Sampling(3.0, 2), REQUESTS[:1])
    inside = np.asarray(mask) == 255
    assert np.array_equal(found[~inside], np.asarray(picture)[~inside])
    assert not np.array_equal(found[inside], np.asarray(picture)[inside])
    assert pocket.unet.config.in_channels == 8


def test_white_thinner_than_a_latent_is_drawn_too(base):
    line = Image.new("L", (64, 64))
    line.paste(255, (34, 0, 36, 64))
    conditions = Conditions(size_px=(64, 64), image=PICTURE, mask=line)
    [found] = drawn(base, conditions, requests=REQUESTS[:1])
    changed = (found != np.asarray(PICTURE)).any(axis=2)
    assert changed[:, 34:36].mean() > 0.9
    assert not changed[:, :34].any()
    assert not changed[:, 36:].any()


@pytest.mark.parametrize(
    "conditions",
    [
        Conditions(size_px=(64, 64), image=PICTURE, image_strength=0.6),
        Conditions(size_px=(64, 64), image=PICTURE, mask=MASK),
        Conditions(negative_prompt="a lake", size_px=(96, 48), scheduler_options={"eta": 1.0}),
    ],
    ids=["img2img", "inpaint", "text"],
)
def test_a_picture_follows_its_own_seed_alone(base, conditions):
    alone = [drawn(base, conditions, requests=[request])[0] for request in REQUESTS]
    together = drawn(base, conditions, batch_size=3)
    for one, other in zip(alone, together, strict=True):
        assert np.abs(one.astype(int) - other).max() <= 1
    assert np.abs(alone[0].astype(int) - alone[1]).max() > 1


def test_the_bits_of_a_picture_in_a_batch_follow_its_place_and_not_the_others(base):
    batch = drawn(base, batch_size=3)
    copies = drawn(base, requests=[REQUESTS[1]] * 3, batch_size=3)
    assert np.array_equal(batch[1], copies[1])
    places = [drawn_together(index, 8, 2, 3) for index in range(8)]
    assert places == [(3, 0), (3, 1), (3, 2), (3, 0), (3, 1), (3, 2), (2, 0), (2, 1)]


def test_a_negative_prompt_and_a_size_are_diffusers_own(base):
    conditions = Conditions(negative_prompt="a lake", size_px=(96, 48))
    how = dict(negative_prompt="a lake", width=96, height=48)
    found = drawn(base, conditions)
    assert found[0].shape == (48, 96, 3)
    assert np.array_equal(found[0], theirs(base, diffusers.StableDiffusionPipeline, 3, **how))
    assert not np.array_equal(found[0], drawn(base, Conditions(size_px=(96, 48)))[0])


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_draws_as_its_class_does_whatever_the_batch(base, name):
    if name == "dpmsolver_sde":
        pytest.importorskip("torchsde")
    sampling = dataclasses.replace(SAMPLING, scheduler=name)
    before = torch.get_rng_state()
    check_sampler(name, base.scheduler, {}, sampling.num_inference_steps)
    assert torch.equal(before, torch.get_rng_state())
    found = drawn(base, sampling=sampling)
    if name != "dpmsolver_sde":  # whose noise follows no generator but by a setting of ours
        assert np.array_equal(found[1], theirs(base, diffusers.StableDiffusionPipeline, 4, sampling))
    together = drawn(base, sampling=sampling, batch_size=3)
    assert np.abs(found[1].astype(int) - together[1]).max() <= 1
    assert np.array_equal(found[1], drawn(base, sampling=sampling, requests=REQUESTS[1:2])[0])
    kind = scheduler_class(name, base.scheduler)
    if name != "base":
        assert scheduler_class(kind.__name__, base.scheduler) is kind


@pytest.mark.parametrize(
    ("name", "text", "key", "value"),
    [
        ("euler", "use_karras_sigmas=true", "use_karras_sigmas", True),
        ("dpmsolver++", "algorithm_type=sde-dpmsolver++, use_karras_sigmas=true", "algorithm_type", "sde-dpmsolver++"),
        ("ddim", "timestep_spacing=trailing", "timestep_spacing", "trailing"),
        ("ddim", "eta=1", "eta", 1.0),
        ("tcd", "eta=0.3", "eta", 0.3),
        ("unipc", "solver_order=1", "solver_order", 1),
    ],
)
def test_options_of_a_sampler_change_what_is_drawn(base, name, text, key, value):
    options = read_options(text, name, base.scheduler)
    assert options[key] == value
    sampling = dataclasses.replace(SAMPLING, scheduler=name)
    changed = drawn(base, Conditions(scheduler_options=options), sampling, REQUESTS[:1])[0]
    assert not np.array_equal(changed, drawn(base, sampling=sampling, requests=REQUESTS[:1])[0])
    further = {"eta": value} if key == "eta" else {}
    expected = theirs(base, diffusers.StableDiffusionPipeline, 3, sampling, options, **further)
    assert np.array_equal(changed, expected)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("ddim", "use_karras_sigmas=true", "scheduler_options: 'use_karras_sigmas=true': ddim takes clip_sample"),
        ("euler", "beta_start=0.1", "euler takes interpolation_type"),
        ("euler", "use_karras_sigmas", "as NAME=VALUE"),
        ("ddim", "eta=2", "eta=2: 0 to 1 is allowed"),
        ("euler", "use_karras_sigmas=maybe", "use_karras_sigmas=maybe: a value such as False is needed"),
        (
            "euler",
            "timestep_spacing=[",
            "4 steps, scheduler_options timestep_spacing: [ is not",
        ),
        ("dpmsolver++", "algorithm_type=best", "4 steps, scheduler_options algorithm_type: best is not"),
        ("palace", None, "scheduler: 'palace' is not one of ddim, dpmsolver++"),
        ("EDMEulerScheduler", None, "is not one of ddim"),
    ],
)
def test_a_sampler_refuses_in_one_line(base, name, text, message):
    with pytest.raises(UserError) as error:
        check_sampler(name, base.scheduler, read_options(text, name, base.scheduler), 4)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def saved(folder, image, name):
    image.save(folder / name)
    return str(folder / name)


def test_pictures_come_to_the_size_that_is_drawn(tmp_path):
    wide = saved(tmp_path, PICTURE.resize((300, 200)), "wide.png")
    mask = saved(tmp_path, MASK.resize((300, 200)), "mask.png")
    for asked, size in (((None, None), (80, 56)), ((None, 64), (96, 64)), ((48, None), (48, 32)), ((64, 64),) * 2):
        picture, drawn_mask = read_conditions_images(wide, mask, (64 * 64, 128 * 64), asked, 8)
        assert picture.size == drawn_mask.size == size
        assert (picture.mode, drawn_mask.mode) == ("RGB", "L")
    assert read_conditions_images(wide, None, (64 * 64, 64 * 64), (None, None), 8)[1] is None
    near = saved(tmp_path, PICTURE.resize((98, 64)), "near.png")
    for most, size in ((128 * 64, (96, 64)), (64 * 64, (80, 48))):
        assert read_conditions_images(near, None, (64 * 64, most), (None, None), 8)[0].size == size


def test_masks_that_do_not_fit_are_refused_in_one_line(tmp_path):
    picture = saved(tmp_path, PICTURE, "p.png")
    black = saved(tmp_path, Image.new("RGB", (64, 64)), "black.png")
    small = saved(tmp_path, MASK.resize((32, 64)), "small.png")
    for mask, message in (
        (black, f"mask_image: {black} has no white"),
        (small, f"mask_image: {small} is 32 x 64 px, image {picture} is 64 x 64 px"),
        (str(tmp_path / "none.png"), "none.png: cannot be read"),
    ):
        with pytest.raises(UserError) as error:
            read_conditions_images(picture, mask, (64 * 64, 64 * 64), (None, None), 8)
        assert message in str(error.value)


def test_what_a_base_cannot_draw_is_refused_by_its_name(base, inpainting_base):
    start = Conditions(size_px=(64, 64), image=PICTURE, image_strength=0.1)
    for pipe, sampling, conditions, message in (
        (inpainting_base, SAMPLING, Conditions(), "mask_image: this base is one for inpainting"),
        (inpainting_base, SAMPLING, dataclasses.replace(start, image_strength=1.0), "mask_image: this base"),
        (base, SAMPLING, start, "image_strength: 0.1 of 4 steps is none; 0.25 or more is allowed"),
        (base, Sampling(1.0, 4), Conditions(negative_prompt="x"), "negative_prompt does nothing at guidance_scale 1"),
    ):
        with pytest.raises(UserError) as error:
            check_conditions(pipe, sampling, conditions)
        assert message in str(error.value)
    check_conditions(inpainting_base, SAMPLING, dataclasses.replace(start, mask=MASK, image_strength=1.0))

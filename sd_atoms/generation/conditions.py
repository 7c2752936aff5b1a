"""What pictures are drawn with besides a prompt, a seed and the sampling: a picture to start from, a mask and more."""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline
from diffusers.configuration_utils import FrozenDict
from PIL import Image

from sd_atoms.data.images import fit, read_image
from sd_atoms.data.masks import LEAST_WHITE, Mask
from sd_atoms.errors import UserError
from sd_atoms.pipeline.sampling import Sampling

IMAGE_STRENGTH, MASK_STRENGTH = 0.8, 1.0  # as diffusers' pipelines have them
INPAINTING_CHANNELS = 9  # of a UNet that also sees the mask and what is outside it, for latents of 4


@dataclass(frozen=True)
class Conditions:
    """What all pictures of a call share; as it stands they are drawn from their prompts alone.

    negative_prompt: what guidance leads away from. size_px: width and height; None = a square of the sampling's
    resolution. scheduler_options: as `read_options` returns them. image: RGB picture of that size, which drawing
    starts from. mask: mode L, of that size: white is drawn anew, black stays as it is in `image`, greys lie between.
    image_strength: share of the steps that is drawn, 0 to 1. prompt_weights: prompts are read by compel.
    """

    negative_prompt: str | None = None
    size_px: tuple[int, int] | None = None
    scheduler_options: Mapping[str, Any] = field(default_factory=dict)
    image: Image.Image | None = None
    mask: Image.Image | None = None
    image_strength: float = 1.0
    prompt_weights: bool = False


def read_conditions_images(
    image: str, mask: str | None, areas_px: tuple[int, int], size_px: tuple[int | None, int | None], unit_px: int
) -> tuple[Image.Image, Image.Image | None]:
    """A picture to start from, and its mask, cropped and scaled to the size that is drawn.

    Args:
        image: file of the picture.
        mask: file of the mask, as large as the picture; None without.
        areas_px: where the size is open: the picture keeps its own if its area lies between these, and otherwise comes
            to the first of them in its own shape.
        size_px: width and height, each None where it is open.
        unit_px: what sides are multiples of.

    Returns:
        The picture (RGB) and its mask (L, or None), both of one size.

    Raises:
        UserError: a file cannot be read, they are of two sizes, or the mask has no white.
    """
    picture = read_image(image)
    shape = size_px if None not in size_px else _size_like(picture, areas_px, size_px, unit_px)
    how = dict(center_crop=True, resample="lanczos", rng=None)
    if mask is None:
        return fit(picture, shape, **how), None
    drawn = Mask(str(mask), partial(_content, mask)).read()
    if drawn.size != picture.size:
        sizes = [f"{side.width} x {side.height}" for side in (drawn, picture)]
        raise UserError(f"mask_image: {mask} is {sizes[0]} px, image {image} is {sizes[1]} px; one size is needed")
    drawn = fit(drawn, shape, **how | dict(resample="bilinear"))
    if drawn.getextrema()[1] < LEAST_WHITE:
        raise UserError(f"mask_image: {mask} has no white, which is where the picture is drawn anew")
    return fit(picture, shape, **how), drawn


def _content(path: str | Path) -> bytes:
    try:
        return Path(path).expanduser().read_bytes()
    except OSError as error:
        raise UserError(f"mask_image: {path}: cannot be read ({error.strerror})") from error


def _size_like(picture: Image.Image, areas_px: tuple[int, int], size_px: tuple[int | None, int | None], unit_px: int):
    """Width and height in a picture's shape, with one side given or none."""
    aspect, own = picture.width / picture.height, picture.width * picture.height
    area = own if areas_px[0] <= own <= areas_px[1] else areas_px[0]
    width, height = size_px
    if width is None:
        width = math.sqrt(area * aspect) if height is None else height * aspect
    height = width / aspect if height is None else height
    return tuple(max(1, round(side / unit_px)) * unit_px for side in (width, height))


def check_conditions(pipe, sampling: Sampling, conditions: Conditions) -> None:
    """Whether a base can draw so.

    Raises:
        UserError: it cannot; the line names the setting.
    """
    channels, latent_channels = pipe.unet.config.in_channels, pipe.vae.config.latent_channels
    if channels != latent_channels and channels != INPAINTING_CHANNELS:
        raise UserError(
            f"base: its UNet takes {channels} channels; {latent_channels} of a latent are allowed, or "
            f"{INPAINTING_CHANNELS} of an inpainting UNet"
        )
    if channels != latent_channels and conditions.mask is None:
        raise UserError("mask_image: this base is one for inpainting; image and mask_image are required")
    steps = sampling.num_inference_steps
    if conditions.image is not None and int(steps * conditions.image_strength) < 1:
        raise UserError(
            f"image_strength: {conditions.image_strength:g} of {steps} steps is none; {1 / steps:.3g} or more is "
            "allowed"
        )
    if conditions.negative_prompt is not None and sampling.guidance_scale <= 1:
        raise UserError(
            f"negative_prompt does nothing at guidance_scale {sampling.guidance_scale:g}; more than 1 is needed"
        )


@contextlib.contextmanager
def pipeline_for(pipe, conditions: Conditions) -> Iterator[Any]:
    """The pipeline of diffusers that draws so, of the same parts."""
    if conditions.image is None:
        yield pipe
        return
    kind = StableDiffusionImg2ImgPipeline if conditions.mask is None else StableDiffusionInpaintPipeline
    made, config = kind(**pipe.components, requires_safety_checker=False), pipe.unet.config
    made.set_progress_bar_config(disable=True)
    if config.in_channels == pipe.vae.config.latent_channels:
        # by this number diffusers tells an ordinary UNet, whatever the width of its latents
        pipe.unet._internal_dict = FrozenDict({**config, "in_channels": 4})
    try:
        yield made
    finally:
        pipe.unet._internal_dict = config


def call_settings(conditions: Conditions, sampling: Sampling, count: int, unit_px: int) -> dict[str, Any]:
    """What such a pipeline is called with to draw `count` pictures.

    Every picture has its own copy of the image and the mask: so what is drawn of the autoencoder's distribution comes
    from the picture's own generator.
    """
    width, height = conditions.size_px or (sampling.resolution,) * 2
    settings: dict[str, Any] = dict(width=width, height=height)
    if "eta" in conditions.scheduler_options:
        settings["eta"] = conditions.scheduler_options["eta"]
    if conditions.image is None:
        return settings
    settings |= dict(image=[conditions.image] * count, strength=conditions.image_strength)
    if conditions.mask is None:
        return {key: value for key, value in settings.items() if key not in ("width", "height")}
    return settings | dict(mask_image=[_whole_latents(conditions.mask, unit_px)] * count)


def _whole_latents(mask: Image.Image, unit_px: int) -> Image.Image:
    """A mask in black and white whose white covers whole latents: diffusers asks one pixel of each, and would pass
    over what is thinner."""
    white = np.asarray(mask) >= LEAST_WHITE
    blocks = white.reshape(white.shape[0] // unit_px, unit_px, white.shape[1] // unit_px, unit_px).any(axis=(1, 3))
    return Image.fromarray(np.kron(blocks, np.full((unit_px, unit_px), 255)).astype(np.uint8))


def keep_outside(pictures: Sequence[Image.Image], conditions: Conditions) -> list[Image.Image]:
    """The pictures with what is black in the mask as it was, bit for bit; the autoencoder changes it a little."""
    if conditions.mask is None:
        return list(pictures)
    return [Image.composite(picture, conditions.image, conditions.mask) for picture in pictures]

"""What a sample is made of: an image as latents, cropped as the settings say, and the states of its prompts."""

import functools
import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from sd_atoms.data.buckets import bucket_sizes, nearest
from sd_atoms.data.config import DataSettings
from sd_atoms.data.images import fit
from sd_atoms.data.records import ImageRecord
from sd_atoms.files import replacing
from sd_atoms.machine import check_finite
from sd_atoms.pipeline.fingerprint import weights_digest

STATES_IN_MEMORY = 256 * 2**20  # bytes: 1,137 prompts of Stable Diffusion v1-4 in float32


class Latents(NamedTuple):
    """Posterior of one image under the VAE: mean and std, (c, h, w) float32 on the CPU."""

    mean: torch.Tensor
    std: torch.Tensor

    def sample(self, noise: torch.Tensor) -> torch.Tensor:
        """mean + std·noise, (c, h, w)."""
        return self.mean + self.std * noise


class Example(NamedTuple):
    """An image to learn from: its latents, mirrored too where that is asked for, which prompts go with it, and where
    its subject is, if that is said."""

    latents: Latents
    mirrored: Latents | None
    prompts: tuple[int, ...]  # indices of the run's prompts
    mask: torch.Tensor | None = None  # (h, w) uint8, not mirrored


@dataclass(frozen=True)
class Examples(Sequence):
    """Images to learn from, each made when it is asked for: nothing here grows with the set but numbers, and masks.

    latents: by image, Latents, or a pair with the mirrored ones. prompts: by image, indices of the run's prompts.
    order: which images these are, one may come several times. masks: by image, (h, w) uint8 or None; None = no image
    has one.
    """

    latents: Sequence[tuple[Latents, Latents | None]]
    prompts: Sequence[tuple[int, ...]]
    order: Sequence[int]
    masks: Sequence[torch.Tensor | None] | None = None

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, place: int | slice) -> "Example | Examples":
        if isinstance(place, slice):
            return replace(self, order=self.order[place])
        image = self.order[place]
        mask = None if self.masks is None else self.masks[image]
        return Example(*self.latents[image], self.prompts[image], mask)


@dataclass(frozen=True)
class Cropping:
    """How images become training images: by the settings of the data, at a resolution whose sides are multiples of
    `unit_px`."""

    data: DataSettings
    resolution_px: int
    unit_px: int
    seed: int


def size_of(size: tuple[int, int], how: Cropping) -> tuple[int, int]:
    """(width, height) in px that an image of `size` is trained at."""
    if how.data.aspect_ratio_buckets:
        return nearest(size, bucket_sizes(how.resolution_px, how.unit_px))
    return how.resolution_px, how.resolution_px


def crop(record: ImageRecord, how: Cropping) -> Image.Image:
    """An image in its training size; the place of the crop depends on nothing but the image's name and the seed."""
    return _cropped(record.read(), record.name, how, how.data.image_interpolation_mode)


def crop_mask(record: ImageRecord, how: Cropping) -> Image.Image:
    """The mask of an image that has one, scaled by area and cropped as `crop` does the image; mode L."""
    return _cropped(record.mask.read(), record.name, how, "box")


def _cropped(image: Image.Image, name: str, how: Cropping, resample: str) -> Image.Image:
    place, size = random.Random(f"{how.seed}/{Path(name).name}"), size_of(image.size, how)
    return fit(image, size, center_crop=how.data.center_crop, resample=resample, rng=place)


def tokenize(tokenizer, prompts: list[str]) -> torch.Tensor:
    """Token ids (P, 77), padded and cut as at inference."""
    return tokenizer(
        prompts, padding="max_length", truncation=True, max_length=tokenizer.model_max_length, return_tensors="pt"
    ).input_ids


def prompt_states(text_encoder, token_ids: torch.Tensor, cache: Path | None) -> Callable[[int], torch.Tensor]:
    """prompt -> its states (77, d), on the CPU in the dtype of a text encoder that is not trained.

    They are made when they are asked for, one prompt at a time; the latest are kept, as many as STATES_IN_MEMORY
    holds, and with a cache all of them on disk.

    Args:
        text_encoder: of the base.
        token_ids: (P, 77), of all prompts.
        cache: folder; None for no cache.
    """
    one = token_ids.shape[1] * text_encoder.config.hidden_size * text_encoder.dtype.itemsize
    own = weights_digest(text_encoder) if cache is not None else None

    @functools.lru_cache(maxsize=max(1, STATES_IN_MEMORY // one))
    def state_of(prompt: int) -> torch.Tensor:
        ids = token_ids[prompt]
        if cache is None:
            return _text_states(text_encoder, ids)
        content = b"".join(len(part).to_bytes(8, "big") + part for part in (own, ids.numpy().tobytes()))
        path = cache / "text" / f"{hashlib.sha256(content).hexdigest()}.safetensors"
        try:
            return load_file(path)["states"]
        except (OSError, SafetensorError):  # not there, or broken
            states = _text_states(text_encoder, ids)
            with replacing(path) as temporary:
                save_file({"states": states.contiguous()}, temporary)
            return states

    return state_of


@torch.no_grad()
def _text_states(text_encoder, ids: torch.Tensor) -> torch.Tensor:
    states = text_encoder(ids.unsqueeze(0).to(text_encoder.device))[0][0].cpu()
    check_finite(states, "the states of a prompt", "the text encoder of the base is broken")
    return states

"""The training set of a run: latents and prompts, both made once and kept in memory, on disk too if asked for."""

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

from sd_atoms.data.buckets import bucket_sizes, nearest
from sd_atoms.data.config import DataSettings
from sd_atoms.data.images import fit, flip, to_tensor
from sd_atoms.data.records import ImageRecord
from sd_atoms.files import replacing
from sd_atoms.machine import check_finite


class Latents(NamedTuple):
    """Posterior of one image under the VAE: mean and std, (c, h, w) float32 on the CPU."""

    mean: torch.Tensor
    std: torch.Tensor

    def sample(self, noise: torch.Tensor) -> torch.Tensor:
        """mean + std·noise, (c, h, w)."""
        return self.mean + self.std * noise


class Example(NamedTuple):
    """An image to learn from: its latents, mirrored too where that is asked for, and which prompts go with it."""

    latents: Latents
    mirrored: Latents | None
    prompts: tuple[int, ...]  # indices of the run's prompts


@dataclass(frozen=True)
class Cropping:
    """How images become training images: by the settings of the data, at a resolution whose sides are multiples of
    `unit_px`."""

    data: DataSettings
    resolution_px: int
    unit_px: int
    seed: int


def crop(record: ImageRecord, how: Cropping) -> Image.Image:
    """An image in its training size; the place of the crop depends on nothing but the image's name and the seed."""
    place = random.Random(f"{how.seed}/{Path(record.name).name}")
    image = record.read()
    size = how.resolution_px
    if how.data.aspect_ratio_buckets:
        size = nearest(image.size, bucket_sizes(how.resolution_px, how.unit_px))
    return fit(image, size, center_crop=how.data.center_crop, resample=how.data.image_interpolation_mode, rng=place)


def encode_images(vae, records: Sequence[ImageRecord], how: Cropping) -> list[tuple[Latents, Latents | None]]:
    """Reads, crops and encodes every image once, and its mirror image with `random_flip`.

    One at a time and in float32: the VAE of Stable Diffusion overflows in fp16, and a batch would change last bits.
    """
    encode = _encoder(vae, Path(how.data.cache_dir) if how.data.cache_dir else None)
    found = []
    for record in tqdm(records, desc="Latents", unit="picture", disable=None, delay=2, leave=False):
        image = crop(record, how)
        mirrored = encode(flip(image), record.name) if how.data.random_flip else None
        found.append((encode(image, record.name), mirrored))
    return found


def tokenize(tokenizer, prompts: list[str]) -> torch.Tensor:
    """Token ids (P, 77), padded and cut as at inference."""
    return tokenizer(
        prompts, padding="max_length", truncation=True, max_length=tokenizer.model_max_length, return_tensors="pt"
    ).input_ids


@torch.no_grad()
def encode_prompts(text_encoder, token_ids: torch.Tensor, cache: Path | None) -> torch.Tensor:
    """States (P, 77, d) of a text encoder that is not trained, one prompt at a time, on the CPU in its dtype."""
    states, own = [], None
    for ids in token_ids:
        if cache is None:
            states.append(_text_states(text_encoder, ids))
            continue
        own = own or fingerprint(text_encoder)
        path = cache / "text" / f"{_hash(own, ids.numpy().tobytes())}.safetensors"
        states.append(_kept(path, lambda ids=ids: {"states": _text_states(text_encoder, ids)})["states"])
    return torch.stack(states)


def fingerprint(module: nn.Module) -> bytes:
    """A hash of all weights and their dtype: cached results count for this very network."""
    content = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        content.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        content.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return content.digest()


def _text_states(text_encoder, ids: torch.Tensor) -> torch.Tensor:
    states = text_encoder(ids.unsqueeze(0).to(text_encoder.device))[0][0].cpu()
    check_finite(states, "the states of a prompt", "the text encoder of the base is broken")
    return states


def _encoder(vae, cache: Path | None) -> Callable[[Image.Image, str], Latents]:
    own = fingerprint(vae) if cache is not None else None

    @torch.no_grad()
    def encode(image: Image.Image, name: str) -> dict[str, torch.Tensor]:
        posterior = vae.encode(to_tensor([image]).to(vae.device, vae.dtype)).latent_dist
        scale = vae.config.scaling_factor
        check_finite(posterior.mean + posterior.std, f"the latents of {name}", "the autoencoder of the base is broken")
        return {"mean": posterior.mean[0].float().cpu() * scale, "std": posterior.std[0].float().cpu() * scale}

    def cached(image: Image.Image, name: str) -> Latents:
        if cache is None:
            return Latents(**encode(image, name))
        key = _hash(own, f"{image.size}".encode(), image.tobytes())
        return Latents(**_kept(cache / "latents" / f"{key}.safetensors", lambda: encode(image, name)))

    return cached


def _kept(path: Path, make: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The tensors in a file of the cache; made and written if it is not there or broken."""
    try:
        return load_file(path)
    except (OSError, SafetensorError):
        tensors = {name: value.contiguous() for name, value in make().items()}
        with replacing(path) as temporary:
            save_file(tensors, temporary)
        return tensors


def _hash(*parts: bytes) -> str:
    content = hashlib.sha256()
    for part in parts:
        content.update(len(part).to_bytes(8, "big") + part)
    return content.hexdigest()

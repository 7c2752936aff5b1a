"""Latents of all images of a run, made once: in memory where they fit, else in shards that are read as needed.

A shard is a safetensors file of at most SHARD_IMAGES images, written whole or not at all, so that a killed run leaves
whole shards and the next one makes what is missing. A name in it is a hash of the image file's content, of how the
image is cropped and of the autoencoder: other runs, methods and sets that hold the same image find it.
"""

import contextlib
import hashlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sd_atoms.data.images import flip, to_tensor
from sd_atoms.data.records import ImageRecord
from sd_atoms.errors import refuse
from sd_atoms.files import replacing
from sd_atoms.machine import check_finite, on_main, read_ahead, shared_work
from sd_atoms.pipeline.fingerprint import weights_digest
from sd_atoms.progress import followed
from sd_atoms.training.examples import Cropping, Latents, crop, crop_mask, size_of

SHARD_IMAGES = 512
KEY_DIGITS = 32
FLOAT32_BYTES = 4
Pair = tuple[Latents, Latents | None]  # as the image is, and mirrored where that is asked for


def encode_images(
    vae, records: Sequence[ImageRecord], how: Cropping, scratch: Path | None = None, accelerator=None
) -> Sequence[Pair]:
    """The latents of every image, and of its mirror image with `random_flip`.

    One at a time and in float32: the VAE of Stable Diffusion overflows in fp16, and a batch would change last bits.

    Args:
        vae: the base's, in float32.
        records: the images, checked.
        how: they are cropped.
        scratch: folder for what does not fit into `latents_in_memory`, where no `cache_dir` is set.
        accelerator: its processes share the work; all must call it.

    Raises:
        UserError: latents are not finite, or the disk is full.
    """
    folder = Path(how.data.cache_dir) / "latents" if how.data.cache_dir else None
    if folder is None and scratch is not None and latents_bytes(vae, records, how) > how.data.latents_in_memory:
        folder = scratch
    if folder is None:
        return shared_work(lambda share: list(_encoded(vae, share, how)), records, accelerator)
    own = hashlib.sha256(weights_digest(vae) + repr(_choices(how)).encode()).hexdigest()[:16]
    return _on_disk(vae, records, how, folder / own, accelerator)


def latents_bytes(vae, records: Sequence[ImageRecord], how: Cropping) -> int:
    """What the latents of the images take."""
    factor = _factor(vae)
    pixels = sum(width * height for width, height in (size_of(record.stats.size, how) for record in records))
    of_one_px = 2 * vae.config.latent_channels * FLOAT32_BYTES / factor**2  # mean and std
    return int(pixels * of_one_px) * (1 + how.data.random_flip)


def latent_masks(
    vae, records: Sequence[ImageRecord], how: Cropping, accelerator=None
) -> list[torch.Tensor | None] | None:
    """The mask of every image in the size of its latents, (h, w) uint8: 255 times the share of the place that is
    subject, so that parts thinner than a place count by their area; None if no image has one.

    They are made anew at every start, from the files as they are, and stay in memory: a byte for each place of the
    latents, a thirty-second of what these take.

    Args:
        vae: the base's.
        records: the images, their masks checked; those without have None.
        how: they are cropped.
        accelerator: its processes share the work; all must call it.

    Raises:
        UserError: a crop has nothing of its subject; all such are named.
    """
    if all(record.mask is None for record in records):
        return None

    def reduced(record: ImageRecord) -> torch.Tensor | None:
        if record.mask is None:
            return None
        return torch.from_numpy(np.array(crop_mask(record, how).reduce(_factor(vae))))

    def make(share: Sequence[ImageRecord]) -> list[torch.Tensor | None]:
        return list(followed(read_ahead(reduced, share), len(share), "Masks", "mask"))

    found = shared_work(make, records, accelerator)
    lost = [record for record, mask in zip(records, found, strict=True) if mask is not None and not mask.any()]
    problems = [f"{record.name}: its crop has nothing of its subject by {record.mask.name}" for record in lost]
    refuse(problems, f"masks: {len(lost)} crops have nothing of their subject:")
    return found


def _factor(vae) -> int:
    """Pixels to a side of one place of the latents."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def remove_scratch(scratch: Path) -> None:
    """Removes the shards that a run kept for itself."""
    shutil.rmtree(scratch, ignore_errors=True)


class Shards(Sequence):
    """Latents by image, mapped into memory from the shards of a folder."""

    def __init__(self, folder: Path, keys: Sequence[str], mirrored: bool) -> None:
        """Opens the shards; raises KeyError if they lack an image."""
        self.files, places = [], {}
        for file, names in _intact(folder):
            places |= dict.fromkeys(names, len(self.files))
            self.files.append(file)
        self.keys = np.array(keys, dtype=f"S{KEY_DIGITS}")
        self.shards = np.array([places[key] for key in keys], dtype=np.int32)
        self.mirrored = mirrored

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, image: int) -> Pair:
        whole = self.files[self.shards[image]].get_tensor(self.keys[image].decode())  # (2 or 4, c, h, w)
        return Latents(*whole[:2]), Latents(*whole[2:]) if self.mirrored else None


def _on_disk(vae, records: Sequence[ImageRecord], how: Cropping, folder: Path, accelerator) -> Shards:
    keys = [_key(record, how) for record in records]
    # one look for all: a process that is late would see what another has written already, and share other work
    there = on_main(accelerator, lambda: {name for _, names in _intact(folder) for name in names})
    missing = list({key: record for key, record in zip(keys, records, strict=True) if key not in there}.items())

    def write(share: Sequence[tuple[str, ImageRecord]]) -> list[None]:
        pairs = _encoded(vae, [record for _, record in share], how)
        for start in range(0, len(share), SHARD_IMAGES):
            names = [key for key, _ in share[start : start + SHARD_IMAGES]]
            tensors = {}
            for name in names:
                latents, mirrored = next(pairs)
                tensors[name] = torch.stack([*latents, *(mirrored or ())])
            content = hashlib.sha256("".join(names).encode()).hexdigest()[:16]
            with replacing(folder / f"{content}.safetensors") as temporary:
                save_file(tensors, temporary)
        return [None] * len(share)

    shared_work(write, missing, accelerator)
    return Shards(folder, keys, how.data.random_flip)


def _intact(folder: Path) -> Iterator[tuple[safe_open, list[str]]]:
    """The shards of a folder with their names; a broken one counts as not there."""
    for path in sorted(folder.glob("[!.]*.safetensors")):
        with contextlib.suppress(SafetensorError, OSError):
            file = safe_open(path, "pt")
            yield file, list(file.keys())


def _encoded(vae, records: Sequence[ImageRecord], how: Cropping) -> Iterator[Pair]:
    """In the order of the records; files are read and cropped ahead of the autoencoder."""
    cropped = read_ahead(lambda record: (record.name, crop(record, how)), records)
    for name, image in followed(cropped, len(records), "Latents", "picture"):
        mirrored = _encode(vae, flip(image), name) if how.data.random_flip else None
        yield _encode(vae, image, name), mirrored


@torch.no_grad()
def _encode(vae, image, name: str) -> Latents:
    posterior = vae.encode(to_tensor([image]).to(vae.device, vae.dtype)).latent_dist
    check_finite(posterior.mean + posterior.std, f"the latents of {name}", "the autoencoder of the base is broken")
    scale = vae.config.scaling_factor
    return Latents(posterior.mean[0].float().cpu() * scale, posterior.std[0].float().cpu() * scale)


def _choices(how: Cropping) -> tuple:
    """What of the settings latents depend on."""
    data = how.data
    return (
        how.resolution_px, how.unit_px, data.aspect_ratio_buckets, data.center_crop, data.random_flip,
        data.image_interpolation_mode,
    )  # fmt: skip


def _key(record: ImageRecord, how: Cropping) -> str:
    """Hash of an image's content and of the place of its crop, which its name decides."""
    place = "" if how.data.center_crop else f"{how.seed}/{Path(record.name).name}"
    return hashlib.sha256(f"{record.stats.digest} {place}".encode()).hexdigest()[:KEY_DIGITS]

"""The training set of a concept: latents and prompts, both made once."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from sd_atoms.data.images import fit, read_image, to_tensor


@dataclass(frozen=True)
class Latents:
    """Posterior of every picture under the VAE: mean and std, (N, c, h, w) float32 on the CPU."""

    mean: torch.Tensor
    std: torch.Tensor

    def sample(self, image: int, noise: torch.Tensor) -> torch.Tensor:
        """mean + std·noise, (c, h, w)."""
        return self.mean[image] + self.std[image] * noise


@torch.no_grad()
def encode_images(
    vae, paths: Sequence[Path], resolution: int, center_crop: bool, interpolation: str, seed: int
) -> Latents:
    """Reads, crops and encodes every picture once; scaled by the VAE's own factor.

    One at a time and in float32: the VAE of Stable Diffusion overflows in fp16, and a batch would change last bits.
    """
    means, stds = [], []
    for path in tqdm(paths, desc="Latents", unit="picture", disable=None, delay=2, leave=False):
        place = random.Random(f"{seed}/{path.name}")  # the crop of a picture depends on nothing but itself
        picture = fit(read_image(path), resolution, center_crop=center_crop, resample=interpolation, rng=place)
        posterior = vae.encode(to_tensor([picture]).to(vae.device, vae.dtype)).latent_dist
        means.append(posterior.mean.float().cpu() * vae.config.scaling_factor)
        stds.append(posterior.std.float().cpu() * vae.config.scaling_factor)
    return Latents(torch.cat(means), torch.cat(stds))


def tokenize(tokenizer, prompts: list[str]) -> torch.Tensor:
    """Token ids (P, 77), padded and cut as at inference."""
    return tokenizer(
        prompts, padding="max_length", truncation=True, max_length=tokenizer.model_max_length, return_tensors="pt"
    ).input_ids

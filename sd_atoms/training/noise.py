"""Everything random in training as a pure function of (seed, sample number).

Sample number n counts over the whole run: optimiser step · pictures per step + place within the step. So a resumed run
draws what an uninterrupted one would, and a step of 4 pictures is the same step as 4 × 1, 2 × 2 or on 2 processes.
"""

import functools
import hashlib
from typing import NamedTuple

import torch


class SampleNoise(NamedTuple):
    """What sample n of an image consists of: a prompt, a timestep, and unit noise for the latent and the diffusion."""

    prompt: int  # among the prompts of that image
    timestep: int
    latent_noise: torch.Tensor  # (c, h, w)
    noise: torch.Tensor  # (c, h, w)
    mirrored: float  # in [0, 1): compared with the share of mirrored samples
    dropped: float  # in [0, 1): compared with the share of empty prompts
    whole_noise: torch.Tensor  # (c, 1, 1)


def image_number(seed: int, n: int, images: int, purpose: str = "sample") -> int:
    """Which of so many images sample n of a run shows: each epoch goes through all once, in an order of its own."""
    epoch, place = divmod(n, images)
    return _order(seed, "order" if purpose == "sample" else f"{purpose} order", epoch, images)[place].item()


@functools.lru_cache(maxsize=4)  # of the training and of the prior, while one epoch goes over into the next
def _order(seed: int, purpose: str, epoch: int, images: int) -> torch.Tensor:
    return torch.randperm(images, generator=generator(seed, purpose, epoch))


def sample_noise(
    seed: int, n: int, prompts: int, shape: tuple[int, ...], timesteps: int, purpose: str = "sample"
) -> SampleNoise:
    """Sample n of a run.

    Args:
        seed: of the run.
        n: the sample's number.
        prompts: how many its image has.
        shape: of its image's latents (c, h, w).
        timesteps: how many the noise schedule has.
        purpose: other purposes have other noise.
    """
    own = generator(seed, purpose, n)
    return SampleNoise(
        prompt=torch.randint(prompts, (), generator=own).item(),
        timestep=torch.randint(timesteps, (), generator=own).item(),
        latent_noise=torch.randn(shape, generator=own),
        noise=torch.randn(shape, generator=own),
        mirrored=torch.rand((), generator=own).item(),
        dropped=torch.rand((), generator=own).item(),
        whole_noise=torch.randn((shape[0], 1, 1), generator=own),
    )


def generator(seed: int, purpose: str, number: int) -> torch.Generator:
    """A CPU generator of its own for each (seed, purpose, number).

    Its seed is a hash with the highest of 63 bits set, so it never equals a seed that pictures are drawn with.
    """
    digest = hashlib.blake2b(f"{seed}/{purpose}/{number}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 2 | 1 << 62)


def sample_numbers(step: int, micro_batch: int, rank: int, processes: int, batch: int, accumulation: int) -> range:
    """The samples of one process in one micro-batch of an optimiser step (counted from 0)."""
    start = ((step * accumulation + micro_batch) * processes + rank) * batch
    return range(start, start + batch)

"""Everything random in training as a pure function of (seed, sample number).

Sample number n counts over the whole run: optimiser step · pictures per step + place within the step. So a resumed run
draws what an uninterrupted one would, and a step of 4 pictures is the same step as 4 × 1, 2 × 2 or on 2 processes.
"""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import torch


class SampleNoise(NamedTuple):
    """What sample n consists of: indices, a timestep, and unit noise for the latent and for the diffusion."""

    image: int
    prompt: int  # among the prompts of that image
    timestep: int
    latent_noise: torch.Tensor  # (c, h, w)
    noise: torch.Tensor  # (c, h, w)
    mirrored: float  # in [0, 1): compared with the share of mirrored samples
    dropped: float  # in [0, 1): compared with the share of empty prompts
    whole_noise: torch.Tensor  # (c, 1, 1)


def sample_noise(
    seed: int,
    n: int,
    prompts: Sequence[int],
    shapes: Sequence[tuple[int, ...]],
    timesteps: int,
    purpose: str = "sample",
) -> SampleNoise:
    """Sample n of a run: each epoch goes through all images once, in an order of its own.

    Args:
        seed: of the run.
        n: the sample's number.
        prompts: per image, how many prompts it has.
        shapes: per image, the shape of its latents (c, h, w).
        timesteps: how many the noise schedule has.
        purpose: other purposes have other noise.
    """
    epoch, place = divmod(n, len(prompts))
    order_of = "order" if purpose == "sample" else f"{purpose} order"
    image = torch.randperm(len(prompts), generator=generator(seed, order_of, epoch))[place].item()
    own = generator(seed, purpose, n)
    return SampleNoise(
        image=image,
        prompt=torch.randint(prompts[image], (), generator=own).item(),
        timestep=torch.randint(timesteps, (), generator=own).item(),
        latent_noise=torch.randn(shapes[image], generator=own),
        noise=torch.randn(shapes[image], generator=own),
        mirrored=torch.rand((), generator=own).item(),
        dropped=torch.rand((), generator=own).item(),
        whole_noise=torch.randn((shapes[image][0], 1, 1), generator=own),
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

"""Everything random in training as a pure function of (seed, sample number).

Sample number n counts over the whole run: optimiser step · pictures per step + place within the step. So a resumed run
draws what an uninterrupted one would, and a step of 4 pictures is the same step as 4 × 1, 2 × 2 or on 2 processes.
"""

import hashlib
from typing import NamedTuple

import torch


class Draw(NamedTuple):
    """What sample n consists of: indices, a timestep, and unit noise for the latent and for the diffusion."""

    image: int
    template: int
    timestep: int
    latent_noise: torch.Tensor  # (c, h, w)
    noise: torch.Tensor  # (c, h, w)


def draw(seed: int, n: int, images: int, templates: int, timesteps: int, shape: tuple[int, ...]) -> Draw:
    """Sample n of a run: each epoch goes through all images once, in an order of its own."""
    epoch, place = divmod(n, images)
    order = torch.randperm(images, generator=generator(seed, "order", epoch))
    own = generator(seed, "sample", n)
    template = torch.randint(templates, (), generator=own).item()
    timestep = torch.randint(timesteps, (), generator=own).item()
    return Draw(
        image=order[place].item(),
        template=template,
        timestep=timestep,
        latent_noise=torch.randn(shape, generator=own),
        noise=torch.randn(shape, generator=own),
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

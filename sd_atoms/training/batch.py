"""Samples made ready for the network: one entry per sample, stacked where their shapes agree."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from sd_atoms.training.config import TrainConfig
from sd_atoms.training.denoiser import Denoiser, adapters_off
from sd_atoms.training.draws import Draw, draw
from sd_atoms.training.examples import Example
from sd_atoms.training.objective import losses, offset, snr_weights, target


@dataclass(frozen=True)
class Texts:
    """The prompts of a run as the network takes them.

    inputs: token ids (P, 77), or states (P, 77, d) where the text encoder does not move. empty: index of the empty
    prompt. base_states: states (P, 77, d) by the untouched text encoder, for the teacher; None without one.
    """

    inputs: torch.Tensor
    empty: int
    base_states: torch.Tensor | None = None


class Sample(NamedTuple):
    """What the network sees and should say."""

    noisy: torch.Tensor  # (c, h, w)
    wanted: torch.Tensor | None  # (c, h, w); None: the teacher says it
    timestep: int
    prompt: int
    weight: float


def samples(
    numbers: Iterable[int],
    config: TrainConfig,
    examples: Sequence[Example],
    schedule,
    empty: int,
    *,
    purpose: str = "sample",
    weight: float = 1.0,
    taught: bool = False,
) -> list[Sample]:
    """The samples of those numbers; `purpose` as in `draw`, `taught`: what is wanted comes from the teacher."""
    counts = [len(example.prompts) for example in examples]
    shapes = [tuple(example.latents.mean.shape) for example in examples]
    steps = schedule.config.num_train_timesteps
    return [
        _sample(
            draw(config.seed, n, counts, shapes, steps, purpose), config, examples, schedule, empty, weight, taught
        )
        for n in numbers
    ]


def _sample(drawn: Draw, config: TrainConfig, examples, schedule, empty, weight, taught) -> Sample:
    example = examples[drawn.image]
    mirrored = example.mirrored is not None and drawn.mirrored < 0.5
    clean = (example.mirrored if mirrored else example.latents).sample(drawn.latent_noise)
    noise = offset(drawn.noise, drawn.whole_noise, config.noise_offset)
    timestep = torch.tensor([drawn.timestep])
    noisy = schedule.add_noise(clean.unsqueeze(0), noise.unsqueeze(0), timestep)[0]
    wanted = None if taught else target(schedule, clean.unsqueeze(0), noise.unsqueeze(0), timestep)[0]
    if config.snr_gamma is not None:
        weight = weight * snr_weights(schedule, timestep, config.snr_gamma).item()
    prompt = empty if drawn.dropped < config.caption_dropout and not taught else example.prompts[drawn.prompt]
    return Sample(noisy, wanted, drawn.timestep, prompt, weight)


def loss_of(
    batch: Sequence[Sample],
    denoiser: Callable,
    plain: Denoiser,
    texts: Texts,
    config: TrainConfig,
    device: torch.device,
) -> torch.Tensor:
    """Weighted loss of every sample, (B,), float32; samples of one shape go through the network together.

    Args:
        batch: the samples.
        denoiser: the network as training wraps it.
        plain: the same, unwrapped: the teacher is the base inside it.
        texts: the prompts.
        config: loss type and precision.
        device: where it is computed.
    """
    found = []
    for group in _of_one_shape(batch):
        dtype = plain.unet.dtype
        noisy = torch.stack([sample.noisy for sample in group]).to(device, dtype)
        timesteps = torch.tensor([sample.timestep for sample in group], device=device)
        prompts = [sample.prompt for sample in group]
        prediction = denoiser(noisy, timesteps, texts.inputs[prompts].to(device))
        taught = [place for place, sample in enumerate(group) if sample.wanted is None]
        wanted = torch.empty_like(prediction, dtype=torch.float32)
        told = [place for place, sample in enumerate(group) if sample.wanted is not None]
        if told:
            wanted[told] = torch.stack([group[place].wanted for place in told]).to(device)
        if taught:
            with torch.no_grad(), adapters_off(plain.unet):
                states = texts.base_states[[prompts[place] for place in taught]].to(device)
                wanted[taught] = plain(noisy[taught], timesteps[taught], states).float()
        weights = torch.tensor([sample.weight for sample in group], device=device)
        found.append(weights * losses(prediction, wanted, config.loss_type, config.huber_c))
    return torch.cat(found)


def _of_one_shape(batch: Sequence[Sample]) -> Iterator[list[Sample]]:
    shapes = {}
    for sample in batch:
        shapes.setdefault(sample.noisy.shape, []).append(sample)
    yield from shapes.values()

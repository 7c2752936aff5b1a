"""A loss that can be compared between steps: the same images, noise and timesteps every time."""

from collections.abc import Sequence

import torch

from sd_atoms.training.batch import Sample, Texts, places_of, sample_losses
from sd_atoms.training.examples import Example
from sd_atoms.training.noise import generator
from sd_atoms.training.objective import prediction_target
from sd_atoms.training.sections import ObjectiveSettings

TIMESTEPS = 8  # evenly over the noise schedule: a loss is mostly noise of its timestep


@torch.no_grad()
def validation_loss(
    plain, examples: Sequence[Example], texts: Texts, objective: ObjectiveSettings, seed: int, schedule, accelerator
) -> float:
    """Mean loss over every example at `TIMESTEPS` timesteps, each with noise of its own, by its first prompt.

    Nothing of the training moves: no noise is taken from it, and min-SNR weights and dropped captions are left out;
    masks count as in training.
    The processes share the work; all must call it, and all get the same number.
    """
    places = len(examples) * TIMESTEPS
    found = torch.zeros(places, device=accelerator.device)
    plain.unet.eval()  # the text encoder trains in eval mode as it is
    for place in range(accelerator.process_index, places, accelerator.num_processes):
        sample = _sample(examples[place // TIMESTEPS], place, seed, schedule, objective)
        found[place] = sample_losses([sample], plain, plain, texts, objective, accelerator.device)[0]
    plain.unet.train()
    # every place was filled by one process, so the sum over them is exact
    return accelerator.reduce(found, "sum").mean().item()


def _sample(example: Example, place: int, seed: int, schedule, objective: ObjectiveSettings) -> Sample:
    clean = example.latents.mean.unsqueeze(0)
    part = place % TIMESTEPS
    timestep = torch.tensor([int((part + 0.5) / TIMESTEPS * schedule.config.num_train_timesteps)])
    noise = torch.randn(clean.shape, generator=generator(seed, "validation", place))
    noisy = schedule.add_noise(clean, noise, timestep)[0]
    target = prediction_target(schedule, clean, noise, timestep)[0]
    return Sample(noisy, target, timestep.item(), example.prompts[0], 1.0, places_of(example, objective))

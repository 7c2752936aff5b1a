"""Samples made ready for the network: one entry per sample, stacked where their shapes agree."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from sd_atoms.methods.adapters import adapters_off
from sd_atoms.training.denoiser import Denoiser
from sd_atoms.training.examples import Example
from sd_atoms.training.noise import image_number, sample_noise
from sd_atoms.training.objective import losses, mask_weights, offset, prediction_target, snr_weights
from sd_atoms.training.sections import ObjectiveSettings


@dataclass(frozen=True)
class Texts:
    """The prompts of a run as the network takes them.

    token_ids: (P, 77). state_of: prompt -> its states (77, d), where the text encoder does not move; None where it
    does. base_states: prompt -> states (77, d) by the untouched text encoder, of those that the teacher is asked for.
    """

    token_ids: torch.Tensor
    state_of: Callable[[int], torch.Tensor] | None = None
    base_states: Mapping[int, torch.Tensor] = field(default_factory=dict)

    def of(self, prompts: Sequence[int], device: torch.device) -> dict[str, torch.Tensor]:
        """What `Denoiser` takes for those prompts."""
        if self.state_of is None:
            return {"token_ids": self.token_ids[prompts].to(device)}
        return {"states": torch.stack([self.state_of(prompt) for prompt in prompts]).to(device)}


class Sample(NamedTuple):
    """What the network sees and should say."""

    noisy: torch.Tensor  # (c, h, w)
    target: torch.Tensor | None  # (c, h, w); None: the teacher says it
    timestep: int
    prompt: int
    weight: float
    places: torch.Tensor | None = None  # (h, w), what each place counts; None = all alike


def make_samples(
    numbers: Iterable[int],
    examples: Sequence[Example],
    schedule,
    objective: ObjectiveSettings,
    seed: int,
    *,
    empty: int,
    caption_dropout: float = 0.0,
    purpose: str = "sample",
    weight: float = 1.0,
    from_teacher: bool = False,
) -> list[Sample]:
    """The samples of those numbers.

    Args:
        numbers: of the samples, see `noise`.
        examples: what they are samples of.
        schedule: the noise schedule.
        objective: what the network should say.
        seed: of the run.
        empty: the empty prompt, which a share `caption_dropout` of the samples gets.
        purpose: as in `sample_noise`.
        weight: of each in the loss.
        from_teacher: the target comes from the teacher, and every prompt stays.
    """
    steps = schedule.config.num_train_timesteps
    made = []
    for number in numbers:
        example = examples[image_number(seed, number, len(examples), purpose)]
        shape = tuple(example.latents.mean.shape)
        drawn = sample_noise(seed, number, len(example.prompts), shape, steps, purpose)
        mirrored = example.mirrored is not None and drawn.mirrored < 0.5
        clean = (example.mirrored if mirrored else example.latents).sample(drawn.latent_noise).unsqueeze(0)
        noise = offset(drawn.noise, drawn.whole_noise, objective.noise_offset).unsqueeze(0)
        timestep = torch.tensor([drawn.timestep])
        target = None if from_teacher else prediction_target(schedule, clean, noise, timestep)[0]
        own_weight = weight
        if objective.snr_gamma is not None:
            own_weight *= snr_weights(schedule, timestep, objective.snr_gamma).item()
        dropped = drawn.dropped < caption_dropout and not from_teacher
        prompt = empty if dropped else example.prompts[drawn.prompt]
        noisy = schedule.add_noise(clean, noise, timestep)[0]
        places = places_of(example, objective, mirrored)
        made.append(Sample(noisy, target, drawn.timestep, prompt, own_weight, places))
    return made


def places_of(example: Example, objective: ObjectiveSettings, mirrored: bool = False) -> torch.Tensor | None:
    """What each place of an example counts, as `Sample.places`."""
    if example.mask is None:
        return None
    return mask_weights(example.mask.flip(-1) if mirrored else example.mask, objective.mask_weight)


def sample_losses(
    batch: Sequence[Sample],
    denoiser: Callable,
    plain: Denoiser,
    texts: Texts,
    objective: ObjectiveSettings,
    device: torch.device,
) -> torch.Tensor:
    """Weighted loss of every sample, (B,), float32; samples of one shape go through the network together.

    Args:
        batch: the samples.
        denoiser: the network as training wraps it.
        plain: the same, unwrapped: the teacher is the base inside it.
        texts: the prompts.
        objective: type of the loss.
        device: where it is computed.
    """
    found, shapes = [], {}
    for sample in batch:
        shapes.setdefault(sample.noisy.shape, []).append(sample)
    for group in shapes.values():
        noisy = torch.stack([sample.noisy for sample in group]).to(device, plain.unet.dtype)
        timesteps = torch.tensor([sample.timestep for sample in group], device=device)
        prompts = [sample.prompt for sample in group]
        prediction = denoiser(noisy, timesteps, **texts.of(prompts, device))
        target = torch.empty_like(prediction, dtype=torch.float32)
        known = [place for place, sample in enumerate(group) if sample.target is not None]
        from_teacher = [place for place, sample in enumerate(group) if sample.target is None]
        if known:
            target[known] = torch.stack([group[place].target for place in known]).to(device)
        if from_teacher:
            with torch.no_grad(), adapters_off(plain.unet):
                states = torch.stack([texts.base_states[prompts[place]] for place in from_teacher]).to(device)
                target[from_teacher] = plain(noisy[from_teacher], timesteps[from_teacher], states=states).float()
        weights, places = torch.tensor([sample.weight for sample in group], device=device), None
        if any(sample.places is not None for sample in group):
            even = torch.ones(noisy.shape[2:])
            places = torch.stack([even if sample.places is None else sample.places for sample in group]).to(device)
        found.append(weights * losses(prediction, target, objective.loss_type, objective.huber_c, places))
    return torch.cat(found)

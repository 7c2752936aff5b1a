"""What a step learns from: noisy latents in, the scheduler's target out, one loss per picture."""

import torch
from diffusers import DDPMScheduler

PREDICTION_TYPES = ("epsilon", "v_prediction")


def noising(base_scheduler, prediction_type: str | None) -> DDPMScheduler:
    """The training noise schedule of a base, whatever sampler it ships with.

    Raises:
        ValueError: the base predicts something else than epsilon or v.
    """
    schedule = DDPMScheduler.from_config(base_scheduler.config)
    if prediction_type is not None:
        schedule.register_to_config(prediction_type=prediction_type)
    if schedule.config.prediction_type not in PREDICTION_TYPES:
        raise ValueError(
            f"the base predicts {schedule.config.prediction_type!r}; {', '.join(PREDICTION_TYPES)} are trained"
        )
    return schedule


def target(
    schedule: DDPMScheduler, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """What the network should predict, (B, c, h, w): ε, or v = √ᾱ·ε − √(1−ᾱ)·x₀ (Salimans and Ho 2022)."""
    if schedule.config.prediction_type == "v_prediction":
        return schedule.get_velocity(latents, noise, timesteps)
    return noise


def losses(prediction: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Mean squared error of each picture, (B, c, h, w) -> (B,), in float32."""
    return (prediction.float() - wanted.float()).square().flatten(1).mean(1)

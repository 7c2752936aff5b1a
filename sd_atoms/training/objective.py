"""What a step learns from: noisy latents in, the scheduler's target out, one loss per picture."""

import torch
from diffusers import DDPMScheduler

from sd_atoms.errors import UserError

PREDICTION_TYPES = ("epsilon", "v_prediction")


def noising(base_scheduler, prediction_type: str | None, zero_snr: bool = False) -> DDPMScheduler:
    """The training noise schedule of a base, whatever sampler it ships with.

    Args:
        base_scheduler: the pipeline's.
        prediction_type: what the base predicts; None = as its scheduler says.
        zero_snr: rescale the schedule so that the last timestep is pure noise (Lin et al. 2023, algorithm 1).

    Raises:
        UserError: the base predicts something else than epsilon or v, or zero_snr comes with epsilon, which pure
            noise tells nothing about.
    """
    own = base_scheduler.config
    prediction_type = prediction_type or own.get("prediction_type", "epsilon")
    if prediction_type not in PREDICTION_TYPES:
        raise UserError(f"the base predicts {prediction_type!r}; {', '.join(PREDICTION_TYPES)} are trained")
    zero_snr = zero_snr or own.get("rescale_betas_zero_snr", False)
    if zero_snr and prediction_type == "epsilon":
        raise UserError("rescale_betas_zero_snr needs a base that predicts v_prediction; this one predicts epsilon")
    return DDPMScheduler.from_config(own, prediction_type=prediction_type, rescale_betas_zero_snr=zero_snr)


def prediction_target(
    schedule: DDPMScheduler, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """What the network should predict, (B, c, h, w): ε, or v = √ᾱ·ε − √(1−ᾱ)·x₀ (Salimans and Ho 2022)."""
    if schedule.config.prediction_type == "v_prediction":
        return schedule.get_velocity(latents, noise, timesteps)
    return noise


def losses(
    prediction: torch.Tensor,
    target: torch.Tensor,
    kind: str = "l2",
    c: float | torch.Tensor = 0.1,
    places: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean distance of each picture, (B, c, h, w) -> (B,), in float32.

    Args:
        prediction, target: of one shape.
        kind: "l2", d²; "huber", 2c·(√(d² + c²) − c), d² near zero and 2c·|d| far from it; "smooth_l1", the same
            divided by c, so that it is 2·|d| far from zero.
        c: where squares turn into lines.
        places: what each place of each picture counts, (B, h, w) with a mean of 1 for each picture, as of
            `mask_weights`; None = all alike.
    """
    difference = prediction.float() - target.float()
    distance = difference.square()
    if kind != "l2":
        # √(d² + c²) − c in a form that does not cancel near zero
        distance = (2 * c if kind == "huber" else 2) * (distance / ((distance + c * c).sqrt() + c))
    if places is not None:
        distance = distance * places.unsqueeze(1)
    return distance.flatten(1).mean(1)


def mask_weights(mask: torch.Tensor, outside: float) -> torch.Tensor:
    """What each place of a masked picture counts in its loss, (h, w) uint8 -> (h, w) float32 with a mean of 1.

    With M = mask / 255 in [0, 1] and o = outside, a place has w = M + o·(1 − M), and the loss of a picture is the
    weighted mean of its distances d over places and channels, Σ w·d / Σ w = mean(d · w / mean(w)); w / mean(w) is
    returned. So the loss, and the step that a learning rate makes, does not shrink with the subject's area, and a mask
    that is white all over, or o = 1, gives 1 everywhere, which leaves the loss as it is bit for bit.

    Raises:
        ValueError: the mask is black all over and o = 0, so that nothing counts.
    """
    part = mask.double() / 255
    weights = part + outside * (1 - part)
    mean = weights.mean()
    if mean == 0:
        raise ValueError("a mask that is black all over, and nothing counts outside it")
    return (weights / mean).float()


def snr_weights(schedule: DDPMScheduler, timesteps: torch.Tensor, gamma: float) -> torch.Tensor:
    """Min-SNR weights of a loss on the scheduler's own target, (B,) (Hang et al. 2023, section 3.4).

    The weight of a loss on x₀ is min(SNR, γ). The squared error of ε is SNR times that of x₀, the one of v (SNR + 1)
    times; so min(SNR, γ)/SNR, and min(SNR, γ)/(SNR + 1). Where SNR is zero the former would be 0/0: it is 1 there, its
    limit.
    """
    alphas = schedule.alphas_cumprod.to(timesteps.device, torch.float64)[timesteps]
    snr = alphas / (1 - alphas)
    if schedule.config.prediction_type == "v_prediction":
        return (snr.clamp(max=gamma) / (snr + 1)).float()
    return torch.where(snr > gamma, gamma / snr, torch.ones_like(snr)).float()


def offset(noise: torch.Tensor, whole: torch.Tensor, strength: float) -> torch.Tensor:
    """ε + strength · (one number per picture and channel), which lets a picture's mean colour move.

    (B, c, h, w) and (B, c, 1, 1) -> (B, c, h, w)
    """
    return noise + strength * whole if strength else noise

"""The base that a run's settings name."""

import torch
from diffusers import StableDiffusionPipeline

from sd_atoms.pipeline import open_base
from sd_atoms.training.sections import BaseSettings


def open_base_of(settings: BaseSettings, device: str | torch.device = "cpu") -> StableDiffusionPipeline:
    """Opens it, in float32; raises UserError as `open_base` does."""
    return open_base(
        settings.pretrained_model_name_or_path,
        revision=settings.revision,
        variant=settings.variant,
        base_config=settings.base_config,
        device=device,
    )

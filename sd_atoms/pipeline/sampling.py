"""How images are drawn: guidance, denoising steps, the sampler and the size."""

from dataclasses import dataclass

from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

_SCHEDULER_CLASSES = {"ddim": DDIMScheduler, "dpmsolver++": DPMSolverMultistepScheduler}
SCHEDULERS = (*_SCHEDULER_CLASSES, "base")


@dataclass(frozen=True)
class Sampling:
    """How images are drawn."""

    guidance_scale: float = 7.5  # what Stable Diffusion v1 is usually drawn with
    num_inference_steps: int = 25
    scheduler: str = "ddim"  # deterministic, and the same at any number of steps before it
    resolution: int | None = None  # px; None = the base's own


def make_scheduler(name: str, own):
    """The sampler of that name on a base's noise schedule; "base" is one of the base's own kind."""
    return _SCHEDULER_CLASSES.get(name, type(own)).from_config(own.config)

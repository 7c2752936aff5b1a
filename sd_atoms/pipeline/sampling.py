"""How images are drawn: guidance, denoising steps, the sampler and the size."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
import yaml

from sd_atoms.errors import UserError

# what each goes by here -> diffusers' class, which is taken for a name too
_SCHEDULER_CLASSES = {
    "ddim": "DDIMScheduler",
    "dpmsolver++": "DPMSolverMultistepScheduler",
    "dpmsolver++_2s": "DPMSolverSinglestepScheduler",
    "dpmsolver_sde": "DPMSolverSDEScheduler",
    "unipc": "UniPCMultistepScheduler",
    "deis": "DEISMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "dpm2": "KDPM2DiscreteScheduler",
    "dpm2_a": "KDPM2AncestralDiscreteScheduler",
    "lms": "LMSDiscreteScheduler",
    "pndm": "PNDMScheduler",
    "ddpm": "DDPMScheduler",
    "sa_solver": "SASolverScheduler",
    "lcm": "LCMScheduler",
    "tcd": "TCDScheduler",
}
SAMPLERS = (*_SCHEDULER_CLASSES, "base")
# a base was trained with these; noise follows a picture's seed
_FIXED = (
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type",
    "noise_sampler_seed",
)  # fmt: skip


@dataclass(frozen=True)
class Sampling:
    """How images are drawn."""

    guidance_scale: float = 7.5  # what Stable Diffusion v1 is usually drawn with
    num_inference_steps: int = 25
    scheduler: str = "ddim"  # deterministic, and the same at any number of steps before it
    resolution: int | None = None  # px; None = the base's own


def make_scheduler(name: str, own, options: Mapping[str, Any] | None = None):
    """The sampler of that name on a base's noise schedule; "base" is one of the base's own kind.

    Args:
        name: one of SAMPLERS, or a class of diffusers among them.
        own: the base's scheduler.
        options: of the class's constructor, as `read_options` returns them; `eta`, of a step, is passed over.
    """
    further = {key: value for key, value in (options or {}).items() if key != "eta"}
    return scheduler_class(name, own).from_config(own.config, **further)


def scheduler_class(name: str, own) -> type:
    """The class of diffusers that a sampler's name stands for.

    Raises:
        UserError: there is none of that name that draws with Stable Diffusion.
    """
    if name == "base":
        return type(own)
    name = _SCHEDULER_CLASSES.get(name, name)
    if name not in _SCHEDULER_CLASSES.values():
        raise UserError(f"scheduler: {name!r} is not one of {', '.join(SAMPLERS)}, nor a class of diffusers for them")
    return getattr(diffusers, name)


def read_options(text: str | None, name: str, own) -> dict[str, Any]:
    """A sampler's options, "use_karras_sigmas=true,timestep_spacing=trailing", as its class takes them.

    Args:
        text: names and values, with commas between; None has none.
        name: of the sampler.
        own: the base's scheduler.

    Raises:
        UserError: the sampler has no such option, it belongs to the base, or the value is of another kind.
    """
    kind, options = scheduler_class(name, own), {}
    for entry in [] if text is None else text.split(","):
        key, equals, written = (part.strip() for part in entry.partition("="))
        known = _defaults(kind)
        if not equals or key not in known:
            raise UserError(f"scheduler_options: {entry.strip()!r}: {name} takes {', '.join(known)}, as NAME=VALUE")
        try:
            value = yaml.safe_load(written)
        except yaml.YAMLError:
            value = written
        usual = known[key]
        if type(usual) is float and type(value) is int:
            value = float(value)
        if usual is not None and type(value) is not type(usual):
            raise UserError(f"scheduler_options: {key}={written}: a value such as {usual!r} is needed")
        if key == "eta" and not 0 <= value <= 1:
            raise UserError(f"scheduler_options: eta={written}: 0 to 1 is allowed")
        options[key] = value
    return options


def check_sampler(name: str, own, options: Mapping[str, Any], num_inference_steps: int) -> None:
    """Goes through all steps with a latent of zeros, so that a sampler refuses before anything is drawn.

    Raises:
        UserError: it cannot be made with these options, or cannot take so many steps.
    """
    try:
        scheduler = make_scheduler(name, own, options)
        scheduler.set_timesteps(num_inference_steps)
        steps = {key: value for key, value in options.items() if key == "eta"}
        latent = torch.zeros(1, 4, 1, 1)
        with torch.random.fork_rng(devices=[]):  # some draw noise
            for timestep in scheduler.timesteps:
                scheduler.scale_model_input(latent, timestep)
                latent = scheduler.step(torch.zeros_like(latent), timestep, latent, **steps).prev_sample
    except Exception as error:  # the classes raise whatever they trip over, and ImportError without their packages
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, ImportError):
            reason = 'it needs a package that is not installed: pip install "sd-atoms[samplers]"'
        given = f", scheduler_options {', '.join(options)}" if options else ""
        raise UserError(f"scheduler: {name} at {num_inference_steps} steps{given}: {reason}") from error


def _defaults(kind: type) -> dict[str, Any]:
    """Option -> its usual value."""
    known = {
        key: parameter.default
        for key, parameter in inspect.signature(kind.__init__).parameters.items()
        if key not in ("self", *_FIXED) and not callable(parameter.default) and key != "tau_func"
    }
    if "eta" in inspect.signature(kind.step).parameters:
        known["eta"] = 0.0
    return known

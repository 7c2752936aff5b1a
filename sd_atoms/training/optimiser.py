"""Which parameters are trained at which rate, by which optimiser, and their running mean."""

import contextlib
from collections.abc import Callable, Iterator, Mapping

import torch
from diffusers.optimization import get_scheduler
from torch import nn

from sd_atoms.errors import UserError
from sd_atoms.methods import Method
from sd_atoms.settings import replaced
from sd_atoms.training.config import TrainConfig
from sd_atoms.training.sections import OptimiserSettings

RATE_NAMES = ("learning_rate", "beta_learning_rate", "token_learning_rate", "text_learning_rate")


def with_defaults(config: TrainConfig) -> TrainConfig:
    """The same settings with what was left open filled in: the method's target, and every learning rate."""
    usual, method = config.usual_rates(), config.method.chosen()
    left_open = {name: rate for name, rate in usual.items() if getattr(config.optimiser, name) is None}
    return replaced(config, target=config.method.target or method.default_target, **left_open)


def parameter_groups(
    parameters: Mapping[str, nn.Parameter], optimiser: OptimiserSettings, method: Method
) -> list[dict]:
    """The trained parameters by learning rate: the UNet's by kind, embedding rows, the text encoder's adapter."""
    rates = {name: getattr(optimiser, name) for name in RATE_NAMES} | dict(method.rates)
    groups = {name: [] for name in rates}
    for name, parameter in parameters.items():
        if ".trained." in name:
            group = "token_learning_rate"
        elif name.startswith("text_encoder."):
            group = "text_learning_rate"
        else:
            kind = method.kind(name)
            usual = "beta_learning_rate" if kind == "beta" else kind
            group = "learning_rate" if kind in method.main_kinds else usual
        groups[group].append(parameter)
    return [{"params": members, "lr": rates[group]} for group, members in groups.items() if members]


def make_optimizer(groups: list[dict], config: OptimiserSettings) -> torch.optim.Optimizer:
    """The optimiser of the run.

    Raises:
        UserError: its package is not installed, or it does not work on this device.
    """
    settings = dict(
        betas=(config.adam_beta1, config.adam_beta2), weight_decay=config.adam_weight_decay, eps=config.adam_epsilon
    )
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, **settings)
    if config.optimizer == "adamw8bit":
        if groups[0]["params"][0].device.type == "cpu":
            raise UserError("optimizer: adamw8bit needs a graphics card; adamw is the same in full precision")
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError as error:
            raise UserError('optimizer: adamw8bit needs `pip install "sd-atoms[8bit]"`') from error
        return AdamW8bit(groups, **settings)
    try:
        from prodigyopt import Prodigy
    except ImportError as error:
        raise UserError('optimizer: prodigy needs `pip install "sd-atoms[prodigy]"`') from error
    rates = sorted({group["lr"] for group in groups})
    if len(rates) > 1:
        raise UserError(f"optimizer: prodigy takes one learning rate for all, got {', '.join(map(str, rates))}")
    return Prodigy(groups, **settings, decouple=True, safeguard_warmup=True)


def rate_schedule(config: OptimiserSettings, steps: int) -> Callable[[float], float]:
    """Optimiser step -> factor of the learning rates, whatever the processes and the accumulation."""
    nothing = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=1.0)
    return get_scheduler(
        config.lr_scheduler,
        nothing,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=steps,
        num_cycles=config.lr_num_cycles,
        power=config.lr_power,
    ).lr_lambdas[0]


@torch.no_grad()
def update_mean(
    mean: dict[str, torch.Tensor], parameters: Mapping[str, nn.Parameter], decay: float, step: int
) -> None:
    """mean ← d·mean + (1 − d)·parameters after optimiser step `step` (from 1), d rising to `decay`.

    In the first steps the mean would otherwise be of the start: d = min(decay, step / (step + 9)).
    """
    weight = 1 - min(decay, step / (step + 9))
    for name, parameter in parameters.items():
        mean[name].lerp_(parameter, weight)


@contextlib.contextmanager
def swapped_in(parameters: Mapping[str, nn.Parameter], values: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Other values in the parameters for a while; an empty mapping changes nothing."""
    before = {name: parameters[name].detach().clone() for name in values}
    load_values(parameters, values)
    try:
        yield
    finally:
        load_values(parameters, before)


@torch.no_grad()
def load_values(parameters: Mapping[str, nn.Parameter], values: Mapping[str, torch.Tensor]) -> None:
    """Writes values into the parameters of the same names."""
    for name, value in values.items():
        parameters[name].copy_(value)

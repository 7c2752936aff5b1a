"""What a method of training is, to everything that is not the method itself."""

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from peft import PeftConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.tuners_utils import set_requires_grad
from torch import nn

from sd_atoms.errors import UserError
from sd_atoms.methods.adapters import REFUSALS, one_line
from sd_atoms.tuner import TARGET_SETS, named_targets
from sd_atoms.tuner.config import is_count

Target = str | Sequence[str] | None
KINDS = ("atoms", "beta", "block", "lora", "bias", "norm", "scale", "row", "full")
LARGEST_SIZE = 2**16
BUDGET_FACTOR = 1.5
COUNTED = "counted"  # name of an adapter that is only counted


@dataclass(frozen=True)
class Method:
    """One way of training a network, as a PEFT tuner.

    Fields:
        name: as `--method` takes it.
        help: one line.
        build: (model, settings, target) -> the PEFT config, None where no adapter is needed; may raise ValueError.
        kind: parameter name -> one of KINDS, which decides its rate.
        main_kinds: the kinds whose rate `--learning_rate` is.
        rates: kind -> rate where none is given. Those other than of atoms are provisional: usual values elsewhere.
        settings: the names of the flags that are this method's.
        default_target: a named set of layers; None where the method leaves no choice.
        size: the setting that `find_budget` moves: 1, 2, 3, … -> settings whose counts rise; None beyond the last.
        exports: what `sd-atoms export` can write a trained adapter as: lora (kohya's and diffusers' LoRA), diff
            (differences of weights), checkpoint (a merged base), comfy (a matrix B of each layer), words.
        portable: whether an adapter means something on another base of the same architecture.
        linear: whether the changes of several adapters, and of one by its strength, add up.
    """

    name: str
    help: str
    build: Callable[[nn.Module, Mapping[str, Any], Target], PeftConfig | None]
    kind: Callable[[str], str]
    main_kinds: tuple[str, ...]
    rates: Mapping[str, float] = field(default_factory=dict)
    settings: tuple[str, ...] = ()
    default_target: str | None = None
    size: Callable[[int], Mapping[str, Any] | None] = lambda number: None
    exports: tuple[str, ...] = ("checkpoint",)
    portable: bool = True
    linear: bool = True

    def make_config(
        self, model: nn.Module, settings: Mapping[str, Any] | None = None, target: Target = None
    ) -> PeftConfig | None:
        """The PEFT config for a network; None for a method that puts no adapter into it.

        Args:
            model: read, not changed.
            settings: some of the method's, by name; `seed` may be among them for any method.
            target: a named set, a list of module names or endings, or an expression; None for the default.

        Raises:
            UserError: a setting is not the method's or out of range, or a layer cannot take it; one line.
        """
        settings = {} if settings is None else dict(settings)
        foreign = [name for name in settings if name not in (*self.settings, "seed")]
        if foreign:
            allowed = f"it has {', '.join(self.settings)}" if self.settings else "it has none"
            raise UserError(f"{', '.join(foreign)}: no settings of method {self.name}; {allowed}")
        if target is not None and self.default_target is None:
            raise UserError(f"target={target!r}: method {self.name} has no target to choose")
        try:
            return self.build(model, settings, self.default_target if target is None else target)
        except REFUSALS as error:
            raise UserError(f"method {self.name}: {one_line(error)}") from error

    def count(self, model: nn.Module, config: PeftConfig | None) -> int:
        """How many numbers an adapter of that config trains in a network, which is not changed.

        Raises:
            UserError: the network cannot take it; one line.
        """
        return 0 if config is None else count_trained(skeleton(model), config)


def skeleton(model: nn.Module) -> nn.Module:
    """A copy of a network that has shapes and no numbers."""
    tensors = [*model.parameters(), *model.buffers()]
    return _copied(model, {id(tensor): _shape_of(tensor) for tensor in tensors})


def _copied(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A copy to be looked at: it shares diffusers' hooks, as of group offloading, which cannot be copied."""
    hooks = [vars(module).get("_diffusers_hook") for module in model.modules()]
    return copy.deepcopy(model, memo | {id(hook): hook for hook in hooks if hook is not None})


def _shape_of(tensor: torch.Tensor) -> torch.Tensor:
    shape = torch.empty_like(tensor, device="meta")
    return nn.Parameter(shape, requires_grad=False) if isinstance(tensor, nn.Parameter) else shape


def count_trained(model: nn.Module, config: PeftConfig) -> int:
    """As `Method.count`, for a skeleton, whose copy takes the adapter."""
    model = _adapted_skeleton(model, config)
    set_requires_grad(model, COUNTED)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def adapter_shapes(model: nn.Module, config: PeftConfig) -> dict[str, tuple[int, ...]]:
    """Key -> shape of the state that PEFT keeps of an adapter of that config in a network, which is not changed.

    Raises:
        UserError: the network cannot take it; one line.
    """
    adapted = _adapted_skeleton(skeleton(model), config)
    state = get_peft_model_state_dict(adapted, adapter_name=COUNTED, save_embedding_layers=False)
    return {key: tuple(value.shape) for key, value in state.items()}


def _adapted_skeleton(model: nn.Module, config: PeftConfig) -> nn.Module:
    """A copy of a skeleton with an adapter named COUNTED."""
    model, config = _copied(model, {}), copy.deepcopy(config)
    model.requires_grad_(False)
    config.inference_mode = True  # atoms are then not decomposed, which needs numbers
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they come again when the adapter is added
            inject_adapter_in_model(config, model, COUNTED, low_cpu_mem_usage=True)
    except REFUSALS as error:
        raise UserError(f"{config.peft_type.value}: {one_line(error)}") from error
    return model


class Sized(NamedTuple):
    """The settings that a budget leads to, and how many numbers they train."""

    settings: dict[str, Any]
    count: int


def find_budget(
    method: Method,
    model: nn.Module,
    budget: int,
    settings: Mapping[str, Any] | None = None,
    target: Target = None,
) -> Sized:
    """The size of a method, by its setting `size`, whose count is nearest to a budget (as a ratio).

    Args:
        method: what is trained.
        model: read, not changed.
        budget: trained numbers, from 1 on.
        settings: further ones of the method, which stay as they are.
        target: as for `Method.make_config`.

    Raises:
        UserError: the nearest count is beyond a factor of 1.5 of the budget, or the method has no size to choose.
    """
    if not is_count(budget, 1):
        raise UserError(f"budget={budget!r}: an integer from 1 on is allowed")
    empty, given, seen = skeleton(model), dict(settings or {}), {}

    def sized(number: int) -> Sized | None:
        if number not in seen:
            size = method.size(number)
            made = None if size is None else {**size, **given}
            if size is not None and given.keys() & size.keys():
                raise UserError(f"{', '.join(given.keys() & size.keys())}: is what budget={budget} chooses")
            config = None if made is None else method.make_config(empty, made, target)
            seen[number] = None if config is None else Sized(made, count_trained(empty, config))
        return seen[number]

    if sized(1) is None:
        config = method.make_config(empty, given, target)
        return _near(method, budget, [Sized(given, 0 if config is None else count_trained(empty, config))])
    low, high = 1, 2
    # from here on the count at `low` is below the budget, and that at `high` is not, or nothing is there
    while low < LARGEST_SIZE and sized(high) is not None and sized(low).count < sized(high).count < budget:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if sized(middle) is not None and sized(middle).count < budget:
            low = middle
        else:
            high = middle
    return _near(method, budget, [found for found in (sized(low), sized(high)) if found is not None])


def _near(method: Method, budget: int, found: list[Sized]) -> Sized:
    def ratio(sized: Sized) -> float:
        return max(sized.count, budget) / max(1, min(sized.count, budget))

    best = min(found, key=ratio)
    if ratio(best) > BUDGET_FACTOR:
        how = ", ".join(f"{name}={value}" for name, value in best.settings.items()) or "its only size"
        raise UserError(
            f"budget={budget}: method {method.name} comes no nearer than {best.count} ({how}), "
            f"which is beyond a factor of {BUDGET_FACTOR}"
        )
    return best


def resolved_target(model: nn.Module, target: Target) -> list[str] | str:
    """A target as PEFT takes it: named sets become lists of names."""
    if isinstance(target, str):
        return named_targets(model, target) if target in TARGET_SETS else target
    return list(target)

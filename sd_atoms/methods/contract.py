"""What every method promises, as checks that any test can run: ours, and those of packages that bring a method.

from sd_atoms.methods.contract import check_method

def test_my_method_keeps_the_contract():
    check_method(MY_METHOD, make_network, inputs)
"""

import copy
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import safetensors.torch
import torch
from peft import PeftConfig, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

from sd_atoms.methods.adapters import (
    adapters_off,
    add_adapter,
    delete_adapter,
    merge_adapters,
    set_adapters,
    tuner_layers,
    unmerge_adapters,
)
from sd_atoms.methods.method import KINDS, Method, Target

MERGED_WITHIN = 1e-5  # relative, in float32
MOVE = 0.05  # standard deviation of what stands for training
WEIGHTS = (0.5, -1.5)


@dataclass(frozen=True)
class Case:
    """A method on a network.

    Fields:
        method: with an adapter.
        make_network: -> a new network in float32 with the same numbers every time, in eval mode.
        inputs: its arguments, tensors; the output is a tensor or has it as `sample`.
        settings, target: as for `Method.make_config`.
    """

    method: Method
    make_network: Callable[[], nn.Module]
    inputs: Sequence[Any]
    settings: Mapping[str, Any] = field(default_factory=dict)
    target: Target = None

    def config(self, model: nn.Module) -> PeftConfig:
        return self.method.make_config(model, self.settings, self.target)

    def network(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        model = self.make_network()
        return model if dtype == torch.float32 else nn.Module.to(model, dtype)  # diffusers' own call warns

    def adapted(self, move: bool = False, dtype: torch.dtype = torch.float32) -> nn.Module:
        """A network with an adapter, which may have been moved as training would."""
        model = self.network(dtype)
        self.add(model, "default", 0, move)
        return model

    def add(self, model: nn.Module, adapter_name: str, seed: int, move: bool) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            trained = add_adapter(model, self.config(model), adapter_name)
            with torch.no_grad():
                for parameter in trained if move else ():
                    parameter.add_(MOVE * torch.randn_like(parameter))

    def output(self, model: nn.Module) -> torch.Tensor:
        """What a network computes, with gradients where the caller has them."""
        dtype = next(model.parameters()).dtype
        inputs = [x.to(dtype) if torch.is_tensor(x) and x.is_floating_point() else x for x in self.inputs]
        output = model(*inputs)
        return getattr(output, "sample", output)


def check_method(
    method: Method,
    make_network: Callable[[], nn.Module],
    inputs: Sequence[Any],
    settings: Mapping[str, Any] | None = None,
    target: Target = None,
) -> None:
    """Runs every check of CHECKS on a method; the arguments are the fields of `Case`.

    Raises:
        AssertionError: a promise is broken; the message names the method and the promise.
    """
    case = Case(method, make_network, inputs, settings or {}, target)
    for check in CHECKS.values():
        check(case)


def starts_as_the_base(case: Case) -> None:
    """Before the first step the output is that of the base, bit for bit, and there is a gradient to follow."""
    base, model = case.make_network(), case.adapted()
    y = case.output(model)
    _require(torch.equal(y, case.output(base)), case, "the output differs from the base's before any training")
    with torch.no_grad():
        _require(torch.equal(case.output(model), y), case, "the output differs where no gradients are taken")
    _require(y.requires_grad, case, "no parameter has a gradient at the start")
    y.square().sum().backward()
    grads = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    moving = any(grad is not None and bool(grad.any()) for grad in grads)
    _require(moving, case, "no parameter has a gradient at the start")


def trains_only_its_own(case: Case) -> None:
    """Only parameters of the adapter are trained, each of a known kind that has a rate if the method names rates."""
    base, model = case.make_network(), case.adapted()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    _require(bool(trained), case, "nothing is trained")
    for name in trained:
        _require("default" in name.split("."), case, f"{name} is trained, which is not the adapter's")
        kind, rates = case.method.kind(name), case.method.rates
        _require(kind in KINDS, case, f"{name} is of kind {kind!r}, which is none of {', '.join(KINDS)}")
        _require(not rates or kind in rates, case, f"{name} is of kind {kind!r}, which has no rate")
    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    case.output(model).square().mean().backward()
    optimizer.step()
    _same_base(case, base, model, "a step of the optimiser")


def trains_in_float32(case: Case) -> None:
    """On a base in bfloat16 the trained parameters are float32, and the start is the base's bit for bit."""
    base, model = case.network(torch.bfloat16), case.adapted(dtype=torch.bfloat16)
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
    _require(dtypes == {torch.float32}, case, f"trains {dtypes} on a base in bfloat16, not float32")
    y = case.output(model)
    _require(y.dtype == torch.bfloat16, case, f"the output is {y.dtype} on a base in bfloat16")
    _require(torch.equal(y, case.output(base)), case, "on a base in bfloat16 the start differs from the base")


@torch.no_grad()
def off_is_the_base(case: Case) -> None:
    """With its adapter off, the network is the base bit for bit; on again, it is what it was."""
    base, model = case.make_network(), case.adapted(move=True)
    on, trained = case.output(model), [parameter.requires_grad for parameter in model.parameters()]
    _require(not torch.equal(on, case.output(base)), case, "moved parameters change nothing")
    with adapters_off(model):
        _require(torch.equal(case.output(model), case.output(base)), case, "off, it differs from the base")
    _require(torch.equal(case.output(model), on), case, "off and on again, it differs from before")
    after = [parameter.requires_grad for parameter in model.parameters()]
    _require(after == trained, case, "off and on again, other parameters are trained")


@torch.no_grad()
def loads_what_it_saved(case: Case) -> None:
    """Config and state, written and read, give the same output in a new network, bit for bit."""
    model = case.adapted(move=True)
    state = {name: value.contiguous() for name, value in get_peft_model_state_dict(model).items()}
    state = safetensors.torch.load(safetensors.torch.save(state))
    with tempfile.TemporaryDirectory() as folder:
        model.peft_config["default"].save_pretrained(folder)
        config = PeftConfig.from_pretrained(folder)
    loaded = case.make_network()
    add_adapter(loaded, config, "loaded")
    problems = set_peft_model_state_dict(loaded, state, "loaded")
    _require(not problems.unexpected_keys, case, f"{problems.unexpected_keys[:3]} of the state are not loaded")
    _require(torch.equal(case.output(loaded), case.output(model)), case, "loaded, it computes something else")


@torch.no_grad()
def merges_and_unmerges(case: Case) -> None:
    """Merged, the output is the same but for rounding; unmerged, all is as before, bit for bit."""
    base, model = case.make_network(), case.adapted(move=True)
    y = case.output(model)
    originals = merge_adapters(model)
    error = float((case.output(model) - y).norm() / y.norm())
    _require(error <= MERGED_WITHIN, case, f"merged, the output is off by {error:.1e} of its norm")
    unmerge_adapters(model, originals)
    _same_base(case, base, model, "unmerging")
    _require(torch.equal(case.output(model), y), case, "unmerged, it computes something else than before")


@torch.no_grad()
def adds_up(case: Case) -> None:
    """The changes of several adapters with weights add up, if the method says so."""
    if not case.method.linear:
        return
    model = case.adapted(move=True)
    case.add(model, "second", 1, move=True)
    both = ("default", "second")
    single = [_change(model, [name], [1.0]) for name in both]
    got = _change(model, both, WEIGHTS)
    for name, change in got.items():
        expected = WEIGHTS[0] * single[0][name] + WEIGHTS[1] * single[1][name]
        error = float((change - expected).norm())
        bound = MERGED_WITHIN * float(expected.norm() + model.get_parameter(name).norm())
        _require(error <= bound, case, f"two adapters with weights do not add up in {name}: off by {error:.1e}")


@torch.no_grad()
def leaves_no_trace(case: Case) -> None:
    """An adapter that is deleted leaves the base's output and numbers, bit for bit; another one stays as it is."""
    base, model = case.make_network(), case.adapted(move=True)
    y = case.output(model)
    case.add(model, "second", 1, move=True)
    set_adapters(model, ["default"])
    delete_adapter(model, "second")
    _require(torch.equal(case.output(model), y), case, "deleting another adapter changes what it computes")
    delete_adapter(model, "default")
    _require(torch.equal(case.output(model), case.output(base)), case, "deleted, the output differs from the base's")
    _same_base(case, base, model, "deleting")


def counts_rightly(case: Case) -> None:
    """`Method.count` says how many numbers are trained, without touching the network or the random numbers."""
    model = case.make_network()
    config, before = case.config(model), torch.get_rng_state()
    count = case.method.count(model, copy.deepcopy(config))
    _require(torch.equal(torch.get_rng_state(), before), case, "count draws from the caller's random numbers")
    _require(not tuner_layers(model), case, "count puts an adapter into the network")
    trained = sum(parameter.numel() for parameter in add_adapter(model, config))
    _require(count == trained, case, f"count says {count}, {trained} are trained")


CHECKS: dict[str, Callable[[Case], None]] = {
    check.__name__: check
    for check in (
        starts_as_the_base,
        trains_only_its_own,
        trains_in_float32,
        off_is_the_base,
        loads_what_it_saved,
        merges_and_unmerges,
        adds_up,
        leaves_no_trace,
        counts_rightly,
    )
}


def _require(holds: bool, case: Case, message: str) -> None:
    if not holds:
        raise AssertionError(f"method {case.method.name}: {message}")


def _same_base(case: Case, base: nn.Module, model: nn.Module, what: str) -> None:
    """The base's own parameters in an adapted network are those of a new one, bit for bit."""
    found = {name.replace(".base_layer", ""): value for name, value in model.named_parameters()}
    for name, value in base.named_parameters():
        _require(torch.equal(found[name], value), case, f"{what} leaves {name} of the base changed")


def _change(model: nn.Module, adapters: Sequence[str], weights: Sequence[float]) -> dict[str, torch.Tensor]:
    """What merging these adapters with these weights adds to each parameter of the base."""
    set_adapters(model, adapters, weights)
    names = [name for name, _ in model.named_parameters() if ".base_layer." in name]
    before = {name: model.get_parameter(name).clone() for name in names}
    originals = merge_adapters(model)
    change = {name: model.get_parameter(name) - before[name] for name in names}
    unmerge_adapters(model, originals)
    return change

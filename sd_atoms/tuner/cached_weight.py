"""The effective weight of a small layer, cached between images."""

import copy
from typing import NamedTuple

import torch
from torch import nn

from sd_atoms.atoms import mixed_weight

# An effective weight of at most so many bytes is cached between images: in a small layer, making it anew takes longer
# than the convolution. In larger layers it costs little beside it, and caching it would cost memory.
CACHED_BYTES = 4 * 2**20
MADE_FROM = ("atoms_delta", "atoms_beta", "atoms_block_delta", "atoms_initial", "atoms_block_initial")
SAMPLES = 16  # so many entries of a base weight tell whether it was changed; each is a cache miss at every call


class CachedWeight(NamedTuple):
    """An effective weight, and what it was made from as it was then."""

    effective: torch.Tensor
    active: str | list[str]
    scaling: dict[str, float]
    state: tuple  # of the base weight, see _state
    sources: list[tuple[dict, str, torch.Tensor]]  # parameters by name, a name, its values
    sample: tuple[torch.Tensor, torch.Tensor]  # some entries of the base weight: a view and their values


def is_cached(weight: torch.Tensor) -> bool:
    """Whether the effective weight of a layer with this weight is cached."""
    return weight.nbytes <= CACHED_BYTES and weight.device.type == "cpu" and not torch.compiler.is_compiling()


@torch.no_grad()
def cache_weight(layer: nn.Module, active: list[str], weight: torch.Tensor) -> CachedWeight:
    """The effective weight of the active adapters of an `AtomsLayer`, with what it is made from."""
    parts = [layer._modules[part]._parameters for part in MADE_FROM]
    rows = weight[:: max(1, len(weight) // SAMPLES)]
    sample = rows[(slice(None),) + (0,) * (rows.dim() - 1)]
    return CachedWeight(
        mixed_weight(layer.base_weight, layer.terms(active), layer.groups),
        copy.copy(layer._active_adapter),
        dict(layer.scaling),
        _state(weight),
        [(part, name, part[name].clone()) for part in parts for name in active if name in part],
        (sample, sample.clone()),
    )


def is_valid(cached: CachedWeight, layer: nn.Module, weight: torch.Tensor) -> bool:
    """Whether a cached effective weight is that of the adapters as they are.

    Values are compared, since writing through `.data` leaves no other trace: all of the adapter's, a sample of the
    base weight's. Asked at every call, it takes a few microseconds.
    """
    if layer._disable_adapters or layer.merged_adapters or torch.compiler.is_compiling():
        return False
    if layer._active_adapter != cached.active or layer.scaling != cached.scaling or _state(weight) != cached.state:
        return False
    for part, name, value in cached.sources:
        if not torch.equal(part[name], value):
            return False
    return torch.equal(*cached.sample)


def _state(weight: torch.Tensor) -> tuple:
    """What changes when a weight is replaced, or written to other than through `.data`."""
    return weight.data_ptr(), None if weight.is_inference() else weight._version, weight.dtype

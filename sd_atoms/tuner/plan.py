"""Which atoms a layer gets."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from peft.utils.other import get_pattern_key
from torch import nn

from sd_atoms.atoms import block_of
from sd_atoms.tuner.config import AtomsConfig

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class LayerPlan(NamedTuple):
    """Atoms of one layer: m over the K taps (0: none), m1 of them mixed per channel (0: shared); block atoms, as many
    as `block_atoms` over blocks of `block` channels (None: none); the strength."""

    m: int = 0
    m1: int = 0
    block: tuple[int, int] | None = None
    block_atoms: int = 0
    scale: float = 1.0

    def shapes(self, layer: nn.Module, train_beta: bool = True) -> dict[str, tuple[int, ...]]:
        """What an adapter keeps for a layer: part, as in `AtomsLayer`, -> shape."""
        k, shapes = taps_of(layer), {}
        if self.m:
            shapes["atoms_delta"] = (self.m, self.m1, k) if self.m1 else (self.m, k)
            shapes["atoms_initial"] = (self.m, k)
        if self.m1 and train_beta:
            shapes["atoms_beta"] = (in_channels(layer), self.m, self.m1)
        if self.block:
            shapes["atoms_block_delta"] = shapes["atoms_block_initial"] = (self.block_atoms, math.prod(self.block) * k)
        return shapes

    def trainable_params(self, layer: nn.Module, train_beta: bool = True) -> int:
        """How many parameters the plan trains in a layer: m·K, or m·m1·(i + K), and m_c·kc⁴·K for blocks."""
        shapes = self.shapes(layer, train_beta)
        return sum(math.prod(shape) for part, shape in shapes.items() if not part.endswith("_initial"))


def taps_of(layer: nn.Module) -> int:
    """K of a convolution or Linear layer."""
    return math.prod(layer.weight.shape[2:])


def in_channels(layer: nn.Module) -> int:
    """Input channels of the whole layer, over all groups."""
    return layer.weight.shape[1] * getattr(layer, "groups", 1)


def layer_plan(config: AtomsConfig, name: str, layer: nn.Module) -> LayerPlan:
    """What `config` means for the layer of that name.

    Raises:
        ValueError: the layer cannot take it; the message says why, without the name.
    """
    if type(layer) not in (*CONVOLUTIONS, nn.Linear):
        raise ValueError(f"is a {type(layer).__name__}, atoms take Conv1d, Conv2d, Conv3d and Linear")
    k = taps_of(layer)
    blocks = config.kc > 0 and (k == 1 or config.block_layers == "all")
    spatial = not (blocks and k == 1) and (config.m > 0 or not blocks)
    m = matching(config.m_pattern, name, config.m) if spatial else 0
    if spatial and m == 0:
        raise ValueError('has no atoms with m=0: kc is for pointwise layers, unless block_layers="all"')
    if config.solver == "svd" and m > k:
        hint = "m_pattern, kc or solver='sparse' would fit" if k == 1 else "m_pattern or solver='sparse' would fit"
        raise ValueError(f"has filters of {k} taps, fewer than m={m}; {hint}")
    block, block_atoms = None, 0
    if blocks:
        block = block_of(config.kc, layer.weight, getattr(layer, "groups", 1))
        m_c = config.m_c or k
        if not spatial:
            m_c = matching(config.m_pattern, name, m_c)
        if config.solver == "svd" and m_c > k:
            raise ValueError(f"has filters of {k} taps, fewer than m_c={m_c}; m_pattern or solver='sparse' would fit")
        block_atoms = m_c * math.prod(block)
    scale = float(matching(config.scale_pattern, name, 1.0))
    return LayerPlan(m, config.m1 if m else 0, block, block_atoms, scale)


def matching(pattern: Mapping[str, Any], name: str, otherwise: Any = None) -> Any:
    """The value of the first key that the module's name is, ends with after a dot, or matches as an expression."""
    return pattern.get(get_pattern_key(pattern, name), otherwise)

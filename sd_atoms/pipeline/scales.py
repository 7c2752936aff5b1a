"""Strengths by block of the UNet, as `pipe.set_adapters(["castle"], [{"unet": {"down": 0.5}}])` gives them.

diffusers makes them out for layers of the attention alone: other layers keep 1, or end in an IndexError (conv_in).
Where an adapter is on other layers, they are made out here for all. What is said of a block holds for everything in
it, the entries of a list for its pairs of resnet and attention, and the last one for what follows these.
"""

from collections.abc import Mapping
from numbers import Real
from typing import Any

from diffusers.loaders import peft as loader
from torch import nn

from sd_atoms.errors import UserError
from sd_atoms.methods.adapters import tuner_layers

PARTS = {"down": "down_blocks", "mid": "mid_block", "up": "up_blocks"}
_of_diffusers = loader._SET_ADAPTER_SCALE_FN_MAPPING["UNet2DConditionModel"]


def take_block_scales() -> None:
    """Makes `set_adapters` of every UNet ask `scales_by_layer`."""
    loader._SET_ADAPTER_SCALE_FN_MAPPING["UNet2DConditionModel"] = scales_by_layer


def scales_by_layer(unet: nn.Module, weights: list[float | Mapping[str, Any]]) -> list[float | dict[str, float]]:
    """For each adapter its strength, or layer -> strength where it is given by block.

    Args:
        unet: with its adapters.
        weights: of each adapter a number, or down, mid and up -> a number, a list, or of down and up block_0, block_1,
            … -> a number or a list. What is left out has 1.

    Raises:
        UserError: there is no such block, or a list has another length than 1 or the block's resnets.
    """
    names = sorted(tuner_layers(unet), key=len, reverse=True)  # diffusers takes the first that a layer's name contains
    if all(".attentions." in name for name in names):
        return _of_diffusers(unet, weights)
    return [
        {name: _of_layer(name, _by_block(unet, weight)) for name in names} if isinstance(weight, Mapping) else weight
        for weight in weights
    ]


def _by_block(unet: nn.Module, weight: Mapping[str, Any]) -> dict[str, list[float]]:
    """down_blocks.0, mid_block, … -> a strength for each resnet, or one for all."""
    unknown = [key for key in weight if key not in PARTS]
    if unknown:
        raise UserError(f"strengths by block: {unknown[0]!r} is none of {', '.join(PARTS)}")
    found = {}
    for part, prefix in PARTS.items():
        given = weight.get(part, 1.0)
        if part == "mid":
            blocks, given = {"mid": unet.mid_block}, {"mid": given}
        else:
            blocks = {f"block_{number}": block for number, block in enumerate(getattr(unet, prefix))}
            given = given if isinstance(given, Mapping) else dict.fromkeys(blocks, given)
        unknown = [key for key in given if key not in blocks]
        if unknown:
            raise UserError(f"strengths by block: {part} has no {unknown[0]!r}, but {', '.join(blocks)}")
        for name, block in blocks.items():
            own = given.get(name, 1.0)
            own, resnets = list(own) if isinstance(own, (list, tuple)) else [own], len(block.resnets)
            if len(own) not in (1, resnets) or not all(isinstance(value, Real) for value in own):
                raise UserError(
                    f"strengths by block: {own} for {part} {name}: a number, or a list of {resnets}, is needed"
                )
            found[prefix if part == "mid" else f"{prefix}.{name.removeprefix('block_')}"] = own
    return found


def _of_layer(layer: str, by_block: Mapping[str, list[float]]) -> float:
    first, *rest = layer.split(".")
    block = by_block.get(first) or by_block.get(f"{first}.{rest[0]}" if rest else first, [1.0])
    where = rest if first == "mid_block" else rest[1:]
    place = int(where[1]) if len(where) > 1 and where[0] in ("resnets", "attentions") else -1
    return float(block[min(place, len(block) - 1)])

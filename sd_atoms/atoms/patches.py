"""Patches of a picture (im2col) and back, in any number of dimensions."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F


class ConvGeometry(NamedTuple):
    """Stride, zero padding and dilation in pixels, one entry per axis, and the number of groups."""

    stride: tuple[int, ...] = (1, 1)
    padding: tuple[int, ...] = (0, 0)
    dilation: tuple[int, ...] = (1, 1)
    groups: int = 1

    def output_size(self, size: Sequence[int], kernel: Sequence[int]) -> tuple[int, ...]:
        """Size of the output, such as (H', W'), for an input of that size."""
        return tuple(
            (length + 2 * pad - gap * (k - 1) - 1) // step + 1
            for length, pad, gap, k, step in zip(size, self.padding, self.dilation, kernel, self.stride, strict=True)
        )


def unfold(
    x: torch.Tensor, kernel: Sequence[int], geometry: ConvGeometry, size: Sequence[int], dtype: torch.dtype
) -> torch.Tensor:
    """(N, c, *S) -> patches (c, K, N·L), L output positions. In one copy of whole rows; `F.unfold` goes by pixel."""
    sides = [side for pad in reversed(geometry.padding) for side in (pad, pad)]
    padded = F.pad(x, sides)
    to_image, to_channel, *to_next = padded.stride()
    to_tap = [step * gap for step, gap in zip(to_next, geometry.dilation, strict=True)]
    to_position = [step * stride for step, stride in zip(to_next, geometry.stride, strict=True)]
    windows = padded.as_strided(
        (padded.shape[1], *kernel, padded.shape[0], *size), (to_channel, *to_tap, to_image, *to_position)
    )
    return x.new_empty(windows.shape, dtype=dtype).copy_(windows).flatten(1, len(kernel)).flatten(2)


def fold(
    patches: torch.Tensor, shape: Sequence[int], kernel: Sequence[int], geometry: ConvGeometry, size: Sequence[int]
) -> torch.Tensor:
    """The transpose of `unfold`: (c, K, N·L) -> (N, c, *S) of that shape, adding up where windows overlap."""
    batch, channels, *lengths = shape
    patches = patches.unflatten(2, (batch, *size))
    padded = patches.new_zeros(
        channels, batch, *(length + 2 * pad for length, pad in zip(lengths, geometry.padding, strict=True))
    )
    for tap, place in enumerate(itertools.product(*map(range, kernel))):
        window = (  # the part of the padded picture that a tap meets
            slice(at * gap, at * gap + step * (length - 1) + 1, step)
            for at, gap, step, length in zip(place, geometry.dilation, geometry.stride, size, strict=True)
        )
        padded[(..., *window)] += patches[:, tap]
    inner = tuple(slice(pad, pad + length) for length, pad in zip(lengths, geometry.padding, strict=True))
    return padded[(..., *inner)].transpose(0, 1)

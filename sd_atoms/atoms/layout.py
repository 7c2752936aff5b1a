"""Between a layer's weight and its filters as rows."""

import math

import torch


def taps(weight: torch.Tensor) -> int:
    """K, the number of spatial positions of a filter: k·k of a weight (o, i/groups, k, k), 1 of a Linear's (o, i)."""
    return math.prod(weight.shape[2:])


def filters_of(weight: torch.Tensor) -> torch.Tensor:
    """A weight (o, i/groups, *k) as filters (o, i/groups, K); a view of a contiguous or channels-last weight."""
    return weight.reshape(*weight.shape[:2], taps(weight))


def filter_rows(weight: torch.Tensor) -> torch.Tensor:
    """The filters of a weight (o, i/groups, *k) as rows (o·i/groups, K); a view where the weight is contiguous."""
    return weight.reshape(-1, taps(weight))


def block_rows(filters: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """Filters (o, i/groups, K) in blocks of a × b channels: rows (o/a, i/groups/b, a·b·K). A copy."""
    a, b = block
    rows = filters.unflatten(1, (-1, b)).unflatten(0, (-1, a))  # (o/a, a, i/b, b, K)
    return rows.transpose(1, 2).flatten(2)


def unblock_rows(rows: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """The inverse of `block_rows`: (o/a, i/groups/b, a·b·K) -> (o, i/groups, K)."""
    a, b = block
    return rows.unflatten(2, (a, b, -1)).transpose(1, 2).flatten(2, 3).flatten(0, 1)


def block_of(kc: int, weight: torch.Tensor, groups: int = 1) -> tuple[int, int]:
    """Output × input channels of a block: kc each, 1 on a side that kc does not divide (within a group)."""
    out_channels, in_channels = weight.shape[0] // groups, weight.shape[1]
    return (kc if out_channels % kc == 0 else 1), (kc if in_channels % kc == 0 else 1)


def mixing_dtype(dtype: torch.dtype) -> torch.dtype:
    """Atoms are mixed in float32 at least: in bf16 a small ΔF would drown in the rounding of F."""
    return torch.promote_types(dtype, torch.float32)

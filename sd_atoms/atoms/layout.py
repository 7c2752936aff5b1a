"""Between a convolution's weight and its filters as rows."""

import math

import torch


def taps(weight: torch.Tensor) -> int:
    """K, the number of spatial positions of a filter: k·k of a weight (o, i/groups, k, k), any number of axes."""
    return math.prod(weight.shape[2:])


def filter_rows(weight: torch.Tensor) -> torch.Tensor:
    """The filters of a weight (o, i/groups, *k) as rows (o·i/groups, K); a view where the weight is contiguous."""
    return weight.reshape(-1, taps(weight))


def mixing_dtype(dtype: torch.dtype) -> torch.dtype:
    """Atoms are mixed in float32 at least: in bf16 a small ΔF would drown in the rounding of F."""
    return torch.promote_types(dtype, torch.float32)


def mix_filters(weight: torch.Tensor, mixing: torch.Tensor) -> torch.Tensor:
    """The effective weight F·A.

    Args:
        weight: (o, i/groups, *k), any float dtype.
        mixing: A, (K, K), float32 or float64.

    Returns:
        A tensor like `weight`: the product is taken in `mixing_dtype` and rounded once.
    """
    dtype = mixing_dtype(weight.dtype)
    # (o*i, K) @ (K, K) -> (o*i, K)
    mixed = filter_rows(weight).to(dtype) @ mixing.to(dtype)
    return mixed.to(weight.dtype).view(weight.shape)

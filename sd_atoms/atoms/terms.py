"""The effective weight of an adapted layer as a sum of terms Q·M: frozen numbers Q times a small mixing matrix M.

Orthonormal atoms need no coefficients: F + F·Dᵀ·ΔD = F·A is one term, Q = F. Sparse coefficients C add a term C·ΔD
to F. Either may mix the K taps of a filter, the same way everywhere or per input channel (overcomplete atoms), or the
a·b·K entries of a block of channels (block atoms).
"""

import threading
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from sd_atoms.atoms.layout import block_rows, filters_of, mixing_dtype, taps, unblock_rows


class Term(NamedTuple):
    """One summand of an effective weight (o, i/g, *k) with K taps and g groups.

    codes: frozen coefficients (o, i/g, T), for blocks (o/a, i/g/b, T); None stands for the layer's own filters, T = K
        (a·b·K for blocks).
    mixing: (T, K); (i, T, K) for one matrix per input channel; (T, a·b·K) for blocks. float32 or float64. None, with
        codes None, stands for the filters as they are.
    block: (a, b), output × input channels of a block, or None.
    """

    codes: torch.Tensor | None = None
    mixing: torch.Tensor | None = None
    block: tuple[int, int] | None = None

    @property
    def per_channel(self) -> bool:
        return self.mixing is not None and self.mixing.dim() == 3


PLAIN = Term()


@torch.no_grad()
def mixed_weight(weight: torch.Tensor, terms: Sequence[Term], groups: int = 1) -> torch.Tensor:
    """Σ Q·M as a new tensor like `weight` (o, i/g, *k): taken in `mixing_dtype`, rounded once."""
    return torch.empty_like(weight).copy_(effective_weight(weight, terms, groups))


@torch.no_grad()
def effective_weight(
    weight: torch.Tensor, terms: Sequence[Term], groups: int, contiguous: bool = False
) -> torch.Tensor:
    """Σ Q·M with the shape and dtype of `weight`, to be used up at once; in any layout unless `contiguous`.

    That of blocks is a new tensor: they are turned and turned back by copies anyway. Any other lies, on the CPU, in a
    buffer that the next call in this thread writes over: a fresh one of this size would cost more than the product, in
    pages that the system has to hand out (28 of 38 ms for a 1280→1280 layer).

    There the taps are stored before the input channels, as in channels-last weights, since (K, T) @ (T, i) products
    are several times faster than (o·i, T) @ (T, K), whose sides are too short to fill the vector units.
    """
    if all(term.mixing is None for term in terms):
        return weight
    filters = filters_of(weight)
    dtype = mixing_dtype(weight.dtype)
    if len(terms) == 1 and terms[0].block:
        codes = filters if terms[0].codes is None else terms[0].codes
        return _mix_blocks(codes.to(dtype), terms[0]).to(weight.dtype).reshape(weight.shape)
    shape = filters.shape
    per_channel = any(term.per_channel for term in terms)
    # a depthwise filter has one input channel: then (o, T) @ (T, K) is the product with long sides
    taps_first = not per_channel and shape[1] > 1 and (weight.device.type == "cpu" or _taps_first(filters))
    if taps_first:
        total = _buffer(weight, (shape[0], shape[2], shape[1]), dtype).mT
    else:
        total = _buffer(weight, shape, dtype)
    for index, term in enumerate(terms):
        rows = (filters if term.codes is None else term.codes).to(dtype)
        keep = 0 if index == 0 else 1  # the buffer starts with another layer's numbers
        if term.block:
            change = _mix_blocks(rows, term)
            total.copy_(change) if index == 0 else total.add_(change)
        elif term.mixing is None:
            total.copy_(rows) if index == 0 else total.add_(rows)
        elif term.per_channel:
            for mixing, part, out in _channels(term.mixing.to(dtype), rows, total, groups):
                out.baddbmm_(part, mixing, beta=keep)  # (c, o/g, T) @ (c, T, K) -> (c, o/g, K)
        elif taps_first:
            # (K, T) @ (o, T, i/g) -> (o, K, i/g)
            total.mT.baddbmm_(term.mixing.T.to(dtype).expand(shape[0], -1, -1), rows.mT, beta=keep)
        else:
            # (o*i/g, T) @ (T, K) -> (o*i/g, K)
            total.view(-1, shape[2]).addmm_(rows.reshape(-1, rows.shape[2]), term.mixing.to(dtype), beta=keep)
    effective = total.to(weight.dtype).reshape(weight.shape)
    if contiguous and not effective.is_contiguous():
        return _buffer(weight, weight.shape, weight.dtype, "contiguous").copy_(effective)
    return effective


def mixing_gradient(
    weight: torch.Tensor, term: Term, grad_weight: torch.Tensor, groups: int, dtype: torch.dtype
) -> torch.Tensor:
    """The gradient of a term's mixing matrix, Qᵀ·(gradient of the weight), in that shape and dtype."""
    rows = (filters_of(weight) if term.codes is None else term.codes).to(dtype)
    grad = filters_of(grad_weight).to(dtype)
    if term.block:
        rows = block_rows(rows, term.block) if term.codes is None else rows
        grad = block_rows(grad, term.block)
        return rows.flatten(0, 1).T @ grad.flatten(0, 1)  # (T, N) @ (N, a*b*K) -> (T, a*b*K)
    if term.per_channel:
        gradient = torch.empty(term.mixing.shape, dtype=dtype, device=grad.device)
        for out, part, side in _channels(gradient, rows, grad, groups):
            torch.bmm(part.mT, side, out=out)  # (c, T, o/g) @ (c, o/g, K) -> (c, T, K)
        return gradient
    if rows.shape[1] == 1:  # depthwise
        return rows.flatten(0, 1).T @ grad.flatten(0, 1)  # (T, o) @ (o, K) -> (T, K)
    return torch.bmm(rows.mT, grad).sum(0)  # (o, T, i/g) @ (o, i/g, K) -> (o, T, K)


def _mix_blocks(rows: torch.Tensor, term: Term) -> torch.Tensor:
    rows = block_rows(rows, term.block) if term.codes is None else rows
    return unblock_rows(rows @ term.mixing.to(rows.dtype), term.block)  # (…, T) @ (T, a*b*K) -> (…, a*b*K)


def _channels(mixing, rows, grad, groups) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Batches over input channels: mixing (c, T, K), rows (c, o/g, T) and weight-like (c, o/g, K), all views."""
    if rows.shape[1] == 1:  # depthwise: the groups are the channels
        yield mixing, rows.view(groups, -1, rows.shape[2]), grad.view(groups, -1, grad.shape[2])
        return
    outputs, inputs = rows.shape[0] // groups, rows.shape[1]
    for group in range(groups):
        channels = slice(group * inputs, (group + 1) * inputs)
        filters = slice(group * outputs, (group + 1) * outputs)
        yield mixing[channels], rows[filters].transpose(0, 1), grad[filters].transpose(0, 1)


def _taps_first(filters: torch.Tensor) -> bool:
    """Whether filters (o, i/g, K) come from a channels-last weight."""
    return not filters.is_contiguous() and filters.mT.is_contiguous()


_buffers = threading.local()


def _buffer(weight: torch.Tensor, shape: Sequence[int], dtype: torch.dtype, name: str = "mixed") -> torch.Tensor:
    """An uninitialised tensor; on the CPU part of one that this thread keeps for the purpose, under that name."""
    if weight.device.type != "cpu" or torch.compiler.is_compiling():
        return torch.empty(shape, dtype=dtype, device=weight.device)
    size = weight.shape[0] * weight.shape[1] * taps(weight)
    kept = getattr(_buffers, name, None)
    if kept is None or kept.dtype != dtype or kept.numel() < size:
        with torch.inference_mode(False):  # one made in inference mode could not be written to outside of it
            kept = torch.empty(size, dtype=dtype)
        setattr(_buffers, name, kept)
    return kept[:size].view(shape)

"""Overcomplete atoms: every input channel c has atoms of its own, D[m] of c = Σ_j β[c, m, j]·D1[m, j]."""

import math

import torch


def initial_beta(in_channels: int, m: int, m1: int, seed: int) -> torch.Tensor:
    """β at the start, (in_channels, m, m1), float32: normal with variance 1/m1, from the seed alone.

    The change of D1 starts at zero, so the network starts as the base; β is random, so that change has a gradient.
    With this variance Σ_j β·ΔD1 is as large as one ΔD1, whatever m1.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(in_channels, m, m1, generator=generator) / math.sqrt(m1)


def channel_change(beta: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """Change of the atoms of every input channel, Σ_j β[c, m, j]·ΔD1[m, j]: (i, m, m1), (m, m1, T) -> (i, m, T)."""
    # one product per atom: (m, i, m1) @ (m, m1, T) -> (m, i, T)
    return torch.bmm(beta.transpose(0, 1), delta).transpose(0, 1)

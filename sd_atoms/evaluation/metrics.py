"""Metrics as pure functions of unit feature vectors (N, d)."""

import torch


def mean_cosine(features: torch.Tensor, others: torch.Tensor) -> float:
    """Mean cosine over all pairs (n of N, m of M): CLIP-I of pictures (N, d) and photos (M, d)."""
    return (features @ others.T).mean().item()


def paired_cosine(features: torch.Tensor, others: torch.Tensor) -> float:
    """Mean cosine of row n with row n: CLIP-T of pictures (N, d) and their prompts (N, d)."""
    return (features * others).sum(1).mean().item()


def match_share(features: torch.Tensor, others: torch.Tensor) -> float:
    """Share of pictures (N, d) whose best of all prompts (N, d) is their own; 1/N by chance."""
    own = torch.arange(len(features), device=features.device)
    return (features @ others.T).argmax(1).eq(own).float().mean().item()


def diversity(features: torch.Tensor) -> float:
    """Mean 1 − cosine over all pairs of different pictures (N, d), N of 2 or more: 0 when all are alike."""
    n = len(features)
    return ((1 - features @ features.T).sum() / (n * (n - 1))).item()


def drift(features: torch.Tensor, others: torch.Tensor) -> float:
    """Mean (1 − cosine) / 2 of row n with row n: how far pictures with an adapter (N, d) lie from the base's (N, d) on
    the same prompts and seeds. 0: no picture changed; 1: every one became its opposite.
    """
    return (features - others).square().sum(1).mean().item() / 4  # of unit vectors |a − b|² = 2 − 2·cosine

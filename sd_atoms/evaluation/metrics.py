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
    return weighted_diversity(features, torch.ones(len(features), 1)).item()


def drift(features: torch.Tensor, others: torch.Tensor) -> float:
    """Mean (1 − cosine) / 2 of row n with row n: how far pictures with an adapter (N, d) lie from the base's (N, d) on
    the same prompts and seeds. 0: no picture changed; 1: every one became its opposite.
    """
    return (features - others).square().sum(1).mean().item() / 4  # of unit vectors |a − b|² = 2 − 2·cosine


def weighted_diversity(features: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """`diversity` of draws with replacement (B,), in which images (N, d) come so often (N, B); pairs of an image with
    itself do not count, however often it was drawn.
    """
    x, w = features.double(), counts.double()
    pairs = w.sum(0) ** 2 - w.square().sum(0)
    # Σ_ij w_i w_j x_i·x_j is the square of a sum; of unit vectors x_i·x_i is 1
    alike = (x.T @ w).square().sum(0) - (w.square() * x.square().sum(1, keepdim=True)).sum(0)
    return 1 - alike / pairs


def vendi(features: torch.Tensor) -> float:
    """Vendi score of unit vectors (N, d): how many different images there are, from 1 to N (arXiv 2210.02410).

    The exponential of the entropy of the eigenvalues of K / N, where K holds the cosines; the eigenvalues other than 0
    are those of XᵀX / N too, which is the smaller one for N > d.
    """
    x = features.double()
    gram = x.T @ x if len(x) > x.shape[1] else x @ x.T
    eigenvalues = torch.linalg.eigvalsh(gram / len(x)).clamp(min=0)
    kept = eigenvalues[eigenvalues > 0]
    return torch.exp(-(kept * kept.log()).sum()).item()


def nearest(features: torch.Tensor, others: torch.Tensor, chunk: int = 2048) -> torch.Tensor:
    """(N,): the largest cosine of each image (N, d) to one of others (M, d)."""
    return torch.cat([(part @ others.T).max(1).values for part in features.split(chunk)])


def nearest_other(features: torch.Tensor, chunk: int = 2048) -> torch.Tensor:
    """(N,): the largest cosine of each image (N, d), N of 2 or more, to another one of its own set."""
    found = []
    for start in range(0, len(features), chunk):
        cosines = features[start : start + chunk] @ features.T
        cosines.diagonal(start).fill_(-torch.inf)  # of an image to itself
        found.append(cosines.max(1).values)
    return torch.cat(found)

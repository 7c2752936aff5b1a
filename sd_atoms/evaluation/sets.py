"""Metrics between two sets of features, real (N, d) and generated (M, d), each a pure function in float64.

KID is torchmetrics', fed features that were made once; FID and MIFID are not, since its eigenvalues of a product that
has no full rank, as of fewer images than features, are off by per cents. Precision and recall (arXiv 1904.06991),
density and coverage (arXiv 2002.09797), CMMD (arXiv 2401.09603), FD without the bias of few images (arXiv 1911.07023).
"""

import warnings
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torchmetrics.image.kid import KernelInceptionDistance

KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
MIFID_REACH = 0.1  # cosine distance from which on nothing counts as a copy
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0  # of the paper, for unit vectors of CLIP
CHUNK = 2048  # rows of a distance or kernel matrix at once
INFINITY_SIZES = 10  # set sizes that the line through FD over 1/n is fitted to


class Neighbours(NamedTuple):
    """Shares by image: precise and dense of each generated image, recalled and covered of each real one."""

    precise: torch.Tensor  # (M,) 1 where a generated image lies among the real ones
    dense: torch.Tensor  # (M,) of how many real images it is a neighbour, over k
    recalled: torch.Tensor  # (N,) 1 where a real image lies among the generated ones
    covered: torch.Tensor  # (N,) 1 where a real image has a generated neighbour


class _Given(nn.Module):
    """In the place of a network: what torchmetrics calls images are features already."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


def fid(real: torch.Tensor, generated: torch.Tensor) -> float:
    """Fréchet distance of the two normal distributions, at least 0; raises ValueError for fewer than 2 images."""
    _enough(real, generated)
    return Frechet(real).distance(generated)


def mifid(real: torch.Tensor, generated: torch.Tensor) -> float:
    """FID over the mean cosine distance, if below MIFID_REACH, of each generated image to the nearest real one
    (arXiv 2106.03062): copies are punished. Raises as `fid`.
    """
    x, y = F.normalize(generated.double(), dim=1), F.normalize(real.double(), dim=1)
    nearest = torch.cat([(part @ y.T).abs().max(1).values for part in x.split(CHUNK)])
    apart = (1 - nearest).clamp(min=torch.finfo(torch.float32).eps).mean().item()
    return fid(real, generated) / (apart if apart < MIFID_REACH else 1.0)


def kid(real: torch.Tensor, generated: torch.Tensor, seed: int = 0) -> tuple[float, float]:
    """Mean and deviation of the unbiased squared MMD under (x·y/d + 1)³, over KID_SUBSETS random subsets.

    Subsets have KID_SUBSET_SIZE images, or as many as the smaller set has. Raises as `fid`.
    """
    _enough(real, generated)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about its memory
        torch.manual_seed(seed)
        size = min(KID_SUBSET_SIZE, len(real), len(generated))
        metric = KernelInceptionDistance(
            _Given(real.shape[1]), subsets=KID_SUBSETS, subset_size=size, sync_on_compute=False
        )
        metric.update(real.double(), real=True)
        metric.update(generated.double(), real=False)
        mean, deviation = metric.compute()
    return mean.item(), deviation.item()


def kid_of_draws(
    real: torch.Tensor, generated: torch.Tensor, weights: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    """KID of all images at once, (B,): of each of B draws in which they count so often, (N, B) and (M, B).

    Pairs of an image with itself do not count, however often it was drawn.
    """
    _enough(real, generated)
    x, y, v, w = real.double(), generated.double(), weights[0].double(), weights[1].double()
    n, m, v_same, w_same = v.sum(0), w.sum(0), v.square(), w.square()
    xx, yy, xy = (_kernel_sums(_cubic, *own) for own in ((x, x, v, v), (y, y, w, w), (x, y, v, w)))
    xx = xx - ((x.square().sum(1) / x.shape[1] + 1) ** 3) @ v_same
    yy = yy - ((y.square().sum(1) / y.shape[1] + 1) ** 3) @ w_same
    return xx / (n**2 - v_same.sum(0)) + yy / (m**2 - w_same.sum(0)) - 2 * xy / (n * m)


def cmmd(
    real: torch.Tensor, generated: torch.Tensor, weights: tuple[torch.Tensor, torch.Tensor] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared MMD under exp(−|x − y|² / 2σ²) times CMMD_SCALE, biased as published and unbiased.

    Args:
        real, generated: unit vectors (N, d) and (M, d).
        weights: how often each image counts in each of B draws, (N, B) and (M, B); None is once in one draw. Pairs of
            an image with itself do not count in the unbiased one, however often it was drawn.

    Returns:
        Two tensors (B,).
    """
    _enough(real, generated)
    x, y = real.double(), generated.double()
    own = (torch.ones(len(x), 1), torch.ones(len(y), 1)) if weights is None else weights
    v, w = own[0].double(), own[1].double()
    n, m, n_same, m_same = v.sum(0), w.sum(0), v.square().sum(0), w.square().sum(0)
    xx, yy, xy = (_kernel_sums(_rbf, *own) for own in ((x, x, v, v), (y, y, w, w), (x, y, v, w)))
    biased = xx / n**2 + yy / m**2 - 2 * xy / (n * m)
    # the kernel of an image with itself is 1
    unbiased = (xx - n_same) / (n**2 - n_same) + (yy - m_same) / (m**2 - m_same) - 2 * xy / (n * m)
    return CMMD_SCALE * biased, CMMD_SCALE * unbiased


def reaches(x: torch.Tensor, k: int) -> torch.Tensor:
    """(N,): distance of each image (N, d) to the k-th nearest other one."""
    return torch.cat([torch.cdist(part, x).kthvalue(k + 1, dim=1).values for part in x.split(CHUNK)])


def neighbours(real: torch.Tensor, generated: torch.Tensor, k: int = 5) -> Neighbours:
    """Who lies within the distance of whose k-th nearest neighbour of its own set.

    Raises:
        ValueError: a set has no more than k images.
    """
    if min(len(real), len(generated)) <= k:
        raise ValueError(f"more than {k} images are needed in each set, there are {len(real)} and {len(generated)}")
    x, y = real.double(), generated.double()
    reach, reach_generated = reaches(x, k), reaches(y, k)
    precise, dense = torch.zeros(len(y), dtype=torch.float64), torch.zeros(len(y), dtype=torch.float64)
    recalled, covered = torch.zeros(len(x), dtype=torch.float64), torch.zeros(len(x), dtype=torch.float64)
    for start in range(0, len(x), CHUNK):
        part = slice(start, start + CHUNK)
        apart = torch.cdist(x[part], y)  # (n, M)
        inside = apart < reach[part, None]
        dense += inside.sum(0) / k
        precise = torch.maximum(precise, inside.any(0).double())
        recalled[part] = (apart < reach_generated).any(1).double()
        covered[part] = inside.any(1).double()
    return Neighbours(precise, dense, recalled, covered)


class Frechet:
    """`fid` against one real set many times.

    With S = AᵀA and T = BᵀB the trace of (S·T)^½ is the sum of the singular values of A·Bᵀ, where A and B are the
    centred features over √(n − 1), or their triangular factors where there are more images than features.
    """

    def __init__(self, real: torch.Tensor) -> None:
        self.mean, self.factor = _factor(real)

    def distance(self, generated: torch.Tensor) -> float:
        """At least 0; `generated` is (M, d), M of 2 or more."""
        mean, factor = _factor(generated)
        traces = factor.square().sum() + self.factor.square().sum()
        cross = torch.linalg.svdvals(factor @ self.factor.T).sum()
        return max(0.0, ((mean - self.mean).square().sum() + traces - 2 * cross).item())


def fd_infinity(real: torch.Tensor, generated: torch.Tensor, seed: int = 0) -> float:
    """The Fréchet distance at infinitely many generated images: FD over 1/n is nearly a line, read off at 0.

    Raises:
        ValueError: fewer than 20 generated images.
    """
    if len(generated) < 20:
        raise ValueError(f"20 images are needed for a line, there are {len(generated)}")
    sizes = torch.linspace(len(generated) / 2, len(generated), INFINITY_SIZES).long().tolist()
    generator, against, found = torch.Generator().manual_seed(seed), Frechet(real), []
    for size in sizes:
        chosen = torch.randperm(len(generated), generator=generator)[:size]
        found.append(against.distance(generated[chosen]))
    inverse = torch.tensor([[1 / size, 1.0] for size in sizes], dtype=torch.float64)
    line = torch.linalg.lstsq(inverse, torch.tensor(found, dtype=torch.float64)[:, None]).solution
    return line[1].item()


def _factor(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean (d,) and A with AᵀA = the covariance."""
    x = features.double()
    mean = x.mean(0)
    centred = (x - mean) / (len(x) - 1) ** 0.5
    return mean, torch.linalg.qr(centred, mode="r").R if len(x) > x.shape[1] else centred


def _enough(real: torch.Tensor, generated: torch.Tensor) -> None:
    if min(len(real), len(generated)) < 2:
        raise ValueError(f"2 images are needed in each set, there are {len(real)} and {len(generated)}")


def _rbf(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.exp(-torch.cdist(x, y).square() / (2 * CMMD_SIGMA**2))


def _cubic(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _kernel_sums(kernel, x: torch.Tensor, y: torch.Tensor, v: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Σ v_i k(x_i, y_j) w_j of each draw, (B,)."""
    total = torch.zeros(v.shape[1], dtype=torch.float64)
    for start in range(0, len(x), CHUNK):
        part = slice(start, start + CHUNK)
        total += (v[part] * (kernel(x[part], y) @ w)).sum(0)  # (n, M) @ (M, B) -> (n, B)
    return total

"""Intervals of 95 %: how far a figure would move with other images of the same kind; percentiles of a bootstrap, of
shares Wilson's."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import NormalDist

import torch

SHARE = 0.95
DRAWN_AT_ONCE = 2**22  # images of several draws: 64 MB


@dataclass(frozen=True)
class Figure:
    """A figure of n images with its interval; `low` and `high` are None where there is none."""

    value: float
    n: int
    low: float | None = None
    high: float | None = None

    def entries(self) -> dict[str, float | int | None]:
        """The same for JSON."""
        return asdict(self)


def mean_figure(values: torch.Tensor, draws: int, seed: int) -> Figure:
    """The mean of a value per image (N,), and its interval."""
    values, n = values.double(), len(values)
    generator = torch.Generator().manual_seed(seed)
    found = []
    for some in torch.arange(draws if n > 1 else 0).split(max(1, DRAWN_AT_ONCE // max(1, n))):
        found.append(values[torch.randint(n, (len(some), n), generator=generator)].mean(1))
    return figure(values.mean().item(), n, torch.cat(found) if found else values.new_zeros(0))


def share_figure(right: torch.Tensor) -> Figure:
    """The share of images of which something holds, (N,) bool, and Wilson's interval: within 0 and 1, and of some
    width at either end, where all draws of a bootstrap are alike.
    """
    n, z = len(right), NormalDist().inv_cdf((1 + SHARE) / 2)
    share = right.double().mean().item()
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return Figure(share, n, max(0.0, centre - half), min(1.0, centre + half))


def drawn_figure(function: Callable[[torch.Tensor], float], n: int, draws: int, seed: int) -> Figure:
    """A figure that is a function of which images there are, given as numbers (N,) of images."""
    generator = torch.Generator().manual_seed(seed)
    found = [function(torch.randint(n, (n,), generator=generator)) for _ in range(draws if n > 1 else 0)]
    return figure(function(torch.arange(n)), n, torch.tensor(found, dtype=torch.float64))


def counts(n: int, draws: int, seed: int) -> torch.Tensor:
    """(n, draws), float64: how often each of n images comes in each draw of n with replacement."""
    if n < 2:
        return torch.zeros(n, 0, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(n, (draws, n), generator=generator)
    found = torch.zeros(draws, n, dtype=torch.float64)
    return found.scatter_add_(1, numbers, torch.ones(draws, n, dtype=torch.float64)).T.contiguous()


def figure(value: float, n: int, drawn: torch.Tensor) -> Figure:
    """A value with the interval of its draws (B,), moved so that their mean is the value: a draw holds images twice,
    which raises some figures (FID) and lowers others (Vendi) as a whole.
    """
    drawn = drawn[drawn.isfinite()]
    if len(drawn) < 2:
        return Figure(value, n)
    drawn = drawn - drawn.mean() + value
    tail = (1 - SHARE) / 2
    low, high = torch.quantile(drawn, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Figure(value, n, low, high)

"""How far an adapter moves a layer: measures of a base weight F (o, i/groups, *k) and its change ΔF."""

import math

import torch

from sd_atoms.atoms.layout import filter_rows


def energy(weight: torch.Tensor) -> float:
    """|F|² = Σ F², summed up in float64."""
    return torch.linalg.vector_norm(weight, dtype=torch.float64).item() ** 2


def relative_change(weight: torch.Tensor, change: torch.Tensor) -> float:
    """|ΔF| / |F|, Frobenius norms; 0 without any change, infinite where F is zero and ΔF is not."""
    return root_ratio(energy(change), energy(weight), 0.0)


def frequency_gain(weight: torch.Tensor, change: torch.Tensor, omega: float) -> float:
    """What happens to a spatial frequency: √(Σ |DFT(F + ΔF)|² / Σ |DFT(F)|²), sums over all filters.

    DFT(f) = Σ_t f[t]·exp(−i·ω·(t₁ + t₂ + …)) at the tap t of a filter.

    Args:
        weight, change: (o, i/groups, *k) with K > 1 taps.
        omega: radians per tap, the same along every axis; 0 is the filter's sum, π what a checkerboard meets.

    Returns:
        1 where both are zero there, infinite where only the base's response is.
    """
    axes = torch.meshgrid(*(torch.arange(size) for size in weight.shape[2:]), indexing="ij")
    phases = omega * sum(axes).flatten().double()
    waves = torch.stack([phases.cos(), phases.sin()], dim=1).to(weight)  # (K, 2)
    base = filter_rows(weight) @ waves  # (o*i/groups, K) @ (K, 2)
    return root_ratio(energy(base + filter_rows(change) @ waves), energy(base), 1.0)


def condition(mixing: torch.Tensor) -> float:
    """Largest over smallest singular value of A = I + M, for M = Dᵀ·ΔD (K, K).

    1 is a rotation or a plain rescaling of the filters; infinite when A is singular, so that some of their detail
    is lost.
    """
    identity = torch.eye(len(mixing), dtype=torch.float64, device=mixing.device)
    return torch.linalg.cond(identity + mixing.double()).item()


def atom_changes(delta: torch.Tensor) -> torch.Tensor:
    """|ΔD_m| of every atom, over all that it has: (m, …) -> (m,)."""
    return torch.linalg.vector_norm(delta.flatten(1), dim=1)


def root_ratio(part: float, whole: float, if_both_zero: float) -> float:
    """√(part / whole) of two energies."""
    if whole == 0:
        return if_both_zero if part == 0 else math.inf
    return math.sqrt(part / whole)

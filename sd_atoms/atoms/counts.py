"""How many numbers a setting trains."""

from collections.abc import Iterable


def atom_count(m: int, taps_of_layers: Iterable[int]) -> int:
    """Σ m·K over the layers: the entries of every ΔD (m, K). 4,212 for m = 9 on the 52 3×3 convs of SD v1-4."""
    return sum(m * k for k in taps_of_layers)

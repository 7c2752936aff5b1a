"""Figures of benchmarks as text."""


def ratio_text(ratio: float | None) -> str:
    """1.25 as "1.25×"; a dash where there is nothing to compare with."""
    return "–" if ratio is None else f"{ratio:.2f}×"

"""Measures the sparse solver on one layer beside coordinate descent."""

from dataclasses import dataclass

from sd_atoms.bench.sparse import bench_sparse, sparse_text
from sd_atoms.commands.bench.common import WHAT, Timing, started, tell
from sd_atoms.settings import section, setting


@dataclass(frozen=True)
class Settings:
    """Settings of `sd-atoms bench sparse`."""

    channels: int = setting(1280, WHAT, "in and out", low=1)
    m: int = setting(9, WHAT, "atoms", low=1)
    l1: float = setting(1e-3, WHAT, "weight of the L1 penalty", low=0.0)
    timing: Timing = section(Timing)


def run(settings: Settings) -> None:
    """Measures; raises UserError for a value that cannot be used."""
    threads = started(settings.timing.common)
    result = bench_sparse(settings.channels, settings.m, settings.l1, settings.timing.rounds, threads)
    tell(sparse_text(result), result, settings.timing.common)

"""Measures the factorisation of every convolution of a UNet into coefficients and atoms."""

from dataclasses import dataclass

from sd_atoms.bench.decompose import bench_decompose, decompose_text
from sd_atoms.commands.bench.common import Architecture, Timing, started, tell
from sd_atoms.settings import section


@dataclass(frozen=True)
class Settings:
    """Settings of `sd-atoms bench decompose`."""

    architecture: Architecture = section(Architecture)
    timing: Timing = section(Timing)


def run(settings: Settings) -> None:
    """Measures; raises UserError for a value that cannot be used."""
    threads = started(settings.timing.common)
    result = bench_decompose(settings.architecture.arch, settings.timing.rounds, threads)
    tell(decompose_text(result), result, settings.timing.common)

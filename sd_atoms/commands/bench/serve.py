"""Measures denoising steps with adapters, merged and unmerged, and the hot-swap of a file."""

from dataclasses import asdict, dataclass

from sd_atoms.bench.serve import bench_serve, serve_text
from sd_atoms.commands.bench.common import HOW, WHAT, Architecture, Device, Timing, started, tell
from sd_atoms.settings import section, setting


@dataclass(frozen=True)
class Settings:
    """Settings of `sd-atoms bench serve`."""

    architecture: Architecture = section(Architecture)
    resolution: int | None = setting(None, WHAT, "pixels; none = the architecture's own", low=1)
    steps: int = setting(2, HOW, "denoising steps per round", low=1)
    device: Device = section(Device)
    timing: Timing = section(Timing)


def run(settings: Settings) -> None:
    """Measures; raises UserError for a value that cannot be used."""
    threads = started(settings.timing.common)
    arch, rounds = settings.architecture.arch, settings.timing.rounds
    result = bench_serve(arch, settings.resolution, rounds, settings.steps, threads, **asdict(settings.device))
    tell(serve_text(result), result, settings.timing.common)

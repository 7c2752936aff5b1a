"""Measures the forms that an adapted convolution can take, by the shape of the layer."""

from dataclasses import asdict, dataclass

from sd_atoms.bench.forms import bench_forms, forms_text
from sd_atoms.commands.bench.common import Architecture, Device, Timing, Workload, started, tell
from sd_atoms.settings import section


@dataclass(frozen=True)
class Settings:
    """Settings of `sd-atoms bench forms`."""

    architecture: Architecture = section(Architecture)
    workload: Workload = section(Workload)
    device: Device = section(Device)
    timing: Timing = section(Timing)


def run(settings: Settings) -> None:
    """Measures; raises UserError for a value that cannot be used."""
    threads = started(settings.timing.common)
    result = bench_forms(
        arch=settings.architecture.arch,
        resolution_px=settings.workload.resolution,
        batch_size=settings.workload.batch_size,
        rounds=settings.timing.rounds,
        threads=threads,
        **asdict(settings.device),
    )
    tell(forms_text(result), result, settings.timing.common)

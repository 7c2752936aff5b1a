"""Measures a training step of methods beside a frozen network: time, peak memory, trained numbers."""

from dataclasses import asdict, dataclass

from sd_atoms.bench.classifiers import CLASSIFIERS
from sd_atoms.bench.methods import parse_methods
from sd_atoms.bench.step import bench_step, step_text
from sd_atoms.commands.bench.common import HOW, WHAT, Device, Timing, Workload, started, tell
from sd_atoms.settings import section, setting


@dataclass(frozen=True)
class Settings:
    """Settings of `sd-atoms bench step`."""

    arch: str = setting(
        "sd-v1-4",
        WHAT,
        "the UNet, or the image classifier: methods on the layers of `classify train`, without its head",
        choices=("sd-v1-4", "pocket", *CLASSIFIERS),
    )
    workload: Workload = section(Workload)
    methods: str = setting(
        "floor,atoms,lora,locon:rank=16,loha,lokr,naive",
        WHAT,
        "comma-separated: floor, naive and every method that trains a UNet, with settings as in atoms:m1=4",
    )
    steps: int = setting(2, HOW, "steps per run, after one warm-up", low=1)
    device: Device = section(Device)
    timing: Timing = section(Timing)


def run(settings: Settings) -> None:
    """Measures; raises UserError for a value that cannot be used."""
    threads = started(settings.timing.common)
    result = bench_step(
        arch=settings.arch,
        methods=parse_methods(settings.methods),
        resolution_px=settings.workload.resolution,
        batch_size=settings.workload.batch_size,
        steps=settings.steps,
        rounds=settings.timing.rounds,
        threads=threads,
        **asdict(settings.device),
    )
    tell(step_text(result), result, settings.timing.common)

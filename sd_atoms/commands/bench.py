"""Measures speed and memory on this machine."""

from dataclasses import asdict, dataclass

from sd_atoms.bench.classifiers import CLASSIFIERS
from sd_atoms.bench.data import bench_data, data_text
from sd_atoms.bench.decompose import bench_decompose, decompose_text
from sd_atoms.bench.forms import bench_forms, forms_text
from sd_atoms.bench.methods import parse_methods
from sd_atoms.bench.serve import bench_serve, serve_text
from sd_atoms.bench.sparse import bench_sparse, sparse_text
from sd_atoms.bench.step import bench_step, step_text
from sd_atoms.errors import UserError
from sd_atoms.files import check_outputs, write_json
from sd_atoms.machine import usable_cores
from sd_atoms.settings import section, setting

WHAT, HOW = "what is measured", "how"


@dataclass(frozen=True)
class Common:
    """What all benchmarks have."""

    rounds: int = setting(3, HOW, "how often all is measured", low=1)
    threads: int | None = setting(None, HOW, "CPU threads; none = all cores", low=1)
    json: str | None = setting(None, HOW, "also write the numbers to this file")
    overwrite: bool = setting(False, HOW, "replace that file where it exists")


@dataclass(frozen=True)
class Device:
    """Where it runs."""

    device: str = setting("cpu", HOW, "where it runs", choices=("cpu", "cuda"))
    dtype: str = setting("fp32", HOW, "of the weights", choices=("fp32", "bf16", "fp16"))


@dataclass(frozen=True)
class Architecture:
    """The UNet that is measured."""

    arch: str = setting("sd-v1-4", WHAT, "the UNet", choices=("sd-v1-4", "pocket"))


@dataclass(frozen=True)
class StepArchitecture:
    """The UNet or classifier that is measured."""

    arch: str = setting(
        "sd-v1-4",
        WHAT,
        "the UNet, or the image classifier: methods on the layers of `classify train`, without its head",
        choices=("sd-v1-4", "pocket", *CLASSIFIERS),
    )


@dataclass(frozen=True)
class Workload:
    """What goes through it."""

    resolution: int = setting(256, WHAT, "pixels", low=1)
    batch_size: int = setting(1, WHAT, "pictures at once", low=1)


@dataclass(frozen=True)
class Step:
    """Settings of `sd-atoms bench step`."""

    architecture: StepArchitecture = section(StepArchitecture)
    workload: Workload = section(Workload)
    methods: str = setting(
        "floor,atoms,lora,locon:rank=16,loha,lokr,naive",
        WHAT,
        "comma-separated: floor, naive and every method that trains a UNet, with settings as in atoms:m1=4",
    )
    steps: int = setting(2, HOW, "steps per run, after one warm-up", low=1)
    device: Device = section(Device)
    common: Common = section(Common)


@dataclass(frozen=True)
class Serve:
    """Settings of `sd-atoms bench serve`."""

    architecture: Architecture = section(Architecture)
    resolution: int | None = setting(None, WHAT, "pixels; none = the architecture's own", low=1)
    steps: int = setting(2, HOW, "denoising steps per round", low=1)
    device: Device = section(Device)
    common: Common = section(Common)


@dataclass(frozen=True)
class Decompose:
    """Settings of `sd-atoms bench decompose`."""

    architecture: Architecture = section(Architecture)
    common: Common = section(Common)


@dataclass(frozen=True)
class Sparse:
    """Settings of `sd-atoms bench sparse`."""

    channels: int = setting(1280, WHAT, "in and out", low=1)
    m: int = setting(9, WHAT, "atoms", low=1)
    l1: float = setting(1e-3, WHAT, "weight of the L1 penalty")
    common: Common = section(Common)


@dataclass(frozen=True)
class Forms:
    """Settings of `sd-atoms bench forms`."""

    architecture: Architecture = section(Architecture)
    workload: Workload = section(Workload)
    device: Device = section(Device)
    common: Common = section(Common)


@dataclass(frozen=True)
class Data:
    """Settings of `sd-atoms bench data`."""

    sizes: str = setting("5,1000", WHAT, "comma-separated numbers of pictures")
    check_only: bool = setting(False, WHAT, "without autoencoder and training")
    folder: str | None = setting(None, HOW, "where the rendered pictures stay for the next time; none = nowhere")
    common: Common = section(Common)


def run(settings: Step | Serve | Decompose | Sparse | Forms | Data) -> None:
    """Measures, prints a table, then writes the JSON file asked for.

    Raises:
        UserError: a value cannot be used, or the JSON file cannot be written.
    """
    check_outputs(settings.common.overwrite, json=settings.common.json)
    rounds, threads = settings.common.rounds, settings.common.threads or usable_cores()
    if isinstance(settings, Decompose):
        result = bench_decompose(settings.architecture.arch, rounds, threads)
        text = decompose_text(result)
    elif isinstance(settings, Sparse):
        result = bench_sparse(settings.channels, settings.m, settings.l1, rounds, threads)
        text = sparse_text(result)
    elif isinstance(settings, Data):
        result = bench_data(_numbers(settings.sizes), threads, settings.folder, settings.check_only)
        text = data_text(result)
    elif isinstance(settings, Serve):
        arch, device = settings.architecture.arch, settings.device
        result = bench_serve(arch, settings.resolution, rounds, settings.steps, threads, device.device, device.dtype)
        text = serve_text(result)
    else:
        workload = dict(
            arch=settings.architecture.arch,
            resolution_px=settings.workload.resolution,
            batch_size=settings.workload.batch_size,
            rounds=rounds,
            threads=threads,
            **asdict(settings.device),
        )
        if isinstance(settings, Step):
            result = bench_step(methods=parse_methods(settings.methods), steps=settings.steps, **workload)
            text = step_text(result)
        else:
            result = bench_forms(**workload)
            text = forms_text(result)
    print(text)
    if settings.common.json:
        write_json(settings.common.json, result)


def _numbers(text: str) -> list[int]:
    words = text.split(",")
    if not all(word.strip().isdecimal() and int(word) > 0 for word in words):
        raise UserError(f"sizes: {text!r}: integers from 1 on with commas between are allowed")
    return [int(word) for word in words]

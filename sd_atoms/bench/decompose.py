"""`bench decompose`: how long the svd solver takes over every convolution of a UNet."""

import statistics
import time

import torch
from torch import nn
from tqdm import tqdm

from sd_atoms.atoms import filter_rows, relative_error, svd_atoms, taps
from sd_atoms.bench.measuring import describe, machine_info, spread
from sd_atoms.pipeline.architectures import build_unet, unet_config

MOST_ATOMS = 9


def bench_decompose(arch: str, rounds: int, threads: int) -> dict:
    """Decomposes every Conv2d, m = min(9, K), round after round, on the CPU.

    Only the convolutions get (seeded random) weights, so that the memory of a whole UNet is not needed. Seconds are
    those of the solver alone.
    """
    torch.set_num_threads(threads)
    weights = conv_weights(unet_config(arch))
    seconds = {name: [] for name in weights}
    errors = {}
    with tqdm(total=rounds * len(weights), unit="layer", disable=None) as progress:
        for _ in range(rounds):
            for name, weight in weights.items():
                start = time.perf_counter()
                atoms = svd_atoms(filter_rows(weight), min(MOST_ATOMS, taps(weight)))
                seconds[name].append(time.perf_counter() - start)
                if name not in errors:
                    errors[name] = relative_error(filter_rows(weight), atoms)
                progress.update()
    totals = [sum(values) for values in zip(*seconds.values(), strict=True)]
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    slowest, worst = max(medians, key=medians.get), max(errors, key=errors.get)
    kernels = [f"{weight.shape[2]}×{weight.shape[3]}" for weight in weights.values()]
    return {
        "benchmark": "decompose",
        "settings": {"arch": arch, "rounds": rounds, "threads": threads, "most_atoms": MOST_ATOMS},
        "machine": machine_info("cpu", threads),
        "layers": len(weights),
        "layers_by_kernel": {kernel: kernels.count(kernel) for kernel in sorted(set(kernels))},
        **spread(totals),
        "slowest": {"layer": slowest, "shape": list(weights[slowest].shape), "seconds_median": medians[slowest]},
        "largest_relative_error": {"layer": worst, "error": errors[worst]},
    }


def conv_weights(config: dict) -> dict[str, torch.Tensor]:
    """A random weight for every Conv2d of the UNet, by module name."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.rand(module.weight.shape, generator=generator).sub_(0.5)
        for name, module in build_unet(config, "meta").named_modules()
        if type(module) is nn.Conv2d
    }


def decompose_text(result: dict) -> str:
    """The result of `bench_decompose` in a few lines."""
    counts = ", ".join(f"{count} of {kernel}" for kernel, count in result["layers_by_kernel"].items())
    slowest, worst = result["slowest"], result["largest_relative_error"]
    return "\n".join(
        [
            f"{result['settings']['arch']} UNet, svd solver; {describe(result['machine'])}",
            f"{result['layers']} convolutions ({counts}): {result['seconds_median']:.2f} s "
            f"({result['seconds_min']:.2f} – {result['seconds_max']:.2f})",
            f"slowest: {slowest['layer']} {tuple(slowest['shape'])}, {slowest['seconds_median'] * 1e3:.0f} ms",
            f"largest relative error: {worst['error']:.1e} ({worst['layer']})",
        ]
    )

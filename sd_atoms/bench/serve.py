"""`bench serve`: what a picture costs with adapters kept unmerged, and how long changing an adapter takes."""

import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn
from tqdm import tqdm

from sd_atoms.bench.architectures import LATENT_PX, step_inputs
from sd_atoms.bench.measuring import check_device, describe, machine_info, ratio_text, spread, timed
from sd_atoms.bench.methods import attach
from sd_atoms.pipeline import DTYPES, load_atoms, save_atoms
from sd_atoms.pipeline.architectures import build_unet, unet_config
from sd_atoms.report.table import text_table

SWAPS_PER_ROUND = 5
CHANGE = 0.02  # standard deviation of every trained number: the adapters must have an effect

MEASURES = (
    "Calls of the UNet on two latents, as a picture with guidance asks for at every step; the text encoder and the "
    "VAE, which no adapter touches, are left out. Ways run in turn in one process on shared base weights. A hot-swap "
    "is load_atoms(..., hotswap=True) of a file, from opening it until the network holds its numbers."
)


def bench_serve(
    arch: str, resolution_px: int | None, rounds: int, steps: int, threads: int, device: str, dtype: str
) -> dict:
    """Seconds of a denoising step by the base, with atoms and with LoRA unmerged, and merged; and of a hot-swap.

    Args:
        arch: the UNet, with seeded random weights.
        resolution_px: side of the picture; None = the architecture's own.
        rounds: how often all is measured.
        steps: denoising steps per measurement.
        threads, device, dtype: what it runs on.

    Raises:
        UserError: architecture, resolution or device cannot be used.
    """
    check_device(device)
    torch.set_num_threads(threads)
    config = unet_config(arch)
    resolution_px = resolution_px or config["sample_size"] * LATENT_PX
    inputs = step_inputs(config, 2, resolution_px, device, DTYPES[dtype])
    base = build_unet(config, device, DTYPES[dtype]).eval().requires_grad_(False)
    atoms, lora = (_adapted(base, config, method) for method in ("atoms", "locon:rank=16"))
    ways: dict[str, Callable] = {
        "base": lambda: _draw(base, inputs, steps),
        "atoms unmerged": lambda: _draw(atoms, inputs, steps),
        "LoRA unmerged": lambda: _draw(lora, inputs, steps),
    }
    seconds = {name: [] for name in (*ways, "atoms merged")}
    swaps = []
    with tempfile.TemporaryDirectory() as folder, tqdm(total=rounds, unit="round", disable=None) as progress:
        files = _two_files(atoms, Path(folder))
        for way in ways.values():
            way()
        for _ in range(rounds):
            for name, way in ways.items():
                seconds[name].append(timed(way, device) / steps)
            for layer in _atoms_layers(atoms):
                layer.merge()
            ways["atoms unmerged"]()  # not counted: memory is slower the first times after the system hands it out
            seconds["atoms merged"].append(timed(ways["atoms unmerged"], device) / steps)
            for layer in _atoms_layers(atoms):
                layer.unmerge()
            for swap in range(SWAPS_PER_ROUND):
                pipe, file = SimpleNamespace(unet=atoms), files[swap % 2]
                swaps.append(timed(lambda pipe=pipe, file=file: load_atoms(pipe, file, hotswap=True), device))
            progress.update()
    floor = statistics.median(seconds["base"])
    return {
        "benchmark": "serve",
        "measures": MEASURES,
        "settings": {"arch": arch, "resolution_px": resolution_px, "rounds": rounds, "steps": steps, "dtype": dtype},
        "machine": machine_info(device, threads),
        "ways": [
            {"way": name, **spread(values), "to_base": statistics.median(values) / floor}
            for name, values in seconds.items()
        ],
        "hotswap": spread(swaps),
    }


def serve_text(result: dict) -> str:
    """The result of `bench_serve` as a table and a line."""
    settings, swap = result["settings"], result["hotswap"]
    head = (
        f"{settings['arch']} UNet, {settings['resolution_px']} px, guidance (batch 2), {settings['dtype']}, "
        f"{settings['rounds']} rounds of {settings['steps']} denoising steps; {describe(result['machine'])}"
    )
    rows = [
        [
            entry["way"],
            f"{entry['seconds_median'] * 1e3:.1f}",
            f"{entry['seconds_min'] * 1e3:.1f} – {entry['seconds_max'] * 1e3:.1f}",
            ratio_text(entry["to_base"]),
        ]
        for entry in result["ways"]
    ]
    table = text_table(["way", "ms per step", "min – max", "to base"], rows)
    last = (
        f"hot-swap of a file: {swap['seconds_median'] * 1e3:.1f} ms "
        f"({swap['seconds_min'] * 1e3:.1f} – {swap['seconds_max'] * 1e3:.1f})"
    )
    return "\n".join([head, table, last])


def _adapted(base: nn.Module, config: dict, method: str) -> nn.Module:
    """Another UNet on the same weights, with an adapter that changes something."""
    unet = build_unet(config, "meta").eval()
    unet.load_state_dict(base.state_dict(), assign=True)
    generator = torch.Generator().manual_seed(2)
    for parameter in attach(unet, method):
        parameter.data = (CHANGE * torch.randn(parameter.shape, generator=generator)).to(parameter)
    return unet.requires_grad_(False)


def _two_files(unet: nn.Module, folder: Path) -> list[Path]:
    """The adapter, and the same with other numbers, as files."""
    pipe, files = SimpleNamespace(unet=unet), []
    for name in ("one", "other"):
        files.append(save_atoms(pipe, folder / f"{name}.safetensors"))
        for layer in _atoms_layers(unet):
            layer.atoms_delta["default"].data.mul_(0.5)
    return files


def _atoms_layers(unet: nn.Module) -> list[nn.Module]:
    return [module for module in unet.modules() if hasattr(module, "atoms_delta")]


@torch.no_grad()
def _draw(unet: nn.Module, inputs: tuple, steps: int) -> None:
    for _ in range(steps):
        unet(*inputs)

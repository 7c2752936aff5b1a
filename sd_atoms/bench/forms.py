"""`bench forms`: the forms of an adapted convolution against the frozen one, over the layers of a UNet.

What it prints is what the constants REACH and FEW_CHANNELS of `sd_atoms.atoms.forms` are set by.
"""

import itertools
import statistics

import torch
import torch.nn.functional as F
from tqdm import tqdm

from sd_atoms.atoms import FORMS, Term, atoms_layer, pick_form
from sd_atoms.bench.architectures import ConvCall, conv3x3_calls
from sd_atoms.bench.measuring import check_device, describe, machine_info, now_seconds, ratio_text
from sd_atoms.pipeline.architectures import unet_config
from sd_atoms.pipeline.base import DTYPES
from sd_atoms.report.table import text_table

FIXED_FORMS = tuple(form for form in FORMS if form != "auto")


def bench_forms(
    arch: str, resolution_px: int, batch_size: int, rounds: int, threads: int, device: str, dtype: str
) -> dict:
    """Times forward + backward of every distinct 3×3 convolution: frozen, and in each form.

    The frozen one takes the input gradient alone, the forms take it and the gradient of the mixing matrix. Contenders
    take turns, round after round; one round before the first is not counted.

    Raises:
        UserError: architecture, resolution or device cannot be used.
    """
    check_device(device)
    torch.set_num_threads(threads)
    layers = []
    for call in tqdm(conv3x3_calls(unet_config(arch), batch_size, resolution_px), unit="shape", disable=None):
        height, width = call.output_size
        positions = batch_size * height * width
        layers.append(
            {
                "in_channels": call.in_channels,
                "out_channels": call.out_channels,
                "input_size": call.input_size,
                "stride": call.geometry.stride,
                "count": call.count,
                "positions": positions,
                "positions_per_channel": positions / call.out_channels,
                "auto": pick_form(positions, call.out_channels, call.geometry.groups, cpu=device == "cpu"),
                "seconds": time_call(call, batch_size, rounds, device, DTYPES[dtype]),
            }
        )
    settings = {
        "arch": arch,
        "resolution_px": resolution_px,
        "batch_size": batch_size,
        "rounds": rounds,
        "dtype": dtype,
    }
    return {
        "benchmark": "forms",
        "settings": settings,
        "machine": machine_info(device, threads),
        "layers": layers,
        "seconds_total": totals(layers),
        "best_constants": best_constants(layers),
    }


def time_call(call: ConvCall, batch_size: int, rounds: int, device: str, dtype: torch.dtype) -> dict[str, float]:
    """Median seconds of forward + backward, for "floor" and each of FIXED_FORMS."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape):
        return torch.randn(*shape, generator=generator).to(device, dtype)

    k = call.kernel[0] * call.kernel[1]
    x = noise(batch_size, call.in_channels, *call.input_size).requires_grad_()
    weight = noise(call.out_channels, call.in_channels // call.geometry.groups, *call.kernel).mul_(0.02)
    bias = noise(call.out_channels)
    grad = noise(batch_size, call.out_channels, *call.output_size)
    mixing = (torch.eye(k) + 0.01 * torch.randn(k, k, generator=generator)).to(device).requires_grad_()
    seconds = {contender: [] for contender in ("floor", *FIXED_FORMS)}
    for _ in range(1 + rounds):
        for contender, times in seconds.items():
            start = now_seconds(device)
            if contender == "floor":
                y = F.conv2d(x, weight, bias, *call.geometry)
            else:
                y = atoms_layer(x, weight, [Term(None, mixing)], bias, call.geometry, contender)
            y.backward(grad)
            times.append(now_seconds(device) - start)
            x.grad = mixing.grad = None
    return {contender: statistics.median(times[1:]) for contender, times in seconds.items()}


def totals(layers: list[dict]) -> dict[str, float]:
    """Seconds over all layers: floor, each form throughout, auto, and the best form of each shape."""
    total = {
        contender: sum(layer["count"] * layer["seconds"][contender] for layer in layers)
        for contender in ("floor", *FIXED_FORMS)
    }
    total["auto"] = sum(layer["count"] * layer["seconds"][layer["auto"]] for layer in layers)
    total["best of each"] = sum(
        layer["count"] * min(layer["seconds"][form] for form in FIXED_FORMS) for layer in layers
    )
    return total


def best_constants(layers: list[dict]) -> dict[str, list[float | None] | float]:
    """The ranges of REACH and FEW_CHANNELS, as [from, below), that give the least seconds over all layers; and these.

    Every shape is a place where the rule may switch; `below` is None without a bound.
    """
    reaches = [0.0, *sorted({layer["positions_per_channel"] for layer in layers})]
    channels = [0, *sorted({layer["out_channels"] for layer in layers})]

    def seconds_at(constants):
        reach, few = constants
        total = 0.0
        for layer in layers:
            split = "split" if layer["out_channels"] > few else "weight"
            form = "activation" if layer["positions_per_channel"] <= reach else split
            total += layer["count"] * layer["seconds"][form]
        return total

    def span(edges, edge):
        return [edge, next((above for above in edges if above > edge), None)]

    reach, few = min(itertools.product(reaches, channels), key=seconds_at)
    return {"reach": span(reaches, reach), "few_channels": span(channels, few), "seconds": seconds_at((reach, few))}


def forms_text(result: dict) -> str:
    """The result of `bench_forms` as a table, totals and the best constant."""
    settings = result["settings"]
    header = ["i→o @ input", "count", "pos./o", "floor ms", *FIXED_FORMS, "auto"]
    rows = []
    for layer in sorted(result["layers"], key=lambda layer: layer["positions_per_channel"]):
        floor = layer["seconds"]["floor"]
        stride = "" if layer["stride"] == (1, 1) else f" /{layer['stride'][0]}"
        rows.append(
            [
                f"{layer['in_channels']}→{layer['out_channels']} @ {'×'.join(map(str, layer['input_size']))}{stride}",
                str(layer["count"]),
                f"{layer['positions_per_channel']:.2f}",
                f"{floor * 1e3:.1f}",
                *(ratio_text(layer["seconds"][form] / floor) for form in FIXED_FORMS),
                layer["auto"],
            ]
        )
    total = result["seconds_total"]
    summary = [[name, f"{value:.2f}", ratio_text(value / total["floor"])] for name, value in total.items()]
    best = result["best_constants"]
    ranges = [
        f"{name.upper()} from {best[name][0]:.3g} to "
        + ("any" if best[name][1] is None else f"below {best[name][1]:.3g}")
        for name in ("reach", "few_channels")
    ]
    return "\n".join(
        [
            f"{settings['arch']} UNet, {settings['resolution_px']} px, batch {settings['batch_size']}, "
            f"{settings['dtype']}, {settings['rounds']} rounds; {describe(result['machine'])}",
            text_table(header, rows),
            "",
            text_table(["all 3×3 convolutions", "seconds", "to floor"], summary),
            f"best {', '.join(ranges)}: {best['seconds']:.2f} s",
        ]
    )

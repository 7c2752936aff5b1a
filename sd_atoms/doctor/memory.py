"""Whether the device has the precision and the memory that a run asks for."""

from pathlib import Path

import psutil
import torch

from sd_atoms.doctor.findings import Finding, bytes_text
from sd_atoms.training.config import TrainConfig

FLOAT32 = 4  # bytes

# Measured on the UNet of SD v1-4 (320 channels at its first level), a forward and backward pass in float32 on a CPU,
# beside its weights: 0.69 GB at 256 px and 2.05 GB at 512 px, which make the line; 1.16 GB for two pictures of 256 px
# lies on it. With gradient checkpointing 0.40 GB and 1.06 GB.
WORKSPACE_BYTES = 0.23e9
ACTIVATION_BYTES = 1400  # per latent position and channel of the first level
CHECKPOINTED = 0.46  # share of these that stays


def native_bf16(device: str) -> bool | None:
    """Whether a "cpu" or "cuda" device computes in bf16 without emulation; None where nobody can say."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    flags = cpu_flags(Path("/proc/cpuinfo")) if device == "cpu" else None
    return None if flags is None else bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})


def cpu_flags(cpuinfo: Path) -> set[str] | None:
    """What the first core of a Linux machine can do; None on other machines."""
    if not cpuinfo.is_file():
        return None
    for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):  # x86, ARM
            return set(value.split())
    return None


def precision(device: str, wanted: str, native: bool | None) -> list[Finding]:
    """What is wrong with a mixed precision on a device ("cpu", "cuda", "mps")."""
    if wanted == "fp16" and device == "cpu":
        return [Finding("warning", "mixed_precision", "fp16 is emulated on a CPU and slow", "set no")]
    if wanted != "no" and device == "mps":
        text = f"{wanted} does not work on this Mac; training goes on in fp32"
        return [Finding("warning", "mixed_precision", text, "set no")]
    if wanted == "bf16" and native is False:
        what = "CPU" if device == "cpu" else "card"
        text = f"this {what} has no bf16 of its own; it is emulated and slow"
        return [Finding("warning", "mixed_precision", text, "set no" if device == "cpu" else "set fp16 or no")]
    return []


def run_memory(config: TrainConfig, pipe, trained: int, resolution: int, processes: int) -> list[Finding]:
    """Whether the device has the memory that a run needs; the base that is there already counts as free."""
    parts = (pipe.unet, pipe.text_encoder, pipe.vae)
    numbers = sum(parameter.numel() for part in parts for parameter in part.parameters())
    held = sum(p.numel() * p.element_size() for part in parts for p in part.parameters())
    batch = config.loop.train_batch_size * (1 if config.prior.prior == "none" else 2)
    activations = activation_bytes(
        pipe.unet.config.block_out_channels[0],
        (resolution // pipe.vae_scale_factor) ** 2,
        batch,
        config.precision.mixed_precision,
        config.loop.gradient_checkpointing,
    )
    needed = memory_needed(numbers, trained, activations, config.precision.mixed_precision)
    if pipe.device.type == "cuda":
        return [memory(needed, torch.cuda.mem_get_info(pipe.device)[0] + held, trained)]
    return [memory(needed * processes, psutil.virtual_memory().available + held * processes, trained * processes)]


def memory_needed(numbers: int, trained: int, activations: float, precision: str) -> float:
    """Bytes at the peak: all weights are opened in float32, then one step works in `precision`.

    Args:
        numbers: of UNet, text encoder and VAE.
        trained: of these there are the values, gradients and two moments of AdamW, in float32.
        activations: as `activation_bytes` says.
        precision: "no", "fp16" or "bf16".
    """
    each = FLOAT32 if precision == "no" else 2
    return max(FLOAT32 * numbers, each * numbers + 4 * FLOAT32 * trained + activations)


def activation_bytes(channels: int, positions: int, batch: int, precision: str, checkpointing: bool) -> float:
    """What a step keeps beside weights, by the line through the measurements at the head of this file.

    Args:
        channels: of the UNet's first level.
        positions: of one picture's latents, height times width.
        batch: pictures that go through at once.
        precision: half of it in fp16 and bf16.
        checkpointing: only some layers keep theirs.
    """
    kept = ACTIVATION_BYTES * channels * positions * batch * (CHECKPOINTED if checkpointing else 1)
    return (WORKSPACE_BYTES + kept) * (1 if precision == "no" else 0.5)


def memory(needed: float, free: float, trained: int = 0) -> Finding:
    """Whether a device has the memory: a fact, a warning, or an error where what is trained alone does not fit."""
    text = f"about {bytes_text(needed)} are needed, {bytes_text(free)} are free"
    if needed <= free:
        return Finding("fact", "memory", text)
    states = 4 * FLOAT32 * trained
    if states > free:
        text += f"; {bytes_text(states)} of it for {trained:,} trained parameters, their gradients and AdamW's moments"
        return Finding("error", "memory", text, "choose a method that trains less")
    fix = (
        "lower train_batch_size and raise gradient_accumulation_steps, set gradient_checkpointing, or lower resolution"
    )
    return Finding("warning", "memory", text, fix)

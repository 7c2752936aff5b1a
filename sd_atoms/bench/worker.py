"""One method, measured in a process of its own: python -m sd_atoms.bench.worker JOB RESULT.

JOB is the JSON text of what `measure` takes, RESULT the file to write its answer to. A process of its own gives every
method an unspoilt high-water mark of memory, and lets one that runs out of memory fail alone.
"""

import json
import sys

import torch
import torch.nn.functional as F

from sd_atoms.bench.architectures import step_inputs
from sd_atoms.bench.measuring import now_seconds
from sd_atoms.bench.methods import attach
from sd_atoms.files import write_json
from sd_atoms.machine import peak_bytes
from sd_atoms.pipeline.architectures import build_unet
from sd_atoms.pipeline.base import DTYPES


def measure(job: dict) -> dict:
    """Forward and backward passes of one method.

    Args:
        job: unet_config, method, resolution (pixels), batch_size, steps, threads, device ("cpu" or "cuda"), dtype.

    Returns:
        seconds (one per step, the warm-up step left out), peak_bytes, trainable_numbers.
    """
    torch.set_num_threads(job["threads"])
    device, dtype = job["device"], DTYPES[job["dtype"]]
    unet = build_unet(job["unet_config"], device, dtype)
    trained = attach(unet, job["method"])
    with torch.no_grad():
        for parameter in trained:
            # as after a first optimiser step: no method may profit from knowing that its change is zero
            parameter.add_(torch.randn_like(parameter), alpha=1e-3)
    latents, timesteps, states = step_inputs(job["unet_config"], job["batch_size"], job["resolution"], device, dtype)
    target = torch.randn_like(latents, dtype=torch.float32)
    if not trained:
        latents.requires_grad_()  # the floor: the gradient goes all the way to the input
    seconds = []
    for _ in range(1 + job["steps"]):
        start = now_seconds(device)
        F.mse_loss(unet(latents, timesteps, states).sample.float(), target).backward()
        seconds.append(now_seconds(device) - start)
        for tensor in [*trained, latents]:
            tensor.grad = None
    return {
        "seconds": seconds[1:],
        "peak_bytes": peak_bytes(device),
        "trainable_numbers": sum(parameter.numel() for parameter in trained),
    }


if __name__ == "__main__":
    write_json(sys.argv[2], measure(json.loads(sys.argv[1])))

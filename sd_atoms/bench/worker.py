"""One method, measured in a process of its own: python -m sd_atoms.bench.worker JOB RESULT.

JOB is the JSON text of what `measure` takes, RESULT the file to write its answer to. A process of its own gives every
method an unspoilt high-water mark of memory, and lets one that runs out of memory fail alone.
"""

import json
import sys

import torch
import torch.nn.functional as F

from sd_atoms.bench.architectures import step_inputs
from sd_atoms.bench.classifiers import attach_to_classifier, build_classifier, classifier_inputs
from sd_atoms.bench.measuring import now_seconds
from sd_atoms.bench.methods import attach
from sd_atoms.files import write_json
from sd_atoms.machine import peak_bytes
from sd_atoms.pipeline.architectures import build_unet
from sd_atoms.pipeline.base import DTYPES


def measure(job: dict) -> dict:
    """Forward and backward passes of one method.

    Args:
        job: config (of a UNet; or of a classifier, with model_type), method, resolution_px, batch_size, steps,
            threads, device ("cpu" or "cuda"), dtype.

    Returns:
        seconds (one per step, the warm-up step left out), peak_bytes, trainable_numbers.
    """
    torch.set_num_threads(job["threads"])
    device, dtype = job["device"], DTYPES[job["dtype"]]
    sizes = (job["batch_size"], job["resolution_px"], device, dtype)
    if "model_type" in job["config"]:
        network = build_classifier(job["config"], job["resolution_px"], device, dtype)
        trained, inputs = attach_to_classifier(network, job["method"]), classifier_inputs(*sizes)
    else:
        network = build_unet(job["config"], device, dtype)
        trained, inputs = attach(network, job["method"]), step_inputs(job["config"], *sizes)
    with torch.no_grad():
        for parameter in trained:
            # as after a first optimiser step: no method may profit from knowing that its change is zero
            parameter.add_(torch.randn_like(parameter), alpha=1e-3)
    if not trained:
        inputs[0].requires_grad_()  # the floor: the gradient goes all the way to the input
    target = None
    seconds = []
    for _ in range(1 + job["steps"]):
        start = now_seconds(device)
        output = network(*inputs)
        output = (output if isinstance(output, torch.Tensor) else output.sample).float()
        target = torch.randn_like(output) if target is None else target  # in the warm-up
        F.mse_loss(output, target).backward()
        seconds.append(now_seconds(device) - start)
        for tensor in [*trained, inputs[0]]:
            tensor.grad = None
    return {
        "seconds": seconds[1:],
        "peak_bytes": peak_bytes(device),
        "trainable_numbers": sum(parameter.numel() for parameter in trained),
    }


if __name__ == "__main__":
    write_json(sys.argv[2], measure(json.loads(sys.argv[1])))

"""Setting a process up for work."""

import os

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration


def use_all_cores(accelerator: Accelerator) -> None:
    """Shares the machine's cores among its processes.

    `accelerate launch` sets OMP_NUM_THREADS=1 for CPU runs, which would leave all cores but one idle.
    """
    if accelerator.device.type == "cpu":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        here = int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
        torch.set_num_threads(max(1, cores // here))


def make_accelerator(**settings) -> Accelerator:
    """An Accelerator whose CPU threads are in use; `logging_dir` switches TensorBoard on."""
    logging_dir = settings.pop("logging_dir", None)
    if logging_dir is not None:
        project = ProjectConfiguration(project_dir=str(logging_dir), logging_dir=str(logging_dir))
        settings |= {"log_with": "tensorboard", "project_config": project}
    accelerator = Accelerator(**settings)
    use_all_cores(accelerator)
    return accelerator

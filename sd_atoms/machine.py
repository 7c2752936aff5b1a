"""What this process may use of the machine, and how several processes work as one."""

import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import (
    DistributedType,
    ProjectConfiguration,
    broadcast_object_list,
    gather_object,
    release_memory,
)

from sd_atoms.errors import UserError

S, T = TypeVar("S"), TypeVar("T")
HANDED_OVER = 4  # items
GIVEN_CORES = "SD_ATOMS_CORES"  # environment variable of the executors of `jobs.cluster`
SHARDING = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


def usable_cores() -> int:
    """CPU cores that this process may run on; fewer than the machine has under taskset, in a container, or where a
    scheduler that binds no process to cores gave it so many."""
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(here, int(os.environ.get(GIVEN_CORES, here)))


def use_all_cores(accelerator: Accelerator) -> None:
    """Shares the machine's cores among its processes.

    `accelerate launch` sets OMP_NUM_THREADS=1 for CPU runs, which would leave all cores but one idle.
    """
    if accelerator.device.type == "cpu":
        here = int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
        torch.set_num_threads(max(1, usable_cores() // here))


def precision_here(wanted: str) -> str:
    """The mixed precision asked for, or "no" on Apple's cards, whose half precision torch does not train in."""
    if wanted != "no" and torch.backends.mps.is_available() and not torch.cuda.is_available():
        print(
            f"warning: mixed_precision: {wanted} does not work on this Mac; training goes on in fp32", file=sys.stderr
        )
        return "no"
    return wanted


def make_accelerator(**settings) -> Accelerator:
    """An Accelerator whose CPU threads are in use; `logging_dir` is where its trackers (`log_with`) write.

    Raises:
        UserError: the device cannot work in the precision asked for, or weights would be sharded.
    """
    logging_dir = settings.pop("logging_dir", None)
    if logging_dir is not None:
        project = ProjectConfiguration(project_dir=str(logging_dir), logging_dir=str(logging_dir))
        settings["project_config"] = project
    try:
        accelerator = Accelerator(**settings)
    except ValueError as error:  # such as fp16 on a CPU
        raise UserError(f"mixed_precision: {settings.get('mixed_precision')} does not work here ({error})") from error
    if accelerator.distributed_type in SHARDING:
        raise UserError(
            f"accelerate: distributed_type {accelerator.distributed_type.value} shards what is trained, here a few "
            "thousand numbers; MULTI_GPU is allowed (configs/accelerate/several_gpus.yaml)"
        )
    use_all_cores(accelerator)
    return accelerator


def on_main(accelerator: Accelerator | None, work: Callable[[], T]) -> T:
    """The result of a look at the disk, taken by the main process for all, so that none sees what another writes; or
    of writing to it, so that a full one ends every process and none waits.

    Raises:
        UserError: on every process, if `work` raised it.
    """
    if accelerator is None:
        return work()
    outcome = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = work()
        except UserError as error:
            outcome[1] = str(error)
    result, problem = broadcast_object_list(outcome)
    if problem is not None:
        raise UserError(problem)
    return result


def read_ahead(function: Callable[[S], T], items: Sequence[S]) -> Iterator[T]:
    """function(item) of each, in order, by as many threads as this process has cores, HANDED_OVER items ahead each.

    A thread takes several items at once: for small ones, handing over costs more than the work.
    """
    threads, pending = max(1, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))), deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for start in range(0, len(items), HANDED_OVER):
                share = items[start : start + HANDED_OVER]
                pending.append(pool.submit(lambda share=share: [function(item) for item in share]))
                if len(pending) > threads:
                    yield from pending.popleft().result()
            while pending:
                yield from pending.popleft().result()
        finally:
            for waiting in pending:
                waiting.cancel()


def shared_work(work: Callable[[Sequence[S]], Sequence[T]], items: Sequence[S], accelerator: Accelerator | None):
    """work(items), a list with a result for each, done by all processes together; every process gets all of it.

    Raises:
        UserError: on every process, if `work` raised it on one.
    """
    if accelerator is None or accelerator.num_processes == 1:
        return list(work(items))
    processes, found = accelerator.num_processes, ([], None)
    try:
        found = (list(work(items[accelerator.process_index :: processes])), None)
    except UserError as error:
        found = ([], str(error))
    everything = gather_object([found])
    for _, problem in everything:
        if problem is not None:
            raise UserError(problem)
    return [everything[place % processes][0][place // processes] for place in range(len(items))]


def check_finite(values: torch.Tensor, what: str, why: str) -> None:
    """Stops where numbers that are none arise, before anything is made of them.

    Raises:
        UserError: some of the values are infinite or no number; the line says what they are and why that may be.
    """
    if not torch.isfinite(values).all():
        raise UserError(f"{what} are not finite; {why}")


def peak_bytes(device: str, process: int | str = "self") -> int:
    """On CUDA the most memory that torch's tensors held; else the high-water mark of a process's resident set."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path(f"/proc/{process}/status")
    if status.exists():
        # unlike ru_maxrss, which a child process starts with at its parent's size
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        if "VmHWM" in lines:
            return int(lines["VmHWM"].split()[0]) * 1024
    if process != "self":
        return 0  # not told elsewhere than on Linux
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def forget_accelerator() -> None:
    """Frees the memory of a run, and what Accelerate keeps of it for the process: precision and accumulation."""
    AcceleratorState._reset_state()
    GradientState._reset_state()
    release_memory()

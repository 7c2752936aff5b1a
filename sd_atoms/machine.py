"""What this process may use of the machine."""

import os


def usable_cores() -> int:
    """CPU cores that this process may run on; fewer than the machine has under taskset or in a container."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1

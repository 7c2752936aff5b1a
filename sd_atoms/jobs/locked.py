"""Runs a command of `sd-atoms` while it holds the lock of a job: python -m sd_atoms.jobs.locked LOCK COMMAND …"""

import runpy
import sys
from pathlib import Path

from sd_atoms.jobs.queue import TAKEN, Taken, held

if __name__ == "__main__":
    lock = Path(sys.argv[1])
    sys.argv = ["sd-atoms", *sys.argv[2:]]
    try:
        with held(lock.parent, lock.name.removesuffix(".lock")):
            runpy.run_module("sd_atoms", run_name="__main__")
    except Taken:
        sys.exit(TAKEN)

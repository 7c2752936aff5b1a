"""Ctrl-C, SIGTERM and a launcher that died as a wish to stop after the current step."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

LAUNCHED = ("ACCELERATE_DYNAMO_MODE", "TORCHELASTIC_RUN_ID")  # set by accelerate launch and torchrun alone
WATCH_SECONDS = 0.5

_orphaned = threading.Event()
_listening = threading.Event()


class Interrupted(Exception):
    """The run stopped early on request; its checkpoint is on disk."""

    def __init__(self, step: int, run: Path, signal_number: int) -> None:
        super().__init__(f"stopped after step {step} of {run}")
        self.step, self.run, self.signal_number = step, run, signal_number


class StopRequest:
    """Set by the first signal, or by the launcher's death; a second signal interrupts at once.

    The launcher's death is no signal of its own: SIGTERM for a whole group, as clusters send it, is one wish.
    """

    received: int = 0

    @property
    def signal_number(self) -> int:
        """The signal that asks to stop; 0 for none."""
        return self.received or (signal.SIGTERM if _orphaned.is_set() else 0)

    def receive(self, number: int, frame) -> None:
        if self.received:
            raise KeyboardInterrupt
        self.received = number


@contextlib.contextmanager
def listening() -> Iterator[StopRequest]:
    """Catches SIGINT and SIGTERM for a while; the previous handlers come back afterwards."""
    request = StopRequest()
    previous = {number: signal.signal(number, request.receive) for number in (signal.SIGINT, signal.SIGTERM)}
    _listening.set()
    try:
        yield request
    finally:
        _listening.clear()
        for number, handler in previous.items():
            signal.signal(number, handler)


def follow_launcher() -> None:
    """Ends this process with its launcher, which hands SIGTERM on to nobody: while it listens after a checkpoint,
    otherwise at once. Without a launcher it does nothing, so that nohup and a closed shell stop no run."""
    if not any(name in os.environ for name in LAUNCHED):
        return
    launcher = os.getppid()

    def watch() -> None:
        while True:
            time.sleep(WATCH_SECONDS)
            if os.getppid() == launcher:
                continue
            _orphaned.set()
            if not _listening.is_set():
                os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()

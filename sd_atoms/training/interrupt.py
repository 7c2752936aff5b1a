"""Ctrl-C and SIGTERM as a wish to stop after the current step."""

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path


class Interrupted(Exception):
    """The run stopped early on request; its checkpoint is on disk."""

    def __init__(self, step: int, run: Path, signal_number: int) -> None:
        super().__init__(f"stopped after step {step} of {run}")
        self.step, self.run, self.signal_number = step, run, signal_number


class StopRequest:
    """Set by the first signal; a second one interrupts at once."""

    signal_number: int = 0

    def receive(self, number: int, frame) -> None:
        if self.signal_number:
            raise KeyboardInterrupt
        self.signal_number = number


@contextlib.contextmanager
def listening() -> Iterator[StopRequest]:
    """Catches SIGINT and SIGTERM for a while; the previous handlers come back afterwards."""
    request = StopRequest()
    previous = {number: signal.signal(number, request.receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)

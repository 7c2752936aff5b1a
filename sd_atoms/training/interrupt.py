"""Ctrl-C and SIGTERM as a wish to stop after the current step."""

import contextlib
import signal
from collections.abc import Iterator


class Interrupted(Exception):
    """The run stopped early on request; its checkpoint is on disk."""

    def __init__(self, step: int, checkpoint, signal_number: int) -> None:
        super().__init__(f"stopped after step {step}, saved {checkpoint}")
        self.step, self.checkpoint, self.signal_number = step, checkpoint, signal_number


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

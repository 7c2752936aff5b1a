"""How far long work has come: a bar on a terminal; a line every half minute in a log file, where bars are noise."""

import os
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

SECONDS = 30
T = TypeVar("T")


class Lines:
    """Takes the place of a bar of `tqdm`."""

    def __init__(self, total: int, desc: str, unit: str, initial: int = 0) -> None:
        self.total, self.desc, self.unit = total, desc, unit
        self.first = self.done = initial
        self.started = self.told = time.monotonic()
        self.notes = ""

    def __enter__(self) -> "Lines":
        return self

    def __exit__(self, *error) -> None:
        pass

    def set_postfix(self, refresh: bool = False, **notes: str) -> None:
        """What the next lines say besides."""
        self.notes = "".join(f", {name} {value}" for name, value in notes.items())

    def update(self, count: int = 1) -> None:
        """So much more is done; says so if the last line is half a minute old."""
        self.done += count
        now = time.monotonic()
        if now - self.told < SECONDS or self.done == self.first:
            return
        self.told = now
        seconds = (now - self.started) / (self.done - self.first)  # of one
        rate = f"{seconds:.1f} s a {self.unit}" if seconds > 1 else f"{1 / seconds:.1f} {self.unit}s a second"
        left = tqdm.format_interval((self.total - self.done) * seconds)
        text = f"{self.desc}: {self.unit} {self.done} of {self.total}{self.notes}, {rate}, {left} left"
        print(text, file=sys.stderr, flush=True)


def progress_bar(total: int, desc: str, unit: str, initial: int = 0, main: bool = True, **bar) -> tqdm | Lines:
    """A bar, with more settings of `tqdm`, or lines, on the main process alone."""
    if main and not sys.stderr.isatty():
        return Lines(total, desc, unit, initial)
    return tqdm(total=total, desc=desc, unit=unit, initial=initial, disable=not main, **bar)


def followed(items: Iterable[T], total: int, desc: str, unit: str) -> Iterator[T]:
    """The items, with a bar or lines about how many of them are done, if it takes over two seconds."""
    main = os.environ.get("RANK", "0") == "0"
    with progress_bar(total, desc, unit, main=main, delay=2, leave=False) as bar:
        for item in items:
            yield item
            bar.update()

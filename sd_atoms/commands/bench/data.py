"""Measures what a set of so many pictures costs before its first step, and per draw."""

from dataclasses import dataclass

from sd_atoms.bench.data import bench_data, data_text
from sd_atoms.commands.bench.common import HOW, WHAT, Common, started, tell
from sd_atoms.errors import UserError
from sd_atoms.settings import section, setting


@dataclass(frozen=True)
class Settings:
    """Settings of `sd-atoms bench data`."""

    sizes: str = setting("100,1000", WHAT, "comma-separated numbers of pictures")
    check_only: bool = setting(False, WHAT, "without autoencoder and training")
    folder: str | None = setting(None, HOW, "where the rendered pictures stay for the next time; none = nowhere")
    common: Common = section(Common)


def run(settings: Settings) -> None:
    """Measures; raises UserError for a value that cannot be used."""
    threads = started(settings.common)
    result = bench_data(_numbers(settings.sizes), threads, settings.folder, settings.check_only)
    tell(data_text(result), result, settings.common)


def _numbers(text: str) -> list[int]:
    words = text.split(",")
    if not all(word.strip().isdecimal() and int(word) > 0 for word in words):
        raise UserError(f"sizes: {text!r}: integers from 1 on with commas between are allowed")
    return [int(word) for word in words]

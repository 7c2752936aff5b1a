"""What a picture's PNG text says of its making, so that it can be drawn once more: the command for this one picture,
and in `made_with` what the command does not say: the files it read, and what its last bits follow."""

import hashlib
import json
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from sd_atoms.errors import UserError
from sd_atoms.files import parse_json
from sd_atoms.generation.png import image_notes
from sd_atoms.settings import fields_of, flat

COMMAND, MADE_WITH = "command", "made_with"
PROGRAM = ("sd-atoms", "generate")
HUB = "hub:"  # before the name of what is no file here
LIBRARIES = (
    "sd-atoms", "torch", "diffusers", "transformers", "peft", "numpy", "pillow", "compel", "torchsde",
)  # fmt: skip


@dataclass(frozen=True)
class MadeWith:
    """files: as the command names them -> their SHA-256. together, place: of how many pictures drawn at once it was
    which, from 0. threads: of the CPU. libraries: name -> version."""

    files: Mapping[str, str]
    together: int
    place: int
    device: str
    threads: int
    libraries: Mapping[str, str]


def making(files: Mapping[str, str], together: int, place: int, device: torch.device) -> MadeWith:
    """What this process draws with."""
    libraries = {name: _version(name) for name in LIBRARIES}
    return MadeWith(dict(files), together, place, device.type, torch.get_num_threads(), libraries)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def command_notes(settings: Any, made_with: MadeWith) -> dict[str, str]:
    """Two entries of a picture's text."""
    return {COMMAND: shlex.join([*PROGRAM, *as_words(settings)]), MADE_WITH: json.dumps(asdict(made_with))}


def as_words(settings: Any) -> list[str]:
    """The words of a command line that says the same as these settings."""
    words = []
    for name, value in flat(settings).items():
        if value == fields_of(type(settings))[name][1].default:
            continue
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        else:
            # one word each, since a value may begin with a dash
            words += [f"--{name}={entry}" for entry in (value if isinstance(value, tuple) else (value,))]
    return words


def read_making(path: str | Path) -> tuple[list[str], MadeWith]:
    """The words after `sd-atoms generate` in a picture's text, and what else it was made with.

    Raises:
        UserError: it is no PNG picture, says no such command, or the rest cannot be read.
    """
    try:
        notes = image_notes(path)
    except UserError as error:
        raise UserError(f"{path}: no whole PNG picture") from error.__cause__
    if COMMAND not in notes or MADE_WITH not in notes:
        raise UserError(f"{path}: its text says no command; pictures that `sd-atoms generate` drew say one")
    try:
        words = shlex.split(notes[COMMAND])
        made = MadeWith(**parse_json(notes[MADE_WITH]))
        numbers = (made.together, made.place, made.threads)
        if tuple(words[:2]) != PROGRAM or not all(type(number) is int for number in numbers):
            raise ValueError
        if not (0 <= made.place < made.together <= 1000 and 0 < made.threads <= 4096):
            raise ValueError
        if not all(isinstance(table, dict) for table in (made.files, made.libraries)):
            raise ValueError
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: what its text says of its making cannot be read") from error
    return words[2:], made


def check_there(path: str | Path, files: Mapping[str, str]) -> None:
    """Whether the files are there that a picture was made with.

    Raises:
        UserError: one is missing.
    """
    for name in files:
        if not name.startswith(HUB) and not Path(name).expanduser().exists():
            raise UserError(
                f"{path}: was drawn with {name}, which is not there; names count from the folder that it was drawn in"
            )


def check_files(path: str | Path, files: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Whether what a picture was made with is what is there now.

    Raises:
        UserError: a file is another.
    """
    for name, digest in files.items():
        if now.get(name) != digest:
            found, before = str(now.get(name))[:16], str(digest)[:16]
            raise UserError(f"{path}: {name} has changed since (SHA-256 {found}… in place of {before}…)")


def sha256_of(path: str | Path) -> str:
    """Of a file's content, in hexadecimal digits.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error

"""Captions beside pictures: a text file for each, or one metadata.jsonl for all."""

import os
from collections.abc import Sequence
from pathlib import Path

from sd_atoms.errors import UserError, refuse, shortlist
from sd_atoms.files import parse_json

METADATA = "metadata.jsonl"
SUFFIXES = (".txt", ".caption")  # in any case: cameras and old tools write .TXT
CAPTION_KEYS = ("text", "caption", "prompt")

_AN_ENTRY = '{"file_name": "a.png", "text": "its caption"}'


def folder_captions(folder: Path, paths: Sequence[Path]) -> dict[Path, str]:
    """Reads the captions of `paths`, all directly inside `folder`; empty if there are no caption files.

    The caption of a.png is the text of a.txt (.TXT, .caption), or stands in metadata.jsonl: one JSON object per line
    with `file_name` and one of `text`, `caption` and `prompt`. Pictures of one stem share a text file.

    Raises:
        UserError: everything that is wrong: files that are not UTF-8 or not JSON, entries without a picture or a
            caption, pictures with two captions or text files, with an empty one, or with none while others have some.
    """
    captions, problems, complete = _entries(folder / METADATA, paths)
    for path, files in _beside(folder, paths).items():
        if len(files) > 1:
            names = ", ".join(file.name for file in files)
            problems.append(f"{folder}: {path.name} has {len(files)} caption files, {names}; expected one")
        if not files:
            continue
        beside = files[0]
        if path in captions:
            problems.append(f"{beside}: {path.name} has a caption in {METADATA} too; expected it in one of the two")
            continue
        captions[path] = ""
        try:
            captions[path] = tidy(_read(beside))
            if not captions[path]:
                problems.append(f"{beside}: is empty; expected a caption")
        except UserError as error:
            problems.append(str(error))
    without = [path.name for path in paths if path not in captions]
    if without and complete and caption_files(folder, paths):
        problems.append(
            f"{folder}: {len(without)} of {len(paths)} pictures have no caption: {shortlist(without)}; expected "
            f"<stem>.txt, <stem>.caption or an entry in {METADATA} for all or for none"
        )
    problems = list(dict.fromkeys(problems))  # a text file of two pictures is wrong once
    refuse(problems, f"{folder}: {len(problems)} mistakes in the captions:")
    return captions


def caption_files(folder: Path, paths: Sequence[Path]) -> list[Path]:
    """The files in `folder` that hold captions of `paths`; nothing is opened."""
    found = [file for files in _beside(folder, paths).values() for file in files]
    return [*dict.fromkeys(found), *([folder / METADATA] if (folder / METADATA).is_file() else [])]


def _beside(folder: Path, paths: Sequence[Path]) -> dict[Path, list[Path]]:
    """The text files of each picture's stem, in the order of SUFFIXES and of their names."""
    by_stem: dict[str, list[Path]] = {}
    for file in sorted(folder.iterdir(), reverse=True):  # .txt before .TXT
        if file.suffix.lower() in SUFFIXES and file.is_file():
            by_stem.setdefault(file.stem, []).append(file)
    for files in by_stem.values():
        files.sort(key=lambda file: SUFFIXES.index(file.suffix.lower()))
    return {path: by_stem.get(path.stem, []) for path in paths}


def tidy(text: str) -> str:
    """A caption as a prompt: stripped and on one line."""
    return " ".join(text.strip().splitlines())


def _entries(metadata: Path, paths: Sequence[Path]) -> tuple[dict[Path, str], list[str], bool]:
    """Captions in metadata.jsonl, what is wrong with it, and whether every line says which picture it is for.

    A picture whose entry is wrong has the caption "".
    """
    if not metadata.is_file():
        return {}, [], True
    try:
        lines = _read(metadata).split("\n")
    except UserError as error:
        return {}, [str(error)], False
    by_name = {path.name: path for path in paths}
    captions, problems, complete, seen = {}, [], True, {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{metadata}, line {number}"
        try:
            entry = parse_json(line)
        except (ValueError, RecursionError) as error:
            problems.append(f"{where}: is not valid JSON ({error}); expected one object per line as {_AN_ENTRY}")
            complete = False
            continue
        name = entry.get("file_name") if isinstance(entry, dict) else None
        if not isinstance(name, str):
            problems.append(f"{where}: names no picture; expected {_AN_ENTRY}")
            complete = False
            continue
        path = by_name.get(os.path.normpath(name))
        if path is None:
            problems.append(f"{where}: {name!r} is no picture directly inside this folder")
        elif path in seen:
            problems.append(f"{where}: {name!r} has an entry in line {seen[path]} already; expected one per picture")
        else:
            seen[path] = number
            captions[path] = ""
            try:
                captions[path] = _caption(entry)
            except ValueError as error:
                problems.append(f"{where}: {name!r} {error}")
    return captions, problems, complete


def _caption(entry: dict) -> str:
    keys = [key for key in CAPTION_KEYS if key in entry]
    if len(keys) != 1:
        raise ValueError(f"has {' and '.join(keys) or 'no caption'}; expected one of {', '.join(CAPTION_KEYS)}")
    value = entry[keys[0]]
    if not isinstance(value, str):
        raise ValueError(f"has a {keys[0]} that is a {type(value).__name__}; expected text")
    if not value.strip():
        raise ValueError(f"has an empty {keys[0]}; expected a caption")
    return tidy(value)


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); expected captions") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: is not UTF-8 (byte {error.start}); expected captions in UTF-8") from error

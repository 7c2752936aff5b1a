"""Settings as frozen dataclasses: one table of defaults that makes the flags, reads the YAML and checks both.

Later sources win: default, then the YAML file of --config, then the command line. Every mistake of all sources is
reported at once.
"""

import argparse
import dataclasses
import difflib
import math
import reprlib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

from sd_atoms.errors import UserError


def setting(
    default: Any,
    group: str,
    help: str,
    *,
    choices: Sequence[str] | None = None,
    low: float | None = None,
    high: float | None = None,
    required: bool = False,
    unless: Sequence[str] = (),
    item: type | None = None,
) -> Any:
    """A dataclass field that is also a flag.

    Args:
        default: its value where nobody says otherwise.
        group: heading under which --help lists it.
        help: one line; a None default is explained in it.
        choices: all allowed values.
        low, high: smallest and largest allowed number.
        required: None is no answer, unless one of the fields named in `unless` is set.
        item: the field is a tuple of these settings; a YAML list of mappings gives it, no flag does.
    """
    metadata = dict(group=group, help=help, choices=choices, low=low, high=high, required=required)
    metadata |= dict(unless=unless, item=item)
    return dataclasses.field(default=default, metadata=metadata)


_short = reprlib.Repr()
_short.maxlevel, _short.maxlist, _short.maxtuple, _short.maxdict, _short.maxset = 3, 6, 6, 6, 6
_short.maxstring = _short.maxother = _short.maxlong = 300


class Parser(argparse.ArgumentParser):
    """Reports a mistake as UserError, so that every command ends alike."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, allow_abbrev=False, formatter_class=argparse.HelpFormatter, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def add_flags(parser: argparse.ArgumentParser, settings: type) -> None:
    """One flag per field, under the field's group; absent flags stay out of the parsed result."""
    groups = {}
    for field in dataclasses.fields(settings):
        meta = field.metadata
        if meta["item"]:
            continue
        group = groups.setdefault(meta["group"], parser.add_argument_group(meta["group"]))
        note = " (required)" if meta["required"] else "" if field.default is None else f" (default: {field.default})"
        text = (meta["help"] + note).replace("%", "%%")
        flag = f"--{field.name}"
        if _kind(settings, field.name) is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
        else:
            metavar = (
                "{" + ",".join(meta["choices"]) + "}"
                if meta["choices"]
                else _kind(settings, field.name).__name__.upper()
            )
            group.add_argument(flag, default=argparse.SUPPRESS, metavar=metavar, help=text)


def resolve(
    settings: type, flags: Mapping[str, Any], config_path: str | None = None, unknown: Sequence[str] = ()
) -> Any:
    """Builds the settings from defaults, a YAML file and flags.

    Args:
        settings: the dataclass.
        flags: field name -> text or bool, as parsed.
        config_path: a YAML file of field names and values, or None.
        unknown: command-line words that no flag took.

    Raises:
        UserError: everything that is wrong, in one line.
    """
    fields = {field.name: field for field in dataclasses.fields(settings)}
    problems = [f"unknown flag {word}{_near(word.lstrip('-'), fields)}" for word in unknown if word.startswith("--")]
    problems += [f"unexpected word {word!r}" for word in unknown[:1] if not word.startswith("--")]
    values = {}
    for origin, entries in ((config_path, read_yaml(config_path) if config_path else {}), (None, flags)):
        for name, value in entries.items():
            try:
                values[name] = _value(settings, fields, name, value)
            except ValueError as error:
                where = "" if name not in fields else f"--{name}: " if origin is None else f"{name}: "
                problems.append(f"{where}{error}")
    reported = {problem.split(":")[0].lstrip("-") for problem in problems}
    for name, field in fields.items():
        excused = any(values.get(other) is not None for other in field.metadata["unless"])
        if field.metadata["required"] and values.get(name) is None and name not in reported and not excused:
            problems.append(f"{name} is required: {field.metadata['help']}")
    if problems:
        source = f"{config_path}: " if config_path else ""
        count = f"{len(problems)} problems: " if len(problems) > 1 else ""
        raise UserError(source + count + "; ".join(problems))
    return settings(**values)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        UserError: no such file, not YAML, or not a mapping.
    """
    try:
        entries = yaml.safe_load(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 1}" if mark else ""
        reason = " ".join(str(getattr(error, "problem", error)).split())
        raise UserError(f"{path}: not valid YAML{line} ({reason})") from error
    except (ValueError, RecursionError) as error:  # a date such as 2024-13-45, lists in lists in lists …
        raise UserError(f"{path}: not valid YAML ({error})") from error
    if entries is None:
        return {}
    if not isinstance(entries, dict):
        raise UserError(f"{path}: must hold `name: value` lines, got a {type(entries).__name__}")
    return entries


def to_yaml(values: Any) -> str:
    """The settings as YAML in the order of their fields."""
    return yaml.safe_dump(dataclasses.asdict(values), sort_keys=False, allow_unicode=True, width=119)


def shown(value: Any) -> str:
    """A value for a message: its repr, cut where it is long, which in YAML with aliases can be without end."""
    try:
        return _short.repr(value)
    except ValueError:  # Python writes out no whole number of more than 4300 digits
        return "so large a number"


def _value(settings: type, fields: Mapping[str, dataclasses.Field], name: Any, value: Any) -> Any:
    if name not in fields:
        raise ValueError(f"unknown key {shown(name)}{_near(name if isinstance(name, str) else '', fields)}")
    item = fields[name].metadata["item"]
    if item is None or value is None:
        return _coerce(fields[name], _kind(settings, name), value)
    return _items(item, value)


def _items(item: type, entries: Any) -> tuple:
    """A list of mappings as settings, all mistakes in one ValueError."""
    if not isinstance(entries, (list, tuple)) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{shown(entries)} is not a list of `name: value` mappings")
    fields = {field.name: field for field in dataclasses.fields(item)}
    made, problems = [], []
    for number, entry in enumerate(entries):
        values = {}
        for name, value in entry.items():
            try:
                values[name] = _value(item, fields, name, value)
            except ValueError as error:
                problems.append(f"[{number}] {'' if name not in fields else f'{name}: '}{error}")
        made.append(values)
    if problems:
        raise ValueError("; ".join(problems))
    return tuple(item(**values) for values in made)


def _kind(settings: type, name: str) -> type:
    """The plain type of a field: str of `str | None`."""
    hint = typing.get_type_hints(settings)[name]
    if isinstance(hint, types.UnionType):
        return next(part for part in typing.get_args(hint) if part is not type(None))
    return hint


def _coerce(field: dataclasses.Field, kind: type, value: Any) -> Any:
    meta = field.metadata
    if value is None or (isinstance(value, str) and value.lower() in ("none", "null") and kind is not str):
        if field.default is None and (meta["unless"] or not meta["required"]):
            return None
        raise ValueError(f"None is not allowed, {_allowed(meta, kind)}")
    if kind is bool:
        if not isinstance(value, bool):
            raise ValueError(f"{shown(value)} is not true or false")
        return value
    if kind is str:
        if not isinstance(value, str):
            raise ValueError(f"{shown(value)} is a {type(value).__name__}, text is needed (quote it)")
        if "\0" in value or any("\ud800" <= letter <= "\udfff" for letter in value):
            raise ValueError(f"{shown(value)} holds characters that are no text")
        result = value
    else:
        if isinstance(value, bool):
            raise ValueError(f"{shown(value)} is not a number, {_allowed(meta, kind)}")
        try:
            result = kind(value)  # YAML reads 1e-2 as text; float() reads it as a number
            whole = kind is float or float(value) == result
        except (TypeError, ValueError, OverflowError):
            whole = False
        if not whole:
            raise ValueError(
                f"{shown(value)} is not {'a whole number' if kind is int else 'a number'}, {_allowed(meta, kind)}"
            )
        low, high = meta["low"], meta["high"]
        if not (math.isfinite(result) and (low is None or result >= low) and (high is None or result <= high)):
            raise ValueError(f"{shown(result)} is out of range, {_allowed(meta, kind)}")
    if meta["choices"] and result not in meta["choices"]:
        raise ValueError(f"{shown(result)} is not one of {', '.join(meta['choices'])}")
    return result


def _allowed(meta: Mapping[str, Any], kind: type) -> str:
    low, high = meta["low"], meta["high"]
    if low is not None and high is not None:
        return f"{low} to {high} is allowed"
    if low is not None:
        return f"{low} or more is allowed"
    if high is not None:
        return f"at most {high} is allowed"
    return f"{'a number' if kind in (int, float) else 'text'} is needed"


def _near(word: str, names: Mapping[str, Any]) -> str:
    matches = difflib.get_close_matches(word.split("=")[0], names, n=1)
    return f" (did you mean {matches[0]}?)" if matches else ""

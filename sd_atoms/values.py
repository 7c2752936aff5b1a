"""One value of a setting: whether it is allowed, and how it is told."""

import dataclasses
import difflib
import math
import reprlib
from collections.abc import Iterable, Mapping
from typing import Any

_short = reprlib.Repr()
_short.maxlevel, _short.maxlist, _short.maxtuple, _short.maxdict, _short.maxset = 3, 6, 6, 6, 6
_short.maxstring = _short.maxother = _short.maxlong = 300


def shown(value: Any) -> str:
    """A value for a message: its repr, cut where it is long, which in YAML with aliases can be without end."""
    try:
        return _short.repr(value)
    except ValueError:  # Python writes out no whole number of more than 4300 digits
        return "so large a number"


def coerce(field: dataclasses.Field, kind: type, value: Any) -> Any:
    """A value as a field of settings has it.

    Args:
        field: made by `setting`.
        kind: its plain type.
        value: as written.

    Raises:
        ValueError: it is not allowed.
    """
    meta = field.metadata
    no_text = kind is not str or (meta["file"] and not meta["required"])  # a file of that name is ./none
    if value is None or (isinstance(value, str) and value.lower() in ("none", "null") and no_text):
        if field.default is None and (meta["unless"] or not meta["required"]):
            return None
        raise ValueError(f"None is not allowed, {allowed(meta, kind)}")
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
            raise ValueError(f"{shown(value)} is not a number, {allowed(meta, kind)}")
        try:
            result = kind(value)  # YAML reads 1e-2 as text; float() reads it as a number
            whole = kind is float or float(value) == result
        except (TypeError, ValueError, OverflowError):
            whole = False
        if not whole:
            raise ValueError(
                f"{shown(value)} is not {'a whole number' if kind is int else 'a number'}, {allowed(meta, kind)}"
            )
        low, high = meta["low"], meta["high"]
        if not (math.isfinite(result) and (low is None or result >= low) and (high is None or result <= high)):
            raise ValueError(f"{shown(result)} is out of range, {allowed(meta, kind)}")
    if meta["choices"] and result not in meta["choices"]:
        raise ValueError(f"{shown(result)} is not one of {', '.join(meta['choices'])}")
    return result


def allowed(meta: Mapping[str, Any], kind: type) -> str:
    """What is allowed, for a message."""
    low, high = meta["low"], meta["high"]
    if low is not None and high is not None:
        return f"{low} to {high} is allowed"
    if low is not None:
        return f"{low} or more is allowed"
    if high is not None:
        return f"at most {high} is allowed"
    return f"{'a number' if kind in (int, float) else 'text'} is needed"


def near(word: str, names: Iterable[str]) -> str:
    """The name that was meant, for a message; empty where none is near."""
    matches = difflib.get_close_matches(word, names, n=1)
    return f" (did you mean {matches[0]}?)" if matches else ""

"""What `describe_file` found, as text."""

from collections.abc import Mapping
from typing import Any


def description_text(found: Mapping[str, Any]) -> str:
    """A few lines, and one for each program."""
    dtypes = ", ".join(f"{count} {dtype}" for dtype, count in found["dtypes"].items())
    lines = {
        "file": f"{found['file']}, {found['bytes']:,} bytes, {found['tensors']} tensors ({dtypes})",
        "kind": found["kind"],
        "base": found["base"] or "unknown",
        "damaged": found.get("damage"),
    }
    for place, counts in found.get("layers", {}).items():
        lines[place] = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    lines |= {
        "ranks": _spread(found.get("ranks", {})),
        "alphas": _spread(found.get("alphas", {})),
        "DoRA": f"{found['dora']} layers" if found.get("dora") else "",
        "words": " ".join(found.get("words", [])),
        "left over": _left_over(found.get("left_over", [])),
    }
    text = [f"{name:<12} {value}" for name, value in lines.items() if value]
    if "programs" in found:
        text += ["", "taken by"]
        text += [f"  {name:<21} {'yes' if why is None else f'no: {why}'}" for name, why in found["programs"].items()]
    return "\n".join(text)


def _spread(counts: Mapping[float, int]) -> str:
    if len(counts) > 6:
        return f"{min(counts):g} to {max(counts):g}, {len(counts)} of them"
    return ", ".join(f"{value:g} ({count} layers)" for value, count in counts.items())


def _left_over(keys: list[str]) -> str:
    return f"{len(keys)} keys that say nothing known ({', '.join(keys[:3])})" if keys else ""

"""What a file is, as text."""

from collections.abc import Mapping
from typing import Any

from sd_atoms.errors import shortlist

MOST_CLASSES = 12


def description_text(found: Mapping[str, Any]) -> str:
    """What `describe_file` found: a few lines, and one for each program."""
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


def classifier_text(found: Mapping[str, Any]) -> str:
    """What `describe_classifier` found."""
    training, made, accuracy = found["training"], found["preprocessing"], found["accuracy"]
    names = found["class_names"]
    own = "" if found["mode"] is None else f": {found['mode']}"
    numbers = f"{found['head_numbers']:,} of the head"
    numbers = f"{found['trained_numbers']:,} in the network, {numbers}" if found["trained_numbers"] else numbers
    told = [f"{training[key]:,} {key}" for key in ("images", "steps") if key in training]
    told += [f"seed {training['seed']}"] if "seed" in training else []
    right = "not known here; sd-atoms classify evaluate tests it"
    if accuracy is not None:
        interval = "" if accuracy["low"] is None else f" ({accuracy['low']:.1%} to {accuracy['high']:.1%})"
        right = f"{accuracy['value']:.1%} of {accuracy['n']:,} test images{interval}"
    lines = {
        "file": f"{found['file']}, {found['bytes']:,} bytes",
        "kind": f"{found['kind']}, for sd-atoms classify evaluate, predict, cam and merge",
        "model": found["model"],
        "method": f"{found['method']}{own}",
        "parameters": numbers,
        "classes": f"{len(names)}: {shortlist(names, MOST_CLASSES)}",
        "images": f"{made['size_px']} px",
        "training": ", ".join(told),
        "accuracy": right,
    }
    return "\n".join(f"{name:<12} {value}" for name, value in lines.items() if value)


def _spread(counts: Mapping[float, int]) -> str:
    if len(counts) > 6:
        return f"{min(counts):g} to {max(counts):g}, {len(counts)} of them"
    return ", ".join(f"{value:g} ({count} layers)" for value, count in counts.items())


def _left_over(keys: list[str]) -> str:
    return f"{len(keys)} keys that say nothing known ({', '.join(keys[:3])})" if keys else ""

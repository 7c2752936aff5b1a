"""Bytes, JSON and safetensors files made wrong by chance, for tests of malformed input."""

import copy
import json

import torch
from safetensors.torch import load_file, save


def damaged(rng, content, most=400):
    """Bytes cut off, changed, removed or put in."""
    content = bytearray(content)
    for _ in range(rng.choice([1, 1, 3, 20])):
        place = rng.randrange(min(len(content), most)) if content else 0
        kind = rng.choice(["cut", "flip", "flip", "flip", "insert", "delete"])
        if kind == "cut":
            content = content[: rng.randrange(len(content) + 1)]
        elif kind == "flip" and content:
            content[place] ^= 1 << rng.randrange(8)
        elif kind == "insert":
            content[place:place] = rng.randbytes(rng.randrange(1, 9))
        else:
            del content[place : place + rng.randrange(1, 9)]
    return bytes(content)


def spoilt_json(rng, value):
    """One place of a JSON value, however deep, replaced, removed or renamed."""
    value = copy.deepcopy(value)
    holder, key = None, None
    here = value
    while isinstance(here, (dict, list)) and here and (holder is None or rng.random() < 0.7):
        holder, key = here, rng.choice(list(here) if isinstance(here, dict) else range(len(here)))
        here = here[key]
    wrong = [
        None,
        True,
        -1,
        2,
        10**30,
        1.5,
        1e999,
        "",
        "x",
        "\ud800",
        "../x",
        [],
        ["x"],
        [[]],
        {},
        {"x": []},
        {"x": {}},
    ]
    kind = rng.choice(["replace", "replace", "remove", "rename"])
    if holder is None:
        return rng.choice(wrong)
    if kind == "replace" or isinstance(holder, list):
        holder[key] = rng.choice(wrong)
    elif kind == "remove":
        del holder[key]
    else:
        holder[f"{key}x"] = holder.pop(key)
    return value


def spoilt_tensors(rng, path):
    """The file with one tensor of another shape, kind or name, or without it."""
    tensors = load_file(path)
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    key = rng.choice(sorted(tensors))
    value = tensors.pop(key)
    kind = rng.choice(["shape", "flat", "empty", "double", "ints", "bools", "name", "none", "more", "nan", "scalar"])
    changed = {
        "shape": lambda: {key: torch.zeros(*value.shape, 2)},
        "flat": lambda: {key: value.reshape(-1)},
        "empty": lambda: {key: value.reshape(-1)[:0]},
        "double": lambda: {key: value.double()},
        "ints": lambda: {key: value.to(torch.int64)},
        "bools": lambda: {key: value.bool()},
        "name": lambda: {
            rng.choice(["x", f"{key}.x", key[1:], key.partition(".")[0], "token.", "optimizer.x.step"]): value
        },
        "none": dict,
        "more": lambda: {key: value, rng.choice(["x", "atoms_beta.9x9", "token.<b>", "optimizer.99.exp_avg"]): value},
        "nan": lambda: {key: torch.full_like(value, float("nan"))},
        "scalar": lambda: {key: torch.tensor(1.0)},
    }[kind]()
    changed = {name: tensor.clone() for name, tensor in changed.items()}
    return save(tensors | changed, metadata=header.get("__metadata__"))


def with_header(content, change):
    """A safetensors file with another header; the tensors stay."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    text = json.dumps(change(header) or header).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


def spoilt_metadata(rng, path, entry=None):
    """The file with something else in the JSON of its header; `entry` names one that holds JSON itself."""

    def change(header):
        notes = header.get("__metadata__", {})
        if entry in notes and rng.random() < 0.8:
            notes[entry] = rng.choice(
                [json.dumps(spoilt_json(rng, json.loads(notes[entry])))] * 6
                + ["", "5", "[]", "null", "{}", "[" * 100_000, notes[entry][:-5], '"x"', "1e999"]
            )
            return header
        return spoilt_json(rng, header)

    return with_header(path.read_bytes(), change)

"""Which programs take an adapter file, by what was seen of each: docs/programs.md has the versions and the table."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from sd_atoms.formats.keys import TEXT, UNET, WORD, Entry

MOST_LEFT_OVER = 12  # of Forge
# by such a layer InvokeAI tells what base a file is for
KNOWN_BY = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
# diffusers 0.42 reads q, k and v of a text encoder as its own where the file has this beside any of them
TEXT_KNOWN_BY = "self_attn.out_proj"
ALL = ("ComfyUI", "A1111", "Forge", "InvokeAI", "stable-diffusion.cpp", "diffusers", "sd_atoms")


def is_known_by(place: str, module: str) -> bool:
    """Whether exports have this layer, if only as zeros, for a program to know the others by."""
    return module == KNOWN_BY if place == UNET else module.endswith(TEXT_KNOWN_BY)


def lacks_text_known_by(layers: Iterable[tuple[str, str]]) -> str | None:
    """The first q, k or v of a text encoder if none of its layers is TEXT_KNOWN_BY, else None."""
    modules = [module for place, module in layers if place == TEXT]
    if any(module.endswith(TEXT_KNOWN_BY) for module in modules):
        return None
    return next((module for module in modules if module.endswith(("q_proj", "k_proj", "v_proj"))), None)


class Contents(NamedTuple):
    """What a file has: kinds of its layers (lora, loha, lokr, diff, norm), parts by (place, module), keys."""

    kinds: frozenset[str]
    layers: Mapping[tuple[str, str], frozenset[str]]
    keys: tuple[str, ...]
    left_over: tuple[str, ...]
    words: bool


def contents_of(entries: Mapping[str, Entry], left_over: Iterable[str]) -> Contents:
    """The same of keys as `parse_keys` reads them."""
    layers: dict[tuple[str, str], set[str]] = {}
    for entry in entries.values():
        if entry.place != WORD:
            layers.setdefault((entry.place, entry.module), set()).add(entry.part)
    kinds = {kind for parts in layers.values() for kind in map(_kind, parts) if kind}
    words = any(entry.place == WORD for entry in entries.values())
    frozen = {name: frozenset(parts) for name, parts in layers.items()}
    return Contents(frozenset(kinds), frozen, tuple(entries), tuple(left_over), words)


def _kind(part: str) -> str | None:
    for start, kind in (("lora_", "lora"), ("hada_", "loha"), ("lokr_", "lokr"), ("diff", "diff")):
        if part.startswith(start):
            return kind
    return "norm" if part.endswith("_norm") else None


def programs(contents: Contents) -> dict[str, str | None]:
    """Program -> why it does not take the file as it is, or None."""
    rules = (None, _a1111, _forge, _invoke, _cpp, _diffusers, None)
    return {name: rule and rule(contents) for name, rule in zip(ALL, rules, strict=True)}


def _a1111(contents: Contents) -> str | None:
    lone = [module for (_, module), parts in contents.layers.items() if "diff_b" in parts and "diff" not in parts]
    if lone:
        return f"a bias without its weight loses it the whole file ({lone[0]})"
    known = [key for key in contents.left_over if key.startswith(("lora_unet_", "lora_te_"))]
    return f"an unknown part of a layer loses it the whole file ({known[0]})" if known else None


def _forge(contents: Contents) -> str | None:
    count = len(contents.left_over) + sum(key.startswith("bundle_emb.") for key in contents.keys)
    return (
        f"it skips files with more than {MOST_LEFT_OVER} keys left over ({count})" if count > MOST_LEFT_OVER else None
    )


def _invoke(contents: Contents) -> str | None:
    if contents.left_over:
        return f"it refuses unknown parts ({contents.left_over[0]})"
    tells = any(
        place == TEXT or module.endswith(("attn2.to_k", "attn2.to_v", "time_emb_proj"))
        for place, module in contents.layers
    )
    return None if tells else "no layer by which it tells the base: attn2.to_k or to_v, time_emb_proj, text encoder"


def _cpp(contents: Contents) -> str | None:
    wrong = {"loha", "lokr"} & contents.kinds
    if wrong:
        return f"it computes {' and '.join(sorted(wrong))} wrongly or stops"
    missing = [
        name
        for name, alias in (("conv_in", "input_blocks_0_0"), ("conv_out", "out_2"))
        if (UNET, name) in contents.layers and not any(f"_{alias}." in key for key in contents.keys)
    ]
    return f"it passes over {' and '.join(missing)} under these names" if missing else None


def _diffusers(contents: Contents) -> str | None:
    others = contents.kinds - {"lora"}
    if others:
        return f"it takes LoRA alone, not {' and '.join(sorted(others))}"
    if any("lora_mid" in parts for parts in contents.layers.values()):
        return "it takes no lora_mid"
    if contents.words or contents.left_over:
        extra = contents.left_over[0] if contents.left_over else "bundle_emb."
        return f"it refuses other keys ({extra})"
    of_kohya = any(key.startswith("lora_te") for key in contents.keys)
    if of_kohya and (lone := lacks_text_known_by(contents.layers)):
        return f"it passes over or refuses q, k and v of a text encoder without any out_proj ({lone})"
    return None

"""What any safetensors file is, by its header: kind, base, layers, ranks, and which programs take it."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from sd_atoms.errors import UserError
from sd_atoms.formats.keys import TEXT, UNET, WORD, Entry, is_sdxl, parse_keys
from sd_atoms.formats.names import mangled, unet_to_ldm
from sd_atoms.formats.programs import contents_of, programs
from sd_atoms.pipeline.foreign import ROW_KEYS
from sd_atoms.pipeline.single_file import UNET_PREFIX

WHOLE_MODEL = "whole model under LDM's names"
WIDTHS = {768: "Stable Diffusion v1", 1024: "Stable Diffusion v2", 2048: "SDXL"}
RANKED = ("lora_down", "hada_w1_b", "lokr_w1_b", "lokr_w2_b")


def describe_file(path: Path) -> dict[str, Any]:
    """Says what a file is; of its numbers only alphas are read.

    Returns:
        `file`, `bytes`, `tensors`, `dtypes`; `kind` in a few words; `base` as far as it can be told; of adapters also
        `layers` by place, kind and type of layer, `ranks` and `alphas` with how many layers have each, `dora`,
        `words`, `left_over`, and `programs`: name -> why it does not take the file, or None.

    Raises:
        UserError: it cannot be read, or is no safetensors file.
    """
    try:
        with safe_open(path, "pt") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 (not a dict)
            dtypes = Counter(file.get_slice(key).get_dtype() for key in shapes)
            metadata = file.metadata() or {}
            alphas = {
                key: float(file.get_tensor(key))
                for key, shape in shapes.items()
                if key.endswith(".alpha") and shape in ((), (1,))
            }
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path}: corrupt or not a safetensors file ({error})") from error
    found = {"file": str(path), "bytes": path.stat().st_size, "tensors": len(shapes), "dtypes": dict(dtypes)}
    entries, left_over = parse_keys(shapes)
    if any(key.startswith(UNET_PREFIX) for key in shapes):
        return found | {"kind": WHOLE_MODEL, "base": _base_of_model(shapes)}
    if len(shapes) == 1 and next(iter(shapes)) in ROW_KEYS:
        rows = next(iter(shapes.values()))
        return found | {"kind": f"word: embedding of {rows[0]} rows", "base": WIDTHS.get(rows[-1])}
    if any(key.endswith(".atoms_b") for key in shapes):
        return found | {"kind": "filter atoms for ComfyUI, with our node", "base": None}
    if not entries:
        return found | {"kind": _other_kind(shapes), "base": WIDTHS.get(_context(shapes))}
    contents = contents_of(entries, left_over)
    ranks = Counter(
        shapes[key][0] for key, entry in entries.items() if entry.part in RANKED and not _is_alias(entry, key)
    )
    alphas = {key: value for key, value in alphas.items() if not _is_alias(entries.get(key), key)}
    return found | {
        "kind": f"adapter: {' and '.join(sorted(contents.kinds)) or 'words'}",
        "base": "SDXL" if is_sdxl(shapes) else _named_base(metadata) or WIDTHS.get(_context(shapes)),
        "layers": _layers(contents.layers, shapes, entries),
        "ranks": dict(sorted(ranks.items())),
        "alphas": dict(sorted(Counter(alphas.values()).items())),
        "dora": sum(entry.part == "dora_scale" for entry in entries.values()),
        "words": sorted({entry.module for entry in entries.values() if entry.place == WORD}),
        "left_over": left_over,
        "programs": dict.fromkeys(programs(contents), "made for SDXL") if is_sdxl(shapes) else programs(contents),
    }


def _is_alias(entry: Entry | None, key: str) -> bool:
    """Whether a key has LDM's name of a layer, which then may be there by diffusers' too."""
    ldm = None if entry is None else unet_to_ldm(entry.module)
    return ldm is not None and f"_{mangled(ldm)}." in key


def _layers(layers: Mapping[tuple[str, str], Sequence[str]], shapes, entries) -> dict[str, dict[str, int]]:
    """Place -> type of layer -> how many, by the shape of the part that meets the input."""
    inputs = {
        (entry.place, entry.module): shapes[key]
        for key, entry in entries.items()
        if entry.part in ("lora_down", "diff", "lokr_w2", "lokr_w2_b", "hada_w1_b", "w_norm")
        or (entry.part in ("lora_mid", "hada_t1", "lokr_t2"))
    }
    found: dict[str, Counter] = {UNET: Counter(), TEXT: Counter()}
    for place, module in layers:
        shape = inputs.get((place, module), ())
        type_ = "norm" if len(shape) == 1 else "×".join(map(str, shape[2:])) or "Linear or 1×1"
        found[place][type_ if shape else "bias"] += 1
    return {place: dict(counts) for place, counts in found.items() if counts}


def _named_base(metadata: Mapping[str, str]) -> str | None:
    return metadata.get("ss_base_model_version") or metadata.get("modelspec.architecture")


def _context(shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """The width of the text states, by the keys of the attention to them."""
    for key, shape in shapes.items():
        if "attn2" in key and ("to_k" in key or "to_v" in key) and len(shape) == 2 and not key.endswith(_OUTPUTS):
            return shape[1]
    return None


_OUTPUTS = ("lora_up.weight", "lora_B.weight", "up.weight", "hada_w1_a", "hada_w2_a", "lokr_w1", "lokr_w2", "_a", "_b")


def _base_of_model(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    base = WIDTHS.get(_context(shapes))
    first = shapes.get(f"{UNET_PREFIX}input_blocks.0.0.weight", ())
    return f"{base}, for inpainting" if base and len(first) > 1 and first[1] == 9 else base


def _other_kind(shapes: Mapping[str, tuple[int, ...]]) -> str:
    if any(key.startswith("base_model.model.") for key in shapes):
        return "weights of a PEFT folder: pass the folder, whose adapter_config.json says what they are"
    for start, kind in (
        ("down_blocks.", "UNet of a diffusers folder"),
        ("encoder.down_blocks.", "VAE of a diffusers folder"),
        ("text_model.", "text encoder"),
    ):
        if any(key.startswith(start) for key in shapes):
            return f"{kind}: pass the folder that it is in"
    return f"unknown: no keys of Stable Diffusion ({', '.join([*shapes][:3]) or 'no tensors'})"

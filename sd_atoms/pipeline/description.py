"""What any safetensors file is, by its header: kind, base, layers, ranks, and which programs take it."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from sd_atoms.errors import UserError
from sd_atoms.formats.keys import ATOMS_B, ATOMS_BLOCK_B, TEXT, UNET, WORD, is_sdxl, parse_keys
from sd_atoms.formats.programs import ALL, contents_of, programs
from sd_atoms.methods.imported import check_fit
from sd_atoms.pipeline.architectures import build_unet, unet_config
from sd_atoms.pipeline.foreign import BARE, BLOCKS, OVERCOMPLETE, ROW_KEYS, is_bare, read_foreign
from sd_atoms.pipeline.single_file import UNET_PREFIX

WHOLE_MODEL = "whole model under LDM's names"
COMFY = "filter atoms for ComfyUI, with our node"
BASES = ("Stable Diffusion v1", "Stable Diffusion v2")
WIDTHS = {768: BASES[0], 1024: BASES[1], 2048: "SDXL"}
CHANNELS = 320  # of the first convolution of all of them
TEXT_INPUTS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1")  # layers that take a text's states
NO_BASE = "no Stable Diffusion v1 or v2 has layers of these shapes"
NAMED_BY = ("ss_base_model_version", "modelspec.architecture")
ANY_SHAPE = ("diffusers", "sd_atoms")  # take other bases too
INPUTS = ("lora_down", "diff", "lokr_w2", "lokr_w2_b", "hada_w1_b", "w_norm", "lora_mid", "hada_t1", "lokr_t2")
RANKED = ("lora_down", "hada_w1_b", "lokr_w1_b", "lokr_w2_b")


def describe_file(path: Path) -> dict[str, Any]:
    """Says what a file is, and tries whether it can be read as an adapter.

    Returns:
        `file`, `bytes`, `tensors`, `dtypes`; `kind` in a few words; `base` as far as it can be told, by the shapes of
        the layers first; of adapters also `layers` by place, kind and type of layer, `ranks` and `alphas` with how
        many layers have each, `dora`, `words`, `left_over`, and `damage`: why `import` refuses it, or None. Of
        whatever a program takes, `programs`: name -> why it does not take the file, or None.

    Raises:
        UserError: it cannot be read, or is no safetensors file.
    """
    try:
        with safe_open(path, "pt") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 (not a dict)
            dtypes = Counter(file.get_slice(key).get_dtype() for key in shapes)
            metadata = file.metadata() or {}
            whole = is_whole_model(shapes)
            tensors = {} if whole else {key: file.get_tensor(key) for key in shapes}
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path}: corrupt or not a safetensors file ({error})") from error
    found = {"file": str(path), "bytes": path.stat().st_size, "tensors": len(shapes), "dtypes": dict(dtypes)}
    if whole:
        base = _base_of_model(shapes)
        taken = _taken(dict.fromkeys(ALL), base is None, None)
        taken |= {"sd_atoms": "it takes Stable Diffusion v1 and v2"} if base == "SDXL" else {}
        return found | {"kind": WHOLE_MODEL, "base": base, "programs": taken}
    entries, left_over = parse_keys(shapes)
    sdxl = is_sdxl(shapes) or metadata.get(NAMED_BY[0], "").startswith("sdxl")
    damage = None if sdxl else _damage(path, tensors, metadata)
    if len(shapes) == 1 and next(iter(shapes)) in ROW_KEYS:
        rows = torch.atleast_2d(next(iter(tensors.values())))
        base = WIDTHS.get(rows.shape[-1])
        found |= {"kind": f"word: embedding of {len(rows)} rows", "base": base, "damage": damage}
        return found | {"programs": _taken(dict.fromkeys(ALL), base is None, damage)}
    if any(key.endswith((ATOMS_B, ATOMS_BLOCK_B)) for key in shapes):
        others = dict.fromkeys(ALL, "it does not know our matrix B")
        others |= {"ComfyUI": None if damage in (BLOCKS, OVERCOMPLETE) else damage, "sd_atoms": damage}
        return found | {"kind": COMFY, "base": _named_base(metadata), "programs": others}
    if not entries:
        return found | {"kind": _other_kind(shapes), "base": WIDTHS.get(_context(shapes))}
    contents = contents_of(entries, left_over)
    # under LDM's name too, a layer is the same one
    own = {key: entry for entry, key in {entry: key for key, entry in reversed(entries.items())}.items()}
    ranks = Counter(shapes[key][0] for key, entry in own.items() if entry.part in RANKED and shapes[key])
    alphas = Counter(
        float(tensors[key]) for key, entry in own.items() if entry.part == "alpha" and tensors[key].numel() == 1
    )
    base, other = ("SDXL", False) if sdxl else _base_of_adapter(own, shapes, metadata)
    taken = dict.fromkeys(ALL, "made for SDXL") if sdxl else _taken(programs(contents), other, damage)
    return found | {
        "kind": f"adapter: {' and '.join(sorted(contents.kinds)) or 'words'}",
        "base": base,
        "layers": _layers(contents.layers, shapes, entries),
        "ranks": dict(sorted(ranks.items())),
        "alphas": dict(sorted(alphas.items())),
        "dora": sum(entry.part == "dora_scale" for entry in entries.values()),
        "words": sorted({entry.module for entry in entries.values() if entry.place == WORD}),
        "left_over": left_over,
        "damage": damage,
        "programs": taken,
    }


def is_whole_model(keys: Iterable[str]) -> bool:
    """Whether keys are those of a whole model in one file."""
    return any(key.startswith(UNET_PREFIX) for key in keys)


def _damage(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> str | None:
    """Why reading the file as an adapter is refused; None where it is not."""
    try:
        read_foreign(path, tensors, metadata)
    except UserError as error:
        return str(error).removeprefix(f"{path}: ")
    return None


def _taken(programs_: Mapping[str, str | None], other: bool, damage: str | None) -> dict[str, str | None]:
    """The same for a file that is made for another network, or is damaged; what is damaged is for nobody."""
    if damage:
        return dict.fromkeys(programs_, "the file is damaged")
    if not other:
        return dict(programs_)
    return {name: why or (None if name in ANY_SHAPE else NO_BASE) for name, why in programs_.items()}


def _base_of_adapter(entries, shapes, metadata) -> tuple[str | None, bool]:
    """The base of an adapter as far as it can be told, and whether the shapes of its layers say that it is another."""
    parts: dict[str, dict[str, tuple[int, ...]]] = {}
    for key, entry in entries.items():
        if entry.place == UNET:
            parts.setdefault(entry.module, {})[entry.part] = shapes[key]
    fitting = _fitting_bases(parts) if parts else []
    if parts and not fitting:
        return None, True
    text = (
        shapes[key][-1]
        for key, entry in entries.items()
        if entry.place == TEXT and entry.part == "lora_down" and entry.module.endswith(TEXT_INPUTS)
    )
    width = next(text, None)
    if not parts and width is not None and width not in WIDTHS:
        return None, True
    told = " or ".join(fitting) or WIDTHS.get(width)
    return _named_base(metadata) or told, False


def _fitting_bases(parts: Mapping[str, Mapping[str, tuple[int, ...]]]) -> list[str]:
    """The bases whose UNets have most layers of these shapes, if that is half of them at least: a few may be of a
    network with further inputs, or have names of their own."""
    counts = {}
    for base, arch in zip(BASES, ("sd-v1-4", "sd-v2-1"), strict=True):
        modules = dict(build_unet(unet_config(arch), "meta").named_modules())
        counts[base] = sum(_fits(own, modules.get(name)) for name, own in parts.items())
    most = max(counts.values())
    return [base for base, count in counts.items() if count == most and 2 * count >= len(parts)]


def _fits(parts: Mapping[str, tuple[int, ...]], layer: nn.Module | None) -> bool:
    try:
        check_fit(parts, layer)
    except (ValueError, IndexError):
        return False
    return True


def _layers(layers: Mapping[tuple[str, str], Sequence[str]], shapes, entries) -> dict[str, dict[str, int]]:
    """Place -> type of layer -> how many, by the shape of the part that meets the input."""
    inputs = {(entry.place, entry.module): shapes[key] for key, entry in entries.items() if entry.part in INPUTS}
    found: dict[str, Counter] = {UNET: Counter(), TEXT: Counter()}
    for place, module in layers:
        shape = inputs.get((place, module), ())
        type_ = "norm" if len(shape) == 1 else "×".join(map(str, shape[2:])) or "Linear or 1×1"
        found[place][type_ if shape else "bias"] += 1
    return {place: dict(counts) for place, counts in found.items() if counts}


def _named_base(metadata: Mapping[str, str]) -> str | None:
    return next((metadata[name] for name in NAMED_BY if metadata.get(name)), None)


def _context(shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """The width of the text states, by the keys of the attention to them."""
    for key, shape in shapes.items():
        if "attn2" in key and ("to_k" in key or "to_v" in key) and len(shape) == 2 and not key.endswith(_OUTPUTS):
            return shape[1]
    return None


_OUTPUTS = ("lora_up.weight", "lora_B.weight", "up.weight", "hada_w1_a", "hada_w2_a", "lokr_w1", "lokr_w2", "_a", "_b")


def _base_of_model(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    first = shapes.get(f"{UNET_PREFIX}input_blocks.0.0.weight", ())
    base = WIDTHS.get(_context(shapes)) if first[:1] == (CHANNELS,) else None
    return f"{base}, for inpainting" if base and len(first) > 1 and first[1] == 9 else base


def _other_kind(shapes: Mapping[str, tuple[int, ...]]) -> str:
    if is_bare(shapes):
        return BARE
    for start, kind in (
        ("down_blocks.", "UNet of a diffusers folder"),
        ("encoder.down_blocks.", "VAE of a diffusers folder"),
        ("text_model.", "text encoder"),
    ):
        if any(key.startswith(start) for key in shapes):
            return f"{kind}: pass the folder that it is in"
    return f"unknown: no keys of Stable Diffusion ({', '.join([*shapes][:3]) or 'no tensors'})"

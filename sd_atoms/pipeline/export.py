"""Writes what adapters change as files for other programs: every layer as LoRA, or as the difference of its weights.

Any change ΔW (o, i·K as a matrix) is a LoRA of full rank: up the identity (o, o), down ΔW, alpha = o, or the other way
round where that is smaller, so every program that adds LoRA to convolutions adds it exactly. What was trained as
factors of low rank keeps them. Names are kohya's; what each program needs besides is in docs/programs.md.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from sd_atoms.atoms.measures import energy
from sd_atoms.errors import UserError
from sd_atoms.files import replacing
from sd_atoms.formats.keys import TEXT, UNET, kohya_key, parse_keys
from sd_atoms.formats.names import unet_to_ldm
from sd_atoms.formats.programs import KNOWN_BY, TEXT_KNOWN_BY, lacks_text_known_by
from sd_atoms.methods.factors import Factors
from sd_atoms.methods.imported import changes as changes_of_parts
from sd_atoms.pipeline.changes import Change
from sd_atoms.progress import followed

Layers = Mapping[tuple[str, str], Change]  # (UNET or TEXT, module) -> what is added to it
# stable-diffusion.cpp passes these over under diffusers' names
ALIASED = ("conv_in", "conv_out")


@dataclass(frozen=True)
class ReadBack:
    """How what was written differs from the change itself.

    worst: the largest ‖ΔW' − ΔW‖/‖ΔW‖ of a layer, and which it is. errors: of every layer.
    """

    errors: dict[str, float]

    def total(self, layers: Layers) -> float:
        """‖ΔW' − ΔW‖/‖ΔW‖ over all layers."""
        sizes = {name: sum(energy(v) for v in change.values.values()) for (_, name), change in layers.items()}
        lost = sum(sizes[name] * error**2 for name, error in self.errors.items())
        return (lost / sum(sizes.values())) ** 0.5

    @property
    def worst(self) -> tuple[str, float]:
        return max(self.errors.items(), key=lambda item: item[1])


def has_lora_form(layers: Layers) -> bool:
    """Whether weights of convolutions and Linear layers are all that changes."""
    return bool(layers) and all(change.values.keys() == {"weight"} and not change.norm for change in layers.values())


def lora_parts(change: Change, rank: int | None = None) -> dict[str, torch.Tensor]:
    """lora_up, lora_down and alpha of a layer's change.

    Args:
        change: of the weight alone.
        rank: the nearest of this rank instead, where the full one is larger.
    """
    weight = change.values["weight"]
    taps = (1,) * (weight.dim() - 2)
    o, columns = len(weight), weight[0].numel()
    ranks = sum(len(factors.down) for factors in change.factors)
    if rank is not None and rank < (ranks or min(o, columns)):
        # the nearest in the least-squares sense, by Eckart and Young
        u, s, v = torch.linalg.svd(weight.flatten(1), full_matrices=False)
        root = s[:rank].sqrt()
        up, down, alpha = u[:, :rank] * root, root[:, None] * v[:rank], rank
    elif 0 < ranks <= min(o, columns):
        up, down, alpha = _joined(change.factors)
    elif o <= columns:
        up, down, alpha = torch.eye(o, device=weight.device), weight.flatten(1), o
    else:
        up, down, alpha = weight.flatten(1), torch.eye(columns, device=weight.device), columns
    return {
        "lora_up": up.reshape(o, -1, *taps),
        "lora_down": down.reshape(-1, *weight.shape[1:]),
        "alpha": torch.tensor(float(alpha)),
    }


def _joined(factors: list[Factors]) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Up, down and alpha of a sum of products, which is one of the sum of their ranks."""
    if len(factors) == 1:
        return factors[0].up.flatten(1), factors[0].down.flatten(1), factors[0].scale * len(factors[0].down)
    up = torch.cat([own.up.flatten(1).float() * own.scale for own in factors], dim=1)
    down = torch.cat([own.down.flatten(1).float() for own in factors])
    return up, down, len(down)


def diff_parts(change: Change) -> dict[str, torch.Tensor]:
    """diff and diff_b of a layer's change, or w_norm and b_norm, which A1111 takes together alone."""
    if not change.norm:
        names = {"weight": "diff", "bias": "diff_b"}
        return {names[parameter]: value for parameter, value in change.values.items()}
    like = next(iter(change.values.values()))
    return {
        part: change.values.get(parameter, torch.zeros_like(like))
        for part, parameter in (("w_norm", "weight"), ("b_norm", "bias"))
    }


def file_bytes(
    layers: Layers,
    kind: str,
    dtype: torch.dtype,
    modules: Mapping[str, torch.Size],
    metadata: Mapping[str, str],
    rank: int | None = None,
) -> int:
    """How large a file becomes that `write_lora` makes of the same."""
    shapes = ((key, _on_meta(change)) for key, change in layers.items())
    tensors = _named_tensors(shapes, kind, modules, rank)
    return tensors_bytes({key: value.shape for key, value in tensors.items()}, dtype, metadata)


def tensors_bytes(
    shapes: Mapping[str, Sequence[int]], dtype: torch.dtype, metadata: Mapping[str, str] | None = None
) -> int:
    """How large a safetensors file of those tensors is, alphas being float32."""
    size, header = 0, {"__metadata__": {"format": "pt", **(metadata or {})}}
    for key, shape in shapes.items():
        start, width = size, 4 if key.endswith(".alpha") else dtype.itemsize
        size += math.prod(shape) * width
        header[key] = {"dtype": f"F{8 * width}", "shape": list(shape), "data_offsets": [start, size]}
    length = len(json.dumps(header, separators=(",", ":")))
    return 8 + length + -length % 8 + size


def _on_meta(change: Change) -> Change:
    """The shapes of a change."""
    values = {name: value.to("meta") for name, value in change.values.items()}
    factors = [own._replace(up=own.up.to("meta"), down=own.down.to("meta")) for own in change.factors]
    return Change(values, factors, change.norm)


def write_lora(
    path: Path,
    layers: Layers,
    kind: str,
    dtype: torch.dtype,
    modules: Mapping[str, torch.Size],
    metadata: Mapping[str, str],
    rank: int | None = None,
) -> ReadBack:
    """Writes a file of kind "lora" or "diff", then reads it back.

    Args:
        path: of the file.
        layers: what is written.
        kind: "lora" or "diff".
        dtype: of the numbers.
        modules: name -> shape of the weight, of all modules of the UNet that have one.
        metadata: further entries of the header.
        rank: of a lossy "lora".

    Raises:
        UserError: the place cannot be written to, a number is too large for the dtype, or what is read back is not
            what was written.
    """
    progress = followed(layers.items(), len(layers), f"making {path.name}", "layer")
    tensors = _named_tensors(progress, kind, modules, rank)
    write_tensors(path, {key: _rounded(path, key, value, dtype) for key, value in tensors.items()}, metadata)
    return read_back(path, layers)


def _named_tensors(
    changes: Iterable[tuple[tuple[str, str], Change]],
    kind: str,
    modules: Mapping[str, torch.Size],
    rank: int | None,
) -> dict[str, torch.Tensor]:
    """All that a file has: key -> numbers."""
    made = {key: lora_parts(change, rank) if kind == "lora" else diff_parts(change) for key, change in changes}
    if kind == "lora":
        _share_alpha(made)
    made = _known_by(made, modules, kind) | made
    tensors = {kohya_key(*key, part): value for key, own in made.items() for part, value in own.items()}
    for name in ALIASED:
        for part, value in made.get((UNET, name), {}).items():
            tensors[kohya_key(UNET, unet_to_ldm(name), part)] = value
    return tensors


def _known_by(made: Mapping[tuple[str, str], dict], modules: Mapping[str, torch.Size], kind: str) -> dict:
    """The layers of zeros by which InvokeAI and diffusers know what the others are."""
    shapes = {}
    if (UNET, KNOWN_BY) not in made and KNOWN_BY in modules:
        shapes[UNET, KNOWN_BY] = modules[KNOWN_BY]
    lone = lacks_text_known_by(made) if kind == "lora" else None
    if lone is not None:  # q, k, v and out are of one shape
        parts = made[TEXT, lone]
        shape = len(parts["lora_up"]), parts["lora_down"].shape[1]
        shapes[TEXT, f"{lone.rpartition('self_attn.')[0]}{TEXT_KNOWN_BY}"] = shape
    alphas = [float(parts["alpha"]) for parts in made.values() if "alpha" in parts]
    return {
        key: {
            "lora_up": torch.zeros(o, 1),
            "lora_down": torch.zeros(1, i),
            "alpha": torch.tensor(alphas[0] if alphas else 1.0),
        }
        for key, (o, i) in shapes.items()
    }


def _share_alpha(made: Mapping[tuple[str, str], dict[str, torch.Tensor]]) -> None:
    """Puts alpha into up, and 1 in its place, where layers of attention or of the text encoder have several: diffusers
    0.42 looks for theirs under other names than it has read them, and takes the most common of all."""
    alphas = {float(parts["alpha"]) for parts in made.values()}
    if len(alphas) > 1 and any(place == TEXT or ".attn" in module for place, module in made):
        for parts in made.values():
            parts["lora_up"] = parts["lora_up"] * parts["alpha"]
            parts["alpha"] = torch.tensor(1.0)


def _rounded(path: Path, key: str, value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if key.endswith(".alpha"):
        return value.clone()  # under two names it is there twice
    rounded = value.detach().to(dtype).contiguous()
    if not torch.isfinite(rounded).all():
        raise UserError(f"{path}: the change of {key} is too large for {dtype}; pass --dtype fp32 or bf16")
    return rounded.clone()


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """One safetensors file, all or nothing."""
    with replacing(path) as temporary:
        save_file(dict(tensors), temporary, metadata={"format": "pt", **metadata})


@torch.no_grad()
def read_back(path: Path, layers: Layers) -> ReadBack:
    """What a file says that each layer's change is, against the change itself.

    Raises:
        UserError: the file lacks a layer.
    """
    errors = {}
    with safe_open(path, "pt") as file:
        entries, _ = parse_keys(file.keys())
        keys = {}
        for key, (place, module, part) in entries.items():
            keys.setdefault((place, module), {})[part] = key
        for name, change in followed(layers.items(), len(layers), f"reading {path.name} back", "layer"):
            if name not in keys:
                raise UserError(f"{path}: was written without {name[1]}")
            parts = {part: file.get_tensor(key).float() for part, key in keys[name].items()}
            like = change.values.get("weight", next(iter(change.values.values())))
            found = changes_of_parts(parts, like)
            errors[name[1]] = relative_error(found, change.values)
    return ReadBack(errors)


def relative_error(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> float:
    """‖found − expected‖/‖expected‖ over all parameters; what is missing on a side counts as zero there."""
    apart, whole = 0.0, 0.0
    for name in {**found, **expected}:
        mine, theirs = found.get(name), expected.get(name)
        difference = theirs if mine is None else mine if theirs is None else mine.view_as(theirs) - theirs
        apart += float(difference.double().square().sum())
        whole += 0.0 if theirs is None else float(theirs.double().square().sum())
    return (apart / whole) ** 0.5 if whole else apart**0.5

"""The adapters of other programs as one PEFT tuner: a layer keeps the parts that its file has for it, as they are.

So the change is exact, whatever mixture of kinds, ranks and alphas a file holds. W is the weight, o × i·K as a matrix:

    LoRA, LoCon   ΔW = alpha/r · up·down
    Tucker        ΔW[o, i] = alpha/r · Σ mid[a, b]·up[o, a]·down[b, i], one such matrix for each tap
    LoHa          ΔW = alpha/r · (w1_a·w1_b) ∘ (w2_a·w2_b), either side with a Tucker core t1, t2 or without
    LoKr          ΔW = alpha/r · w1 ⊗ w2, where a factor may be given as a·b; with both whole alpha counts for nothing
    diff, w_norm  ΔW itself, diff_b and b_norm Δb
    DoRA          W' = s · (W + ΔW)/‖W + ΔW‖, the norm being that of an output's or of an input's filters, by s' shape

LoHa, LoKr and LoCon are arXiv 2309.14859, DoRA is arXiv 2402.09353. No alpha means r.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from sd_atoms.atoms import mixing_dtype
from sd_atoms.tuner.config import TargetConfig, TunerType
from sd_atoms.tuner.tuned import TunedLayer, TunedModel

PREFIX = "imported_"
Parts = Mapping[str, torch.Tensor]
# what a kind needs, and what it may have besides
KINDS = {
    "lora": (("lora_up", "lora_down"), ("lora_mid",)),
    "loha": (("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), ("hada_t1", "hada_t2")),
    "lokr": ((), ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")),
    "diff": (("diff",), ()),
    "norm": (("w_norm",), ()),
}
BIASES = ("diff_b", "b_norm")
FURTHER = ("alpha", "dora_scale", *BIASES)
PARTS = (*dict.fromkeys(part for kind in KINDS.values() for parts in kind for part in parts), *FURTHER)


def kind_of(parts: Mapping[str, object]) -> str | None:
    """The kind of change that a layer's parts make of its weight, one of KINDS; None where they make none.

    Raises:
        ValueError: a part is missing, or two kinds are mixed.
    """
    found = [kind for kind, (needed, more) in KINDS.items() if any(part in parts for part in (*needed, *more))]
    if len(found) > 1:
        raise ValueError(f"mixes {' and '.join(found)}")
    if not found:
        alone = [part for part in ("dora_scale", "alpha") if part in parts]
        if alone or not any(part in parts for part in BIASES):
            raise ValueError(f"has {alone[0] if alone else 'nothing'} alone")
        return None
    missing = [part for part in KINDS[found[0]][0] if part not in parts]
    if found[0] == "lokr":
        missing = [
            f"{side} or its two factors"
            for side in ("lokr_w1", "lokr_w2")
            if side not in parts and not (f"{side}_a" in parts and f"{side}_b" in parts)
        ]
    if missing:
        raise ValueError(f"lacks {', '.join(missing)}")
    return found[0]


def weight_change(parts: Parts) -> torch.Tensor | None:
    """ΔW without its strength, (o, …) with as many entries as the weight; None where the parts change the bias alone.

    DoRA is left out, since it needs the weight: see `changes`.

    Raises:
        ValueError: the parts do not make one change.
        RuntimeError: their shapes do not go together.
    """
    kind = kind_of(parts)
    empty = [part for part, value in parts.items() if not value.numel()]
    if empty:
        raise ValueError(f"has no numbers in {', '.join(empty)}")
    if kind is None:
        return None
    if kind in ("diff", "norm"):
        return parts["diff" if kind == "diff" else "w_norm"]
    if kind == "lora":
        up, down = parts["lora_up"], parts["lora_down"]
        if "lora_mid" in parts:
            up, down = up.flatten(1), down.flatten(1)
            change = torch.einsum("ab...,oa,bi->oi...", parts["lora_mid"], up, down)
        else:
            change = (up.flatten(1) @ down.flatten(1)).view(len(up), *down.shape[1:])
        return _scaled(change, parts, len(down))
    if kind == "loha":
        one, two = (
            _product(parts[f"hada_w{side}_a"], parts[f"hada_w{side}_b"], parts.get(f"hada_t{side}")) for side in (1, 2)
        )
        if one.shape != two.shape:
            raise ValueError(f"multiplies {tuple(one.shape)} by {tuple(two.shape)}")
        return _scaled(one * two, parts, len(parts["hada_w1_b"]))
    factors, rank = [], None
    for side in ("lokr_w1", "lokr_w2"):
        if side in parts:
            factors.append(parts[side])
        else:
            core = parts.get("lokr_t2") if side == "lokr_w2" else None
            factors.append(_product(parts[f"{side}_a"], parts[f"{side}_b"], core))
            rank = len(parts[f"{side}_b"])
    small, large = factors
    small = small.reshape(*small.shape, *(1,) * (large.dim() - small.dim()))
    change = torch.kron(small, large.contiguous())
    return change if rank is None else _scaled(change, parts, rank)


def _product(a: torch.Tensor, b: torch.Tensor, core: torch.Tensor | None) -> torch.Tensor:
    """a·b (o, r) (r, i, …), or with a Tucker core (r, r, …) what a (r, o) and b (r, i) make of each of its taps."""
    if core is None:
        return (a @ b.flatten(1)).view(len(a), *b.shape[1:])
    return torch.einsum("rs...,ro,si->oi...", core, a, b)


def _scaled(change: torch.Tensor, parts: Parts, rank: int) -> torch.Tensor:
    return change * (parts["alpha"] / rank) if "alpha" in parts else change


@torch.no_grad()
def changes(parts: Parts, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Parameter ("weight", "bias") -> what the parts add to it at a strength of 1, in the parts' dtype.

    Args:
        parts: of one layer, in float32 at least.
        weight: of the base.

    Raises:
        ValueError: they are not of a layer with such a weight.
    """
    biases = [parts[part] for part in BIASES if part in parts]
    found = {"bias": biases[0]} if biases else {}
    change = weight_change(parts)
    if change is not None:
        if len(change) != len(weight) or change.numel() != weight.numel():
            raise ValueError(f"changes a weight {tuple(change.shape)}, the layer's is {tuple(weight.shape)}")
        found["weight"] = change.view(weight.shape)
    if "dora_scale" in parts:
        found["weight"] = _decomposed(weight.to(change.dtype), found["weight"], parts["dora_scale"])
    return found


def dora_axis(scale: torch.Tensor, weight_shape: torch.Size) -> int:
    """0 if DoRA's norms are those of the outputs' filters, as PEFT has them, 1 if of the inputs', as LyCORIS had.

    Raises:
        ValueError: neither fits.
    """
    if tuple(scale.shape) in ((weight_shape[0],), (weight_shape[0], *(1,) * (len(weight_shape) - 1))):
        return 0
    if tuple(scale.shape) == (1, weight_shape[1], *(1,) * (len(weight_shape) - 2)):
        return 1
    raise ValueError(f"has a dora_scale {tuple(scale.shape)}, the layer's weight is {tuple(weight_shape)}")


def _decomposed(weight: torch.Tensor, change: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """s·(W + ΔW)/‖W + ΔW‖ − W."""
    axis = dora_axis(scale, weight.shape)
    total = weight + change
    others = [place for place in range(weight.dim()) if place != axis]
    norm = torch.linalg.vector_norm(total, dim=others, keepdim=True)
    return total * (scale.view_as(norm) / norm) - weight


@dataclass
class ImportedConfig(TargetConfig):
    """Settings of an adapter that another program made: which parts, of which shapes, each layer has.

    Raises:
        ValueError: `parts` is not such a table, or a part is unknown.
    """

    tuner_type = TunerType.IMPORTED
    parts: dict[str, dict[str, list[int]]] = field(
        default_factory=dict, metadata={"help": "Module name -> part -> shape, as found in the file."}
    )

    def __post_init__(self):
        self.target_modules = list(self.parts) if isinstance(self.parts, dict) else None
        super().__post_init__()

    def problems(self):
        if not isinstance(self.parts, dict) or not all(isinstance(own, dict) for own in self.parts.values()):
            return ["parts: module name -> part -> shape is allowed"]
        unknown = sorted({part for own in self.parts.values() for part in own} - set(PARTS))
        return [f"parts: {', '.join(unknown)} unknown; {', '.join(PARTS)} are allowed"] if unknown else []


class ImportedLayer(TunedLayer):
    """Any layer with a weight; per adapter `imported_<part>` for each of its parts."""

    adapter_layer_names = tuple(f"{PREFIX}{part}" for part in PARTS)

    def __init__(self, base_layer, adapter_name):
        super().__init__(base_layer, adapter_name)
        for part in self.adapter_layer_names:
            setattr(self, part, nn.ParameterDict())

    def update_layer(self, adapter_name, config, name):
        for part, shape in config.parts[name].items():
            getattr(self, f"{PREFIX}{part}")[adapter_name] = self._new(torch.zeros(shape))
        self._added(adapter_name, config)

    def changes(self, adapter: str) -> dict[str, torch.Tensor]:
        """Parameter -> what the adapter adds to it, scale included, in float32 at least."""
        weight = self.original("weight")
        dtype = mixing_dtype(weight.dtype)
        held = {part: getattr(self, f"{PREFIX}{part}") for part in PARTS}
        parts = {part: values[adapter].to(dtype) for part, values in held.items() if adapter in values}
        return {name: change * self.scaling[adapter] for name, change in changes(parts, weight).items()}

    def get_delta_weight(self, adapter):
        weight = self.original("weight")
        change = self.changes(adapter).get("weight")
        return torch.zeros_like(weight, dtype=mixing_dtype(weight.dtype)) if change is None else change

    def values(self, adapters):
        found = {}
        for adapter in adapters:
            for name, change in self.changes(adapter).items():
                start = found.get(name)
                found[name] = change + (self.original(name).to(change.dtype) if start is None else start)
        return found


class ImportedModel(TunedModel):
    """The tuner behind `unet.add_adapter(ImportedConfig(...))`."""

    prefix = PREFIX
    tuner_layer_cls = ImportedLayer

    def check_layer(self, config, name, layer):
        check_fit(config.parts.get(name, {}), layer)


def check_fit(shapes: Mapping[str, list[int]], layer: nn.Module) -> None:
    """Whether parts of those shapes belong to a layer, without any number.

    Raises:
        ValueError: they do not; the message says why, without the layer's name.
    """
    if not hasattr(layer, "weight"):
        raise ValueError(f"is a {type(layer).__name__}, which has no weight")
    parts = {part: torch.empty(tuple(shape), device="meta") for part, shape in shapes.items()}
    bias = getattr(layer, "bias", None)
    try:
        found = changes(parts, torch.empty(layer.weight.shape, device="meta"))
    except RuntimeError as error:
        raise ValueError(f"has parts whose shapes do not go together ({' '.join(str(error).split())})") from error
    if "bias" in found and (bias is None or found["bias"].shape != bias.shape):
        own = "none" if bias is None else tuple(bias.shape)
        raise ValueError(f"changes a bias {tuple(found['bias'].shape)}, the layer's is {own}")

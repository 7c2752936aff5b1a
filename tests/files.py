"""Adapter files as other programs write them, for a base of any size, and what they change by plain formulas."""

import torch
from safetensors.torch import save_file

from sd_atoms.formats.names import mangled

CONV, LINEAR, POINTWISE, NORM = (
    "down_blocks.0.resnets.0.conv1", "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
    "down_blocks.0.attentions.0.proj_in", "down_blocks.0.resnets.0.norm1",
)  # fmt: skip
TEXT = "encoder.layers.0.mlp.fc1"


def draw(*shape, seed=[0]):  # noqa: B006 (each call draws other numbers)
    seed[0] += 1
    return 0.3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed[0]))


def lora(weight, rank=2, alpha=1.0):
    o, i, *k = weight.shape
    up, down = draw(o, rank, *(1 for _ in k)), draw(rank, i, *k)
    parts = {"lora_up.weight": up, "lora_down.weight": down}
    change = (up.reshape(o, rank).double() @ down.reshape(rank, -1).double()).view_as(weight)
    if alpha is None:
        return parts, change
    return {**parts, "alpha": torch.tensor(alpha)}, change * alpha / rank


def tucker(weight, rank=2, alpha=3.0):
    o, i, h, w = weight.shape
    up, down, mid = draw(o, rank, 1, 1), draw(rank, i, 1, 1), draw(rank, rank, h, w)
    change = torch.zeros(o, i, h, w, dtype=torch.double)
    for y in range(h):
        for x in range(w):
            change[:, :, y, x] = up[:, :, 0, 0].double() @ mid[:, :, y, x].double() @ down[:, :, 0, 0].double()
    parts = {"lora_up.weight": up, "lora_down.weight": down, "lora_mid.weight": mid, "alpha": torch.tensor(alpha)}
    return parts, change * alpha / rank


def loha(weight, rank=2, alpha=1.0):
    o, rest = len(weight), weight[0].numel()
    parts = {"hada_w1_a": draw(o, rank), "hada_w1_b": draw(rank, rest), "hada_w2_a": draw(o, rank),
             "hada_w2_b": draw(rank, rest)}  # fmt: skip
    one, two = (parts[f"hada_w{n}_a"].double() @ parts[f"hada_w{n}_b"].double() for n in (1, 2))
    return {**parts, "alpha": torch.tensor(alpha)}, (one * two).view_as(weight) * alpha / rank


def loha_tucker(weight, rank=2, alpha=1.0):
    o, i, h, w = weight.shape
    parts, sides = {}, []
    for n in (1, 2):
        a, b, core = draw(rank, o), draw(rank, i), draw(rank, rank, h, w)
        parts |= {f"hada_w{n}_a": a, f"hada_w{n}_b": b, f"hada_t{n}": core}
        side = torch.stack([a.double().T @ core[:, :, y, x].double() @ b.double() for y in range(h) for x in range(w)])
        sides.append(side.permute(1, 2, 0).reshape(o, i, h, w))
    return {**parts, "alpha": torch.tensor(alpha)}, sides[0] * sides[1] * alpha / rank


def _kron(one, two, weight):
    """Entry by entry: (a ⊗ b)[i·p + k, j·q + l] = a[i, j]·b[k, l], tap by tap."""
    taps = two.reshape(*two.shape[:2], -1).double()
    made = torch.stack([torch.kron(one.double(), taps[..., tap].contiguous()) for tap in range(taps.shape[2])], -1)
    return made.view_as(weight)


def lokr(weight, rank=1, alpha=2.0):
    o, i, *k = weight.shape
    one, a, b = draw(2, 2), draw(o // 2, rank), draw(rank, i // 2, *k)
    two = (a @ b.reshape(rank, -1)).view(o // 2, i // 2, *k)
    parts = {"lokr_w1": one, "lokr_w2_a": a, "lokr_w2_b": b, "alpha": torch.tensor(alpha)}
    return parts, _kron(one, two, weight) * alpha / rank


def lokr_whole(weight):
    o, i, *k = weight.shape
    one, two = draw(2, 2), draw(o // 2, i // 2, *k)
    return {"lokr_w1": one, "lokr_w2": two, "alpha": torch.tensor(7.0)}, _kron(one, two, weight)  # alpha is ignored


def diff(weight):
    change = draw(*weight.shape)
    return {"diff": change}, change.double()


def dora(weight, axis):
    parts, change = lora(weight)
    others = [place for place in range(weight.dim()) if place != axis]
    scale = 1 + draw(*(weight.shape[axis] if place == axis else 1 for place in range(weight.dim()))).abs()
    total = weight.double() + change
    merged = total / total.square().sum(others, keepdim=True).sqrt() * scale.double()
    return {**parts, "dora_scale": scale}, merged - weight.double()


# name -> layer, maker of (parts, change)
KINDS = {
    "lora": (LINEAR, lora),
    "lora without alpha": (LINEAR, lambda weight: lora(weight, alpha=None)),
    "locon": (CONV, lambda weight: lora(weight, rank=3, alpha=2.0)),
    "locon 1x1": (POINTWISE, lora),
    "tucker": (CONV, tucker),
    "loha": (CONV, loha),
    "loha of a linear layer": (LINEAR, loha),
    "loha tucker": (CONV, loha_tucker),
    "lokr": (CONV, lokr),
    "lokr of a linear layer": (LINEAR, lokr),
    "lokr whole": (CONV, lokr_whole),
    "diff": (CONV, diff),
    "dora by outputs": (CONV, lambda weight: dora(weight, 0)),
    "dora by inputs": (CONV, lambda weight: dora(weight, 1)),
    "dora of a linear layer by inputs": (LINEAR, lambda weight: dora(weight, 1)),
}  # fmt: skip


def kohya_file(path, layers, text_layers=(), metadata=None, **more):
    """Writes layer -> parts as kohya does; `more`: further keys and tensors."""
    tensors = {f"lora_unet_{mangled(layer)}.{part}": v for layer, own in layers.items() for part, v in own.items()}
    for layer, own in dict(text_layers).items():
        tensors |= {f"lora_te_text_model_{mangled(layer)}.{part}": value for part, value in own.items()}
    save_file({key: value.contiguous() for key, value in {**tensors, **more}.items()}, path, metadata=metadata)
    return path

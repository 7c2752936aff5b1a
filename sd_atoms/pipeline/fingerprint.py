"""Tells whether an adapter meets the weights that it was trained on.

Per layer two numbers: the norm of the weight, and its projection on a fixed vector of unit-variance entries, both
divided so that two copies whose weights differ by a share r in norm differ by about r in the projection. Half
precision copies of one model differ by 2e-4 (fp16) to 2e-3 (bf16); fine-tunes of an architecture by far more.
"""

import base64
import hashlib
import math
from collections.abc import Iterable

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

WIDTH = 4093  # prime, so that the pattern does not fall in step with any channel count
SAME_BASE = 5e-3


def fingerprint(weights: Iterable[torch.Tensor]) -> torch.Tensor:
    """(layers, 2) float32: |F| and <F, v>/|F| of each weight, v the same on every machine."""
    return torch.stack([_of_weight(weight) for weight in weights])


_known = WeakTensorKeyDictionary()  # a base is marked once, not at every adapter that is swapped in


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Estimates |F_ours − F_theirs| / |F_ours| over all layers from two fingerprints (layers, 2)."""
    norms, projections = ours.double().T
    other_norms, other_projections = theirs.double().T
    scale = norms.square().sum().clamp_min(1e-30)
    drift = (norms * projections - other_norms * other_projections).square().sum() / scale
    stretch = (norms - other_norms).square().sum() / scale
    return math.sqrt(max(drift.item(), stretch.item()))


def to_text(values: torch.Tensor) -> str:
    """Numbers as base64 of float32, for a file's header."""
    return base64.b64encode(values.float().contiguous().cpu().numpy().tobytes()).decode("ascii")


def from_text(text: str, shape: tuple[int, ...] = (-1, 2)) -> torch.Tensor:
    """The inverse of `to_text`, in that shape; raises ValueError or RuntimeError of anything else."""
    return torch.frombuffer(bytearray(base64.b64decode(text, validate=True)), dtype=torch.float32).view(shape)


def _of_weight(weight: torch.Tensor) -> torch.Tensor:
    # `.data = …` gives a weight other storage without counting as a version
    state = weight.data_ptr(), weight.dtype, None if weight.is_inference() else weight._version
    if weight not in _known or _known[weight][0] != state:
        _known[weight] = state, mark(weight)
    return _known[weight][1]


@torch.no_grad()
def mark(weight: torch.Tensor) -> torch.Tensor:
    """|F| and <F, v>/|F| of one weight, (2,) float32."""
    flat = weight.detach().flatten().float()
    norm = flat.norm().double()
    if norm == 0:
        return torch.zeros(2)
    # v is the outer product of two sign-like waves, so that it costs one pass and no memory
    blocks = math.ceil(flat.numel() / WIDTH)
    padded = torch.nn.functional.pad(flat, (0, blocks * WIDTH - flat.numel())).view(blocks, WIDTH)
    projection = (padded @ _wave(WIDTH, 0.61803398875).to(flat.device)) @ _wave(blocks, 0.41421356237).to(flat.device)
    return torch.stack([norm.cpu(), projection.double().cpu() / norm.cpu()]).float()


def _wave(length: int, turn: float) -> torch.Tensor:
    """Unit-variance entries √2·cos(2π·turn·j²), free of any random number generator."""
    index = torch.arange(length, dtype=torch.float64)
    return (math.sqrt(2) * torch.cos(2 * math.pi * ((turn * index * index) % 1.0))).float()


def weights_digest(module: nn.Module) -> bytes:
    """A hash of all weights and their dtype: cached results count for this very network."""
    content = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        content.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        content.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return content.digest()

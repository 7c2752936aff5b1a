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
from sd_atoms.progress import followed

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
        if not layer or layer not in names:  # "" is the network itself
            raise UserError(f"layer: {layer!r}: the network has none of that name")
        return layer
    blocks = blocks_of(classifier.network)
    if not blocks:
        raise UserError("block: this network has no blocks that are known; name a layer")
    if block is not None and block > len(blocks):
        raise UserError(f"block: {block}: the network has {len(blocks)}")
    return blocks[(block or len(blocks)) - 1]


def maps_of(classifier: Classifier, images: Sequence[Image.Image], labels: Sequence[int], layer: str) -> torch.Tensor:
    """Grad-CAM of images for their classes.

    Args:
        classifier: in eval mode.
        images: RGB, of any size; what is shown is their `centre_crop`.
        labels: the class that is asked about, of each.
        layer: of the network; what it gives must be (N, c, h, w), as high as wide to within a pixel.

    Returns:
        Maps (N, h, w) float32 in [0, 1], each divided by its largest value, at the size of the network's input.

    Raises:
        UserError: captum is not installed, or the layer gives no maps.
    """
    try:
        from captum.attr import LayerGradCam
    except ImportError as error:
        raise UserError('classify cam needs `pip install "sd-atoms[classify]"`') from error
    own, device, maps = classifier.preprocessing, classifier.head.weight.device, []
    attribution = LayerGradCam(classifier, classifier.network.get_submodule(layer))
    # one at a time: a batch of 32 at 224 px holds every activation
    for image, label in followed(zip(images, labels, strict=True), len(images), "Maps", "image"):
        pixels = own.normalised(to_unit([centre_crop(image, own)]).to(device)).requires_grad_(True)
        if not maps:
            _check_layer(classifier, pixels, layer)
        found = attribution.attribute(pixels, target=int(label), relu_attributions=True)
        large = F.interpolate(found.detach().float(), pixels.shape[2:], mode="bilinear", align_corners=False)[0, 0]
        maps.append((large / large.max().clamp_min(1e-12)).cpu())
    return torch.stack(maps)


def _check_layer(classifier: Classifier, pixels: torch.Tensor, layer: str) -> None:
    """Whether a layer gives maps of square images; channels at the end would make others without a word.

    Raises:
        UserError: it gives something else, or is not asked.
    """
    shapes = []
    module = classifier.network.get_submodule(layer)
    handle = module.register_forward_hook(lambda _, inputs, output: shapes.append(tuple(getattr(output, "shape", ()))))
    with torch.no_grad():
        classifier(pixels)
    handle.remove()
    shape = shapes[-1] if shapes else ()
    if len(shape) != 4 or abs(shape[2] - shape[3]) > 1:
        raise UserError(f"layer: {layer} gives {shape or 'no tensor'}, no map (N, c, h, w) of a square image")


def active_shares(maps: torch.Tensor) -> torch.Tensor:
    """(N,): the share of each map (N, h, w) that is at least half of its largest value."""
    return (maps >= ACTIVE).double().mean((1, 2))

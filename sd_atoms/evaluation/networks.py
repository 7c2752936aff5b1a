"""Networks that make features of images, by name, and features of whole folders, made once and kept by content."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from torch.utils.data import BatchSampler
from transformers import AutoConfig, AutoImageProcessor, AutoModel

from sd_atoms.data.images import fit
from sd_atoms.data.records import ImageRecord
from sd_atoms.errors import UserError
from sd_atoms.evaluation.clip import ClipFeatures
from sd_atoms.evaluation.efficientnet import NAME as EFFICIENTNET
from sd_atoms.evaluation.efficientnet import SIDE_PX, load_efficientnet
from sd_atoms.files import replacing
from sd_atoms.machine import check_finite, on_main, read_ahead, shared_work
from sd_atoms.pipeline.fingerprint import weights_digest
from sd_atoms.progress import followed
from sd_atoms.sources import packaged_path, resolve_source

RESIZES = ("antialiased", "legacy")
COLOURS, COLOURS_PX = "colours", 16
BATCH = 32  # images that go through a network together
Images = Sequence[Image.Image]


@dataclass(frozen=True)
class Network:
    """A network that makes features.

    digest: tells it apart from others of its name. of_images: RGB images of any size -> (N, d) float32 on the CPU.
    of_texts: the same of texts, in the same space; None for networks that know none. too_long: whether it cuts a text.
    """

    name: str
    digest: str
    of_images: Callable[[Images], torch.Tensor]
    of_texts: Callable[[list[str]], torch.Tensor] | None = None
    too_long: Callable[[str], bool] | None = None


def open_network(name: str, device: str | torch.device = "cpu", resize: str = "antialiased") -> Network:
    """A CLIP model (unit vectors), any other vision model of transformers such as DINOv2 (its class token, or its own
    pooling), efficientnet-lite0 (1,280 averages), or colours (the colours of 16×16 places, grey as 0).

    Args:
        name: pocket:clip, pocket:judge, efficientnet-lite0, colours, a folder, or a hub id such as
            facebook/dinov2-base.
        device: where it runs.
        resize: antialiased as the model's own processor does it, or legacy, bilinear without, as of older figures.

    Raises:
        UserError: there is no such model, or it makes no features of images.
    """
    if name == EFFICIENTNET:
        model = load_efficientnet().to(device)
        digest = weights_digest(model).hex()
        return Network(name, digest, lambda images: _finite(name, model(_bytes(images, SIDE_PX, resize).to(device))))
    if name == COLOURS:
        return Network(name, name, lambda images: (_bytes(images, COLOURS_PX, resize) - 128).flatten(1) / 128)
    source = str(packaged_path(name) or resolve_source(name, "networks"))
    try:
        kind = AutoConfig.from_pretrained(source).model_type
        if kind == "clip":
            clip = ClipFeatures(name, device)
            return Network(
                name,
                weights_digest(clip.model).hex(),
                lambda images: _finite(name, clip.of_images(_sized(images, clip.processor, resize))),
                clip.of_texts,
                clip.cuts,
            )
        model = AutoModel.from_pretrained(source, use_safetensors=True).eval().requires_grad_(False).to(device)
        processor = AutoImageProcessor.from_pretrained(source, backend="pil")
        _pooled(model, processor, [Image.new("RGB", (64, 64))], resize)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"networks: {name!r} cannot be opened as a model that makes features of images") from error
    digest = weights_digest(model).hex()
    return Network(name, digest, lambda images: _finite(name, _pooled(model, processor, images, resize)))


def features_of(
    network: Network, records: Sequence[ImageRecord], resize: str, cache: Path | None = None, accelerator=None
) -> torch.Tensor:
    """(N, d) float32: features of checked images, a few read at a time.

    Args:
        network: as `open_network` makes it.
        records: the images, with their stats.
        resize: as the network was opened with; part of the name in the cache.
        cache: folder where they stay, by the content of the images, the network's weights and the resize.
        accelerator: its processes share the work; all must call it.
    """
    path = None
    if cache is not None:
        key = [network.digest, resize, *(record.digest() for record in records)]
        path = cache / "features" / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}.safetensors"
    # one look for all: processes that disagree on what is there would wait for each other for ever
    kept = on_main(accelerator, lambda: _kept(path))
    if kept is not None:
        return kept
    found = torch.stack(shared_work(lambda share: list(_rows(network, share)), records, accelerator))
    if path is not None:
        on_main(accelerator, lambda: _keep(path, found))
    return found


def text_features(network: Network, prompts: Sequence[str] | None) -> tuple[dict[str, torch.Tensor], list[str]]:
    """prompt -> its features, and the prompts that were cut; none of a network that knows no text."""
    if network.of_texts is None or prompts is None:
        return {}, []
    distinct = list(dict.fromkeys(prompts))
    cut = [prompt for prompt in distinct if network.too_long is not None and network.too_long(prompt)]
    return dict(zip(distinct, network.of_texts(distinct), strict=True)), cut


def _keep(path: Path, features: torch.Tensor) -> None:
    with replacing(path) as temporary:
        save_file({"features": features}, temporary)


def _kept(path: Path | None) -> torch.Tensor | None:
    try:
        return None if path is None else load_file(path)["features"]
    except (SafetensorError, OSError, KeyError):
        return None


@torch.no_grad()
def _rows(network: Network, records: Sequence[ImageRecord]) -> Iterator[torch.Tensor]:
    images = read_ahead(lambda record: record.read(), records)
    images = followed(images, len(records), f"Features of {network.name}", "image")
    for batch in BatchSampler(images, BATCH, drop_last=False):
        yield from network.of_images(batch)


@torch.no_grad()
def _pooled(model, processor, images: Images, resize: str) -> torch.Tensor:
    as_they_are = dict(do_resize=False, do_center_crop=False) if resize == "legacy" else {}
    sized = _sized(images, processor, resize)
    inputs = processor(images=sized, return_tensors="pt", **as_they_are).to(model.device)
    output = model(**inputs)
    pooled = getattr(output, "pooler_output", None)
    return (output.last_hidden_state[:, 0] if pooled is None else pooled.flatten(1)).float().cpu()


def _sized(images: Images, processor, resize: str) -> list[Image.Image]:
    """As they are, for the processor to resize, or resized without antialiasing to what the network takes."""
    if resize == "antialiased":
        return list(images)
    size = getattr(processor, "crop_size", None) or processor.size
    side = size.get("height") or size["shortest_edge"]
    pixels = _bytes(images, side, resize).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(image) for image in pixels]


def _bytes(images: Images, side: int, resize: str) -> torch.Tensor:
    """(N, 3, side, side) in [0, 255]: the middle square of each image."""
    found = []
    for image in images:
        if resize == "antialiased":
            square = fit(image, side, center_crop=True, resample="bicubic", rng=None)
            found.append(torch.from_numpy(np.array(square)).permute(2, 0, 1).float())
        else:
            edge = min(image.size)
            left, top = (image.width - edge) // 2, (image.height - edge) // 2
            square = np.array(image.crop((left, top, left + edge, top + edge)))
            pixels = torch.from_numpy(square).permute(2, 0, 1)[None].float()
            found.append(F.interpolate(pixels, (side, side), mode="bilinear", antialias=False)[0])
    return torch.stack(found)


def _finite(name: str, features: torch.Tensor) -> torch.Tensor:
    features = features.float().cpu()
    check_finite(features, f"features by {name}", "its weights are broken")
    return features

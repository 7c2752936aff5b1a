"""From concepts and their images to the examples and prompts of a run."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from sd_atoms.data.concepts import Source, image_prompts
from sd_atoms.data.config import Concept
from sd_atoms.data.prompts import load_prompts
from sd_atoms.errors import UserError
from sd_atoms.training.examples import Cropping, Examples
from sd_atoms.training.latents import encode_images, latent_masks
from sd_atoms.training.noise import generator
from sd_atoms.training.sections import PriorSettings

MOST_DIGESTS = 10_000  # they are in every checkpoint, some 60 bytes each


@dataclass(frozen=True)
class Dataset:
    """What a run learns from.

    examples: an epoch goes through all of them once. held_out: for the validation loss alone. prior: images of the
    classes, or with a teacher the training images under prompts of the class. prompts: what the examples count in;
    the last one is empty. digests: `data_digests`.
    """

    examples: Examples
    held_out: Examples
    prior: Examples
    prompts: list[str] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)

    @property
    def empty(self) -> int:
        """Index of the empty prompt."""
        return len(self.prompts) - 1


def class_prompts(prior: PriorSettings, concept: Concept) -> list[str]:
    """The prompts under which the prior of a concept is kept."""
    return load_prompts(prior.class_prompts_file) if prior.class_prompts_file else [concept.class_prompt]


def data_digests(sources: Sequence[Source], prior: PriorSettings) -> dict[str, str]:
    """Name -> digest of its content of all that a run learns from: each image with its prompts, masks, class prompts.

    Of more than MOST_DIGESTS things there is one for all of them.
    """
    found = {}
    for source in sources:
        concept = source.concept.word or source.concept.instance_prompt
        for image, texts in zip(source.images, image_prompts(source), strict=True):
            name = f"{Path(image.name).name} of {concept}"
            if name in found:  # such as of two shards
                name = f"{image.name} of {concept}"
            found[name] = _digest(image.digest(), *texts)
            if image.mask is not None:
                found[f"mask of {name}"] = _digest(image.mask.digest)
        for image in source.class_images:
            found[f"class picture {Path(image.name).name} of {concept}"] = _digest(image.digest())
        if prior.prior == "teacher":
            found[f"class prompts of {concept}"] = _digest(*class_prompts(prior, source.concept))
    if len(found) > MOST_DIGESTS:
        return {f"the set of {len(found):,}": _digest(*found, *found.values())}
    return found


def _digest(*texts: str) -> str:
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]


def make_dataset(
    vae,
    sources: Sequence[Source],
    how: Cropping,
    prior: PriorSettings,
    holdout_images: int,
    scratch: Path | None = None,
    accelerator=None,
) -> Dataset:
    """Encodes all images and numbers all prompts.

    Args:
        vae: the base's, in float32.
        sources: what to learn.
        how: images are cropped.
        prior: how the prior is kept.
        holdout_images: how many images are kept out of training.
        scratch, accelerator: as for `encode_images`.

    Raises:
        UserError: an image, mask or prompt cannot be used, too many images are held out, or the disk is full.
    """
    prompts: dict[str, int] = {}  # prompt -> its index
    shared: dict[tuple[int, ...], tuple[int, ...]] = {}  # images of the same prompts hold one tuple

    def numbered(texts: Sequence[str]) -> tuple[int, ...]:
        own = tuple(prompts.setdefault(text, len(prompts)) for text in texts)
        return shared.setdefault(own, own)

    own, of_class, repeats, class_prompt = [], [], [], []
    for source in sources:
        own += [numbered(texts) for texts in image_prompts(source)]
        repeats += [source.concept.repeats] * len(source.images)
        if prior.prior == "teacher":
            of_class += [numbered(class_prompts(prior, source.concept))] * len(source.images)
        elif prior.prior == "images":
            class_prompt += [numbered([source.concept.class_prompt])] * len(source.class_images)
    out = _held_out(len(own), holdout_images, how.seed)
    prompts.setdefault("", len(prompts))
    if list(prompts).index("") != len(prompts) - 1:
        raise UserError("an empty prompt cannot be trained with; see caption_dropout")

    images = [image for source in sources for image in source.images]
    masks = latent_masks(vae, images, how, accelerator)
    latents = encode_images(vae, images, how, scratch, accelerator)
    places = np.arange(len(own), dtype=np.int32)
    kept = np.array([place not in out for place in places])
    # without masks: the class is kept everywhere
    of_prior = Examples(latents, of_class, places[kept] if of_class else ())
    if prior.prior == "images":
        images = [image for source in sources for image in source.class_images]
        class_latents = encode_images(vae, images, how, scratch, accelerator)
        of_prior = Examples(class_latents, class_prompt, range(len(images)))
    order = np.repeat(places[kept], np.array(repeats)[kept])
    if how.data.class_balanced:
        labels = np.array([image.label for source in sources for image in source.images])
        order = balanced(places[kept], labels[kept], how.seed)
    return Dataset(
        examples=Examples(latents, own, order, masks),
        held_out=Examples(latents, own, places[~kept], masks),
        prior=of_prior,
        prompts=list(prompts),
        digests=data_digests(sources, prior),
    )


def balanced(places: np.ndarray, labels: np.ndarray, seed: int) -> np.ndarray:
    """As many of each class as the largest has: images of smaller ones come again, in an order drawn from the seed.

    Args:
        places: numbers of images (N,).
        labels: their classes (N,).
        seed: of the run.
    """
    of_classes = []
    for label in np.unique(labels):
        own = places[labels == label]
        of_classes.append(own[torch.randperm(len(own), generator=generator(seed, "balance", int(label))).numpy()])
    largest = max(map(len, of_classes))
    return np.concatenate([np.resize(own, largest) for own in of_classes])


def _held_out(images: int, count: int, seed: int) -> set[int]:
    if count >= images:
        raise UserError(f"holdout_images: {count} of {images} pictures leave none to learn from")
    order = torch.randperm(images, generator=generator(seed, "holdout", 0))
    return set(order[:count].tolist())

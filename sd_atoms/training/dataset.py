"""From concepts and their images to the examples and prompts of a run."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from sd_atoms.data.concepts import Source, image_prompts
from sd_atoms.data.config import Concept
from sd_atoms.data.prompts import load_prompts
from sd_atoms.errors import UserError
from sd_atoms.training.config import PriorSettings
from sd_atoms.training.examples import Cropping, Example, encode_images
from sd_atoms.training.noise import generator


@dataclass(frozen=True)
class Dataset:
    """What a run learns from.

    examples: an epoch goes through all of them once. held_out: for the validation loss alone. prior: images of the
    classes, or with a teacher the training images under prompts of the class. prompts: what the examples count in;
    the last one is empty.
    """

    examples: list[Example]
    held_out: list[Example]
    prior: list[Example]
    prompts: list[str] = field(default_factory=list)

    @property
    def empty(self) -> int:
        """Index of the empty prompt."""
        return len(self.prompts) - 1


def class_prompts(prior: PriorSettings, concept: Concept) -> list[str]:
    """The prompts under which the prior of a concept is kept."""
    return load_prompts(prior.class_prompts_file) if prior.class_prompts_file else [concept.class_prompt]


def make_dataset(vae, sources: Sequence[Source], how: Cropping, prior: PriorSettings, holdout_images: int) -> Dataset:
    """Encodes all images and numbers all prompts.

    Args:
        vae: the base's, in float32.
        sources: what to learn.
        how: images are cropped.
        prior: how the prior is kept.
        holdout_images: how many images are kept out of training.

    Raises:
        UserError: an image or prompt cannot be used, or too many images are held out.
    """
    prompts: dict[str, int] = {}  # prompt -> its index

    def numbered(texts: Sequence[str]) -> tuple[int, ...]:
        return tuple(prompts.setdefault(text, len(prompts)) for text in texts)

    everything, prior_examples = [], []
    for source in sources:
        encoded = encode_images(vae, source.images, how)
        made = [
            Example(*latents, numbered(texts)) for latents, texts in zip(encoded, image_prompts(source), strict=True)
        ]
        everything += [(example, source.concept.repeats) for example in made]
        if prior.prior == "teacher":
            of_class = numbered(class_prompts(prior, source.concept))
            prior_examples += [example._replace(prompts=of_class) for example in made]
        elif prior.prior == "images":
            encoded = encode_images(vae, source.class_images, how)
            prior_examples += [Example(*latents, numbered([source.concept.class_prompt])) for latents in encoded]
    out = _held_out(len(everything), holdout_images, how.seed)
    prompts.setdefault("", len(prompts))
    if list(prompts).index("") != len(prompts) - 1:
        raise UserError("an empty prompt cannot be trained with; see caption_dropout")
    return Dataset(
        examples=[
            example for place, (example, repeats) in enumerate(everything) if place not in out for _ in range(repeats)
        ],
        held_out=[example for place, (example, _) in enumerate(everything) if place in out],
        prior=prior_examples,
        prompts=list(prompts),
    )


def _held_out(images: int, count: int, seed: int) -> set[int]:
    if count >= images:
        raise UserError(f"holdout_images: {count} of {images} pictures leave none to learn from")
    order = torch.randperm(images, generator=generator(seed, "holdout", 0))
    return set(order[:count].tolist())

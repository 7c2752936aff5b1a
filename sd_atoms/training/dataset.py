"""From concepts and their pictures to the examples and prompts of a run."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from sd_atoms.data.pictures import Picture
from sd_atoms.data.prompts import fill, load_prompts, load_templates
from sd_atoms.errors import UserError
from sd_atoms.training.config import Concept, TrainConfig
from sd_atoms.training.draws import generator
from sd_atoms.training.examples import Cropping, Example, encode_pictures


@dataclass(frozen=True)
class Source:
    """A concept with its pictures, and those of its class where the prior is kept by pictures."""

    concept: Concept
    pictures: Sequence[Picture]
    class_pictures: Sequence[Picture] = ()


@dataclass(frozen=True)
class Dataset:
    """What a run learns from.

    examples: an epoch goes through all of them once. held_out: for the validation loss alone. prior: pictures of the
    classes, or with a teacher the training pictures under prompts of the class. prompts: what the examples count in;
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


def concept_prompts(concept: Concept) -> list[str]:
    """The prompts that a concept's pictures are shown with, if they have none of their own."""
    if concept.instance_prompts_file is None:
        return [concept.instance_prompt]
    return [fill(template, concept.word) for template in load_templates(concept.instance_prompts_file)]


def picture_prompts(source: Source) -> list[list[str]]:
    """The prompts of each picture: its caption, with {} filled in, or those of the concept.

    Raises:
        UserError: a placeholder token is in no caption, so that its row could not be learned.
    """
    usual = concept_prompts(source.concept)
    prompts = [
        usual if picture.caption is None else [fill(picture.caption, source.concept.word)]
        for picture in source.pictures
    ]
    unused = [token for token in source.concept.tokens if not any(token in text for own in prompts for text in own)]
    if unused:
        raise UserError(
            f"captions: none of {len(prompts)} contains the placeholder {' '.join(unused)}; write it, or {{}} in its "
            "place"
        )
    return prompts


def class_prompts(config: TrainConfig, concept: Concept) -> list[str]:
    """The prompts under which the prior of a concept is kept."""
    return load_prompts(config.class_prompts_file) if config.class_prompts_file else [concept.class_prompt]


def make_dataset(pipe, config: TrainConfig, sources: Sequence[Source], unit_px: int) -> Dataset:
    """Encodes all pictures and numbers all prompts.

    Args:
        pipe: the base, its VAE in float32.
        config: settings, resolution filled in.
        sources: what to learn.
        unit_px: what the sides of training pictures are multiples of.

    Raises:
        UserError: a picture or prompt cannot be used, or too many pictures are held out.
    """
    how = Cropping(
        config.resolution,
        unit_px,
        config.aspect_ratio_buckets,
        config.center_crop,
        config.image_interpolation_mode,
        config.random_flip,
        config.seed,
    )
    cache = Path(config.cache_dir) if config.cache_dir else None
    prompts: dict[str, int] = {}  # prompt -> its index

    def numbered(texts: Sequence[str]) -> tuple[int, ...]:
        return tuple(prompts.setdefault(text, len(prompts)) for text in texts)

    everything, prior = [], []
    for source in sources:
        encoded = encode_pictures(pipe.vae, source.pictures, how, cache)
        made = [
            Example(*latents, numbered(texts)) for latents, texts in zip(encoded, picture_prompts(source), strict=True)
        ]
        everything += [(example, source.concept.repeats) for example in made]
        if config.prior == "teacher":
            of_class = numbered(class_prompts(config, source.concept))
            prior += [example._replace(prompts=of_class) for example in made]
        elif config.prior == "images":
            encoded = encode_pictures(pipe.vae, source.class_pictures, how, cache)
            prior += [Example(*latents, numbered([source.concept.class_prompt])) for latents in encoded]
    out = _held_out(len(everything), config)
    prompts.setdefault("", len(prompts))
    if list(prompts).index("") != len(prompts) - 1:
        raise UserError("an empty prompt cannot be trained with; see caption_dropout")
    return Dataset(
        examples=[
            example for place, (example, repeats) in enumerate(everything) if place not in out for _ in range(repeats)
        ],
        held_out=[example for place, (example, _) in enumerate(everything) if place in out],
        prior=prior,
        prompts=list(prompts),
    )


def _held_out(pictures: int, config: TrainConfig) -> set[int]:
    if config.holdout_images >= pictures:
        raise UserError(f"holdout_images: {config.holdout_images} of {pictures} pictures leave none to learn from")
    order = torch.randperm(pictures, generator=generator(config.seed, "holdout", 0))
    return set(order[: config.holdout_images].tolist())

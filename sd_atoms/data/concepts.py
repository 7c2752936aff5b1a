"""From settings to the images of each concept and the prompts that they are shown with."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sd_atoms.data.checked import usable, with_masks
from sd_atoms.data.config import Concept, DataSettings
from sd_atoms.data.labelled import task_images
from sd_atoms.data.masks import EXPECTED, mask_files
from sd_atoms.data.prompts import fill, load_templates
from sd_atoms.data.records import ImageRecord, folder_images, table_images
from sd_atoms.data.shards import find_shards, shard_images
from sd_atoms.errors import UserError, first_lines
from sd_atoms.sources import packaged_path


@dataclass(frozen=True)
class Source:
    """A concept with its images, and those of its class where the prior is kept by images."""

    concept: Concept
    images: Sequence[ImageRecord]
    class_images: Sequence[ImageRecord] = ()


def find_images(data: DataSettings, concepts: Sequence[Concept], accelerator=None) -> tuple[list[Source], list[str]]:
    """The images of every concept, all of them read once to see that they can be, and what there is to say of them.

    The processes of `accelerator` share the reading; all must call it.

    Raises:
        UserError: a folder or data set cannot be used, or images in it cannot.
    """
    sources, notes, cache = [], [], Path(data.cache_dir) if data.cache_dir else None
    for concept in concepts:
        place, ignored = image_place(data, concept), ()
        if data.task is not None:
            columns = dict(image_column=data.image_column, label_column=data.label_column)
            found = task_images(data.task, data.dataset_dir, data.dataset_split, **columns)
            if data.max_train_samples is not None and data.max_train_samples < len(found):
                # spread over the whole, which may be in the order of the classes
                found = [found[n * len(found) // data.max_train_samples] for n in range(data.max_train_samples)]
        elif data.dataset_name:
            found = table_images(
                data.dataset_name,
                config=data.dataset_config_name,
                split=data.dataset_split,
                image_column=data.image_column,
                caption_column=data.caption_column,
                most=data.max_train_samples,
            )
        elif shards := find_shards(place):
            found = shard_images(shards, data.captions, masks=data.masks)
        else:
            folder = Path(packaged_path(place) or place)
            found, ignored = folder_images(folder, data.captions, data.masks)
            if not data.masks and (unused := len(mask_files(folder))):
                notes.append(f"Not used in {place}: masks ({unused}); set masks to learn the subject alone")
            if data.captions and found[0].caption is None:
                raise UserError(
                    f"captions: {place} holds neither NAME.txt or NAME.caption files of its pictures nor "
                    "metadata.jsonl"
                )
        found, left_out = usable(found, data.on_bad_image, accelerator, cache)
        if data.masks:
            found = with_masks(found, accelerator)
        notes += [f"Ignored in {place}: {note}" for note in ignored] + [
            f"Skipped: {note}" for note in first_lines(left_out)
        ]
        sources.append(Source(concept, found))
    if data.masks and not any(image.mask for source in sources for image in source.images):
        places = ", ".join(dict.fromkeys(image_place(data, concept) for concept in concepts))
        raise UserError(f"masks: {places} holds none; expected {EXPECTED} for its pictures, or transparent pictures")
    return sources, notes


def image_place(data: DataSettings, concept: Concept) -> str:
    """What messages call the folder or data set of a concept."""
    return data.dataset_name or concept.instance_data_dir


def concept_prompts(concept: Concept) -> list[str]:
    """The prompts that a concept's images are shown with, if they have none of their own."""
    if concept.instance_prompts_file is None:
        return [concept.instance_prompt]
    return [fill(template, concept.word) for template in load_templates(concept.instance_prompts_file)]


def image_prompts(source: Source) -> list[list[str]]:
    """The prompts of each image: its caption, with {} filled in, or those of the concept.

    Raises:
        UserError: a placeholder token is in no caption, so that its row could not be learned.
    """
    usual = concept_prompts(source.concept)
    prompts = [
        usual if image.caption is None else [fill(image.caption, source.concept.word)] for image in source.images
    ]
    unused = [token for token in source.concept.tokens if not any(token in text for own in prompts for text in own)]
    if unused:
        raise UserError(
            f"captions: none of {len(prompts)} contains the placeholder {' '.join(unused)}; write it, or {{}} in its "
            "place"
        )
    return prompts

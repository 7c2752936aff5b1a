"""Scores of the pictures of one run of an experiment, by several networks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from sd_atoms.data.checked import usable
from sd_atoms.data.records import ImageRecord, image_record
from sd_atoms.evaluation.folder import Draws, score_images
from sd_atoms.evaluation.intervals import mean_figure
from sd_atoms.evaluation.networks import Network, features_of, text_features
from sd_atoms.evaluation.surroundings import NAME, surroundings

RESIZE = "antialiased"
DRAWS = Draws()


@dataclass(frozen=True)
class Drawn:
    """What a run drew.

    images: files. prompts: of each, the known word in the place of the new one. unrelated, unrelated_base: files of
    prompts about other things, by the adapter and by the base, in the same order; both may be empty.
    """

    images: Sequence[Path]
    prompts: Sequence[str]
    unrelated: Sequence[Path] = ()
    unrelated_base: Sequence[Path] = ()


def score_run(
    networks: Sequence[Network],
    drawn: Drawn,
    photos: Sequence[ImageRecord],
    groups: Sequence[str],
    cache: Path,
    accelerator=None,
) -> dict[str, dict[str, Any]]:
    """network -> {"figures": name -> Figure as a dict, "notes", "by_image": name -> a value per image}.

    Args:
        networks: what makes features.
        drawn: the pictures.
        photos: of the subject, checked; with masks where groups have surroundings.
        groups: of `folder.MORE_GROUPS`.
        cache: folder of features, by content.
        accelerator: its processes share the work; all must call.
    """

    def checked(paths: Sequence[Path]) -> list[ImageRecord]:
        return usable([image_record(path) for path in paths], "error", accelerator, cache)[0]

    def of(network: Network, paths: Sequence[Path]) -> torch.Tensor:
        return features_of(network, checked(paths), RESIZE, cache, accelerator)

    found = {}
    for network in networks:
        features, reference = of(network, drawn.images), features_of(network, photos, RESIZE, cache, accelerator)
        texts, cut = text_features(network, drawn.prompts)
        scores = score_images(features, reference, drawn.prompts, texts, groups, DRAWS)
        figures = {name: figure.entries() for name, figure in scores.figures.items()}
        by_image = per_image(features, reference, drawn.prompts, texts)
        if drawn.unrelated:
            ours, bases = (F.normalize(of(network, paths), dim=1) for paths in (drawn.unrelated, drawn.unrelated_base))
            apart = (ours - bases).double().square().sum(1) / 4  # (1 − cosine) / 2 of unit vectors
            figures["drift"] = mean_figure(apart, DRAWS.number, DRAWS.seed).entries()
        if NAME in groups:
            alike = surroundings(network, checked(drawn.images), photos, RESIZE, accelerator)
            figures[NAME] = mean_figure(alike, DRAWS.number, DRAWS.seed).entries()
            by_image[NAME] = [round(value, 6) for value in alike.tolist()]
        notes = [*scores.notes, *(f"text: {len(cut)} prompts were cut, such as {prompt!r}" for prompt in cut[:1])]
        found[network.name] = {"figures": figures, "notes": notes, "by_image": by_image}
    return found


def per_image(
    features: torch.Tensor, reference: torch.Tensor, prompts: Sequence[str], texts: Mapping[str, torch.Tensor]
) -> dict[str, list[float]]:
    """What pairs are made of: "image", the mean cosine of each image (N, d) to the photos (M, d), and, where the
    network knows texts, "text", its cosine to its own prompt."""
    unit = F.normalize(features, dim=1)
    values = {"image": (unit @ F.normalize(reference, dim=1).mean(0)).tolist()}
    if texts:
        own = F.normalize(torch.stack([texts[prompt] for prompt in prompts]), dim=1)
        values["text"] = (unit * own).sum(1).tolist()
    return {name: [round(value, 6) for value in of_images] for name, of_images in values.items()}

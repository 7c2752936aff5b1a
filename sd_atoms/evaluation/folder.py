"""What there is to say of a folder of images: likeness, copying, diversity, text, distance from a reference."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch.nn import functional as F

from sd_atoms.evaluation import sets
from sd_atoms.evaluation.intervals import Figure, counts, drawn_figure, figure, mean_figure
from sd_atoms.evaluation.metrics import diversity, nearest, nearest_other, vendi, weighted_diversity

FEW_FOR_FID = 2048  # below, the figure follows the number of images more than what they show
FID_DRAWS = 25  # of the bootstrap at most: each takes as long as all draws of another figure
NEAREST_K = 5
SAME = 1e-5  # from 1: the cosine of an image to itself, but for rounding
SETS = ("fid", "kid", "mifid", "cmmd", "prdc", "fd_infinity")
GROUPS = ("subject", "copying", "diversity", "text", *SETS)
MORE_GROUPS = (*GROUPS, "surroundings")  # needs masks of the reference


@dataclass
class Scores:
    """Figures by name, and what a reader has to know of them."""

    figures: dict[str, Figure] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Draws:
    """How intervals are made."""

    number: int = 100
    seed: int = 0


def score_images(
    features: torch.Tensor,
    reference: torch.Tensor | None,
    prompts: Sequence[str] | None,
    text_features: Mapping[str, torch.Tensor] | None,
    groups: Sequence[str],
    draws: Draws,
) -> Scores:
    """All figures of some groups that these images allow; what they do not allow is a note.

    Args:
        features: of the images, (N, d).
        reference: of the real images, (M, d); None leaves out subject, copying and all set metrics.
        prompts: of each image, where known; diversity is told by prompt too.
        text_features: prompt -> its features (d,); None leaves out text.
        groups: of GROUPS.
        draws: of the bootstrap.
    """
    found, unit = Scores(), F.normalize(features, dim=1)
    unit_reference = None if reference is None else F.normalize(reference, dim=1)
    if "diversity" in groups:
        _diversity(found, unit, prompts, draws)
    if "text" in groups and text_features:
        _text(found, unit, prompts, text_features, draws)
    if reference is None:
        return found
    if "subject" in groups:
        found.figures["image"] = mean_figure(unit @ unit_reference.mean(0), draws.number, draws.seed)
        if len(reference) > 1:
            found.figures["image_real"] = Figure(1 - diversity(unit_reference), len(reference))
    if "copying" in groups:
        _copying(found, unit, unit_reference, draws)
    for name in SETS:
        if name in groups:
            try:
                _SETS[name](found, features, reference, draws)
            except ValueError as error:
                found.notes.append(f"{name}: {error}")
    if len(features) < FEW_FOR_FID and any(name.startswith(("fid", "fd", "mifid")) for name in found.figures):
        found.notes.append(
            f"fid: {len(features)} images are few; below {FEW_FOR_FID:,} it follows their number more than what they "
            "show. Go by kid and cmmd, and compare sets of one size"
        )
    return found


def _diversity(found: Scores, unit: torch.Tensor, prompts: Sequence[str] | None, draws: Draws) -> None:
    if len(unit) < 2:
        found.notes.append("diversity: 2 images are needed")
        return
    drawn = weighted_diversity(unit, counts(len(unit), draws.number, draws.seed))
    found.figures["diversity"] = figure(diversity(unit), len(unit), drawn)
    found.figures["vendi"] = drawn_figure(lambda numbers: vendi(unit[numbers]), len(unit), draws.number, draws.seed)
    places = {}
    for place, prompt in enumerate(prompts or ()):
        places.setdefault(prompt, []).append(place)
    several = [diversity(unit[own]) for own in places.values() if len(own) > 1]
    if len(places) > 1 and several:
        found.figures["diversity_per_prompt"] = mean_figure(torch.tensor(several), draws.number, draws.seed)


def _text(found: Scores, unit: torch.Tensor, prompts, text_features: Mapping[str, torch.Tensor], draws: Draws) -> None:
    names = list(text_features)
    texts = F.normalize(torch.stack([text_features[name] for name in names]), dim=1)
    own = torch.tensor([names.index(prompt) for prompt in prompts])
    cosines = unit @ texts.T  # (N, P)
    of_own = cosines[torch.arange(len(own)), own]
    found.figures["text"] = mean_figure(of_own, draws.number, draws.seed)
    if len(names) > 1:
        found.figures["match"] = mean_figure(cosines.argmax(1).eq(own), draws.number, draws.seed)


def _copying(found: Scores, unit: torch.Tensor, reference: torch.Tensor, draws: Draws) -> None:
    if len(reference) < 2:
        found.notes.append("copying: 2 reference images are needed")
        return
    close, real = nearest(unit, reference), nearest_other(reference)
    distinct = real[real < 1 - SAME]
    if len(distinct) < len(real):
        found.notes.append(f"copying: {len(real) - len(distinct)} of {len(real)} reference images are there twice")
    found.figures["nearest"] = mean_figure(close, draws.number, draws.seed)
    found.figures["nearest_real"] = mean_figure(real, draws.number, draws.seed)
    if len(distinct):
        found.figures["copies"] = mean_figure(close > distinct.max(), draws.number, draws.seed)


def _fid(found: Scores, features: torch.Tensor, reference: torch.Tensor, draws: Draws) -> None:
    value, against = sets.fid(reference, features), sets.Frechet(reference)
    drawn = drawn_figure(
        lambda numbers: against.distance(features[numbers]), len(features), min(draws.number, FID_DRAWS), draws.seed
    )
    found.figures["fid"] = replace(drawn, value=value)


def _mifid(found: Scores, features: torch.Tensor, reference: torch.Tensor, draws: Draws) -> None:
    found.figures["mifid"] = Figure(sets.mifid(reference, features), len(features))


def _fd_infinity(found: Scores, features: torch.Tensor, reference: torch.Tensor, draws: Draws) -> None:
    found.figures["fd_infinity"] = Figure(sets.fd_infinity(reference, features, draws.seed), len(features))


def _kid(found: Scores, features: torch.Tensor, reference: torch.Tensor, draws: Draws) -> None:
    mean, deviation = sets.kid(reference, features, draws.seed)
    # subsets of the set's own size are all alike, so their deviation is that of a smaller sample
    size = min(sets.KID_SUBSET_SIZE, len(features), len(reference))
    if size < min(len(features), len(reference)):
        apart = 1.96 * deviation * (size / min(len(features), len(reference))) ** 0.5
        found.figures["kid"] = Figure(mean, len(features), mean - apart, mean + apart)
        return
    # so the images are drawn, from both sets
    weights = counts(len(reference), draws.number, draws.seed), counts(len(features), draws.number, draws.seed + 1)
    found.figures["kid"] = figure(mean, len(features), sets.kid_of_draws(reference, features, weights))


def _cmmd(found: Scores, features: torch.Tensor, reference: torch.Tensor, draws: Draws) -> None:
    real, made = F.normalize(reference, dim=1), F.normalize(features, dim=1)
    weights = counts(len(real), draws.number, draws.seed), counts(len(made), draws.number, draws.seed + 1)
    values, drawn = sets.cmmd(real, made), sets.cmmd(real, made, weights)
    for name, value, own in zip(("cmmd_biased", "cmmd"), values, drawn, strict=True):
        found.figures[name] = figure(value.item(), len(made), own)


def _prdc(found: Scores, features: torch.Tensor, reference: torch.Tensor, draws: Draws) -> None:
    shares = sets.neighbours(reference, features, NEAREST_K)
    for name, values in zip(("precision", "density", "recall", "coverage"), shares, strict=True):
        found.figures[name] = mean_figure(values, draws.number, draws.seed)


_SETS = {"fid": _fid, "kid": _kid, "mifid": _mifid, "cmmd": _cmmd, "prdc": _prdc, "fd_infinity": _fd_infinity}

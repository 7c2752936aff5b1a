"""Scores of a learned concept beside those of its base."""

from collections.abc import Mapping, Sequence

from PIL import Image

from sd_atoms.evaluation.clip import ClipFeatures
from sd_atoms.evaluation.metrics import diversity, match_share, mean_cosine, paired_cosine


def score_concept(
    scorer: ClipFeatures, photos: Sequence[Image.Image], images: Mapping[str, Sequence[Image.Image]], texts: list[str]
) -> dict[str, dict[str, float]]:
    """CLIP scores of the adapter beside the base's, on the same prompts and seeds.

    image: mean cosine of instance pictures and photos. diversity: mean 1 − cosine between instance pictures.
    text: mean cosine of each template picture and its prompt, with the initializer for the concept, since the judge
    does not know the new word. match: share of template pictures whose best prompt of all is their own, of
    two or more.
    """
    photo_features = scorer.of_images(photos)
    scores = {}
    for who, prefix in (("adapted", ""), ("base", "base-")):
        features = scorer.of_images(images[f"{prefix}instance"])
        scores[who] = {"image": mean_cosine(features, photo_features)}
        if len(features) > 1:
            scores[who]["diversity"] = diversity(features)
        if texts:
            features, text_features = scorer.of_images(images[f"{prefix}prompt"]), scorer.of_texts(texts)
            scores[who]["text"] = paired_cosine(features, text_features)
            if len(texts) > 1:  # of a single one it says nothing
                scores[who]["match"] = match_share(features, text_features)
    return {who: {key: round(value, 4) for key, value in values.items()} for who, values in scores.items()}


def mean_scores(scores: Sequence[dict]) -> dict[str, dict[str, float]]:
    """Scores of several concepts as those of one."""
    return {
        who: {key: round(sum(own[who][key] for own in scores) / len(scores), 4) for key in scores[0][who]}
        for who in scores[0]
    }

"""What an adapter does to pictures that it should leave alone."""

from collections.abc import Sequence

from sd_atoms.evaluation.clip import ClipFeatures
from sd_atoms.evaluation.metrics import drift
from sd_atoms.generation import Request, Sampling, generate


def drift_by_prompt(
    pipe, prompts: Sequence[str], seeds: Sequence[int], sampling: Sampling, features: ClipFeatures, accelerator=None
) -> list[float]:
    """Draws every prompt and seed with all adapters of a pipeline off and on, and compares the two pictures of each.

    Both pictures of a pair come from the same noise, so an adapter that changes nothing has a drift of 0.

    Args:
        pipe: a pipeline with its adapters on, as they are on return.
        prompts: what to draw, about other things than the adapter was trained for.
        seeds: of the pictures of each prompt.
        sampling: how they are drawn.
        features: what compares them.
        accelerator: with several processes they share the drawing, and all must call.

    Returns:
        `metrics.drift` of each prompt over the seeds; on processes other than the main one an empty list.
    """
    requests = [Request(prompt, seed, "") for prompt in prompts for seed in seeds]
    pipe.disable_lora()
    try:
        base = [image for _, image in generate(pipe, requests, sampling, accelerator)]
    finally:
        pipe.enable_lora()
    adapted = [image for _, image in generate(pipe, requests, sampling, accelerator)]
    if not adapted:
        return []
    of_base, of_adapted = (features.of_images(images).split(len(seeds)) for images in (base, adapted))
    return [drift(ours, theirs) for ours, theirs in zip(of_adapted, of_base, strict=True)]

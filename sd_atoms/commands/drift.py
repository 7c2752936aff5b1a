"""Measures how far an adapter moves pictures of other things."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sd_atoms.data.prompts import check_lengths, load_prompts, parse_seeds
from sd_atoms.evaluation.clip import ClipFeatures
from sd_atoms.evaluation.metrics import drift
from sd_atoms.files import check_outputs, write_json
from sd_atoms.generation import Request, generate
from sd_atoms.machine import make_accelerator, on_main
from sd_atoms.methods.adapters import adapters_off
from sd_atoms.pipeline import load_adapter, open_base
from sd_atoms.pipeline.header import find_base, find_base_config, parse_header
from sd_atoms.pipeline.sampling import Sampling
from sd_atoms.pipeline.sizes import check_drawn_size
from sd_atoms.report.table import text_table
from sd_atoms.settings import setting
from sd_atoms.sources import public_name
from sd_atoms.training.adapter import open_adapter

MODEL, WHAT, RESULT = "model", "what to draw", "result"


@dataclass(frozen=True)
class Settings:
    """Settings of `sd-atoms drift`. How pictures are drawn comes from the adapter's own header."""

    adapter: str = setting(
        None, MODEL, "run or adapter folder, one .safetensors file, a run's checkpoint, or hub id", required=True
    )
    pretrained_model_name_or_path: str | None = setting(
        None, MODEL, "the base; none = the one it was trained on", aliases=["base"]
    )
    base_config: str | None = setting(
        None, MODEL, "of a base in one file: a folder or hub id with its configs; none = as the adapter's run says"
    )
    clip_model_name_or_path: str = setting(
        None, MODEL, "CLIP that compares: pocket:clip, a folder or a hub id", required=True
    )

    prompts: str = setting(
        None, WHAT, "text file, one prompt per line, about other things than the adapter", required=True, file=True
    )
    seeds: str = setting("0-3", WHAT, "such as 0-3,7: two pictures per prompt and seed, without and with the adapter")

    json: str | None = setting(None, RESULT, "also write all numbers to this file")
    overwrite: bool = setting(False, RESULT, "replace that file where it exists")


def run(settings: Settings) -> None:
    """Prints the drift of every prompt, and writes the file asked for.

    Raises:
        UserError: something in the settings is wrong, or the file cannot be written.
    """
    accelerator = make_accelerator()
    on_main(accelerator, lambda: check_outputs(settings.overwrite, json=settings.json))
    result = measure_drift(settings, accelerator)
    accelerator.print(drift_text(result))
    if settings.json:
        on_main(accelerator, lambda: write_json(settings.json, result))
    accelerator.end_training()


def measure_drift(settings: Settings, accelerator) -> dict[str, Any]:
    """Draws unrelated prompts without and with an adapter, and measures how far apart the images are.

    Returns:
        `drift`, the mean of (1 − cosine)/2 over all pairs of pictures, 0 if the adapter changes none; `per_prompt`,
        the same by prompt, in the order of the file; and the settings: `adapter`, its `adapter_digest`, `base`,
        `clip`, `prompts_file`, `seeds`, `sampling`.

    Raises:
        UserError: a file, the seeds, the adapter, its base or the CLIP cannot be used.
    """
    adapter, base, base_config = settings.adapter, settings.pretrained_model_name_or_path, settings.base_config
    prompts, numbers = list(dict.fromkeys(load_prompts(settings.prompts))), parse_seeds(settings.seeds)
    artefact = open_adapter(adapter, base, base_config)
    header = parse_header(adapter, artefact.about)
    base, sampling = find_base(base, adapter, header), header.sampling
    features = ClipFeatures(settings.clip_model_name_or_path, accelerator.device)
    pipe = open_base(base, base_config=find_base_config(base_config, adapter, base), device=accelerator.device)
    check_drawn_size(pipe, sampling.resolution)
    load_adapter(pipe, artefact)
    check_lengths(pipe.tokenizer, prompts)
    values = drift_by_prompt(pipe, prompts, numbers, sampling, features, accelerator)
    values = on_main(accelerator, lambda: values)
    return {
        "drift": sum(values) / len(values),
        "per_prompt": dict(zip(prompts, values, strict=True)),
        "adapter": adapter,
        "adapter_digest": artefact.digest(),
        "base": public_name(base),
        "clip": settings.clip_model_name_or_path,
        "prompts_file": settings.prompts,
        "seeds": numbers,
        "sampling": asdict(sampling),
    }


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
    with adapters_off(pipe.unet, pipe.text_encoder):
        base = [image for _, image in generate(pipe, requests, sampling, accelerator)]
    adapted = [image for _, image in generate(pipe, requests, sampling, accelerator)]
    if not adapted:
        return []
    of_base, of_adapted = (features.of_images(images).split(len(seeds)) for images in (base, adapted))
    return [drift(ours, theirs) for ours, theirs in zip(of_adapted, of_base, strict=True)]


def drift_text(result: Mapping[str, Any]) -> str:
    """What `measure_drift` found, as text, the prompt that moved most first."""
    ranked = sorted(result["per_prompt"].items(), key=lambda entry: -entry[1])
    rows = [[prompt, f"{value:.4f}"] for prompt, value in ranked]
    return "\n".join(
        [
            text_table(["prompt", "drift"], [*rows, ["mean", f"{result['drift']:.4f}"]]),
            "",
            "drift: mean (1 − cosine)/2 between pictures without and with the adapter, of the same prompt and seed;",
            f"0 = it leaves them as they were. Seeds per prompt: {len(result['seeds'])}. Judge: {result['clip']}.",
        ]
    )

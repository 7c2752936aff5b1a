"""The pictures of a run of an experiment, and their scores."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sd_atoms.data.concepts import find_images
from sd_atoms.data.prompts import fill
from sd_atoms.evaluation.networks import Network, open_network
from sd_atoms.evaluation.run import RESIZE, Drawn, score_run
from sd_atoms.evaluation.surroundings import NAME as SURROUNDINGS
from sd_atoms.evaluation.surroundings import subject_places
from sd_atoms.generation import Request, generate_missing, making_notes
from sd_atoms.jobs.plan import PRETRAINED, Plan, Run, Runs
from sd_atoms.jobs.results import DRAWN
from sd_atoms.methods.adapters import set_adapters
from sd_atoms.pipeline import load_adapter, read_artefact
from sd_atoms.pipeline.fingerprint import weights_digest
from sd_atoms.pipeline.sampling import Sampling
from sd_atoms.pipeline.sizes import training_resolution_px
from sd_atoms.sources import public_name
from sd_atoms.training.base import open_base_of
from sd_atoms.training.config import TrainConfig
from sd_atoms.training.run_folder import ADAPTER

CACHE = "cache"
SEEDS_APART = 1000  # picture j of prompt n has seed SEEDS_APART * j + n: no two pictures of a run share their noise


@dataclass(frozen=True)
class Pictures:
    """What a run drew: the requests of its prompts and of prompts about other things, how, and by which weights.

    labels: of the requests on an image set, None where the prompt names no class.
    """

    requests: Sequence[Request]
    sampling: Sampling
    base_digests: dict[str, str]
    others: Sequence[Request] = ()
    labels: Sequence[int] | None = None


def open_for_drawing(
    plan: Runs, run: Run, config: TrainConfig, device
) -> tuple[Any, Sampling, dict[str, str], dict[str, str]]:
    """The pipeline that a run draws with, how it does, the notes of its pictures, and the digests of the base.

    Raises:
        UserError: the base cannot be opened, or the adapter does not fit.
    """
    base = config.base.pretrained_model_name_or_path
    pipe = open_base_of(config.base, device)
    digests = {part: weights_digest(getattr(pipe, part)).hex() for part in ("unet", "vae", "text_encoder")}
    sampling = replace(config.images.sampling, resolution=training_resolution_px(pipe, config.data.resolution))
    if run.stage == PRETRAINED:
        return pipe, sampling, making_notes("none", base), digests
    artefact = read_artefact(str(plan.run_folder(run) / ADAPTER))
    load_adapter(pipe, artefact)
    return pipe, sampling, making_notes(run.name, base) | {"adapter_digest": artefact.digest()}, digests


def run_entry(
    plan: Runs, run: Run, config: TrainConfig, pictures: Pictures, networks: Sequence[Network], more: dict[str, Any]
) -> dict[str, Any]:
    """What scores.json says of a run besides its scores; `more` of what it was scored by."""
    return {
        "name": run.name,
        "stage": run.stage,
        "concept": run.concept,
        "method": run.method,
        "seed": run.seed,
        "learning_rate": None if run.stage == PRETRAINED else config.optimiser.learning_rate,
        "scored_by": {
            "base": public_name(config.base.pretrained_model_name_or_path),
            "base_digests": pictures.base_digests,
            **plan.drawn_by(run),
            **more,
            "sampling": vars(pictures.sampling),
            "resize": RESIZE,
            "metrics": plan.metrics,
            "networks": {network.name: network.digest for network in networks},
        },
    }


def draw_run(plan: Plan, run: Run, config: TrainConfig, accelerator) -> Pictures:
    """Draws what the run's folder lacks: every prompt, prompts about other things, and some prompts at all strengths.

    Raises:
        UserError: pictures of these names were made otherwise, or the adapter does not fit.
    """
    folder, concept = plan.run_folder(run) / DRAWN, config.all_concepts[0]
    pipe, sampling, notes, digests = open_for_drawing(plan, run, config, accelerator.device)
    word = concept.plain_word if run.stage == PRETRAINED else concept.word
    requests = image_requests(plan.templates(run), word, plan.experiment.images_per_prompt)
    unrelated = plan.drawn_by(run)["unrelated"]
    others = [Request(prompt, number, f"unrelated-{number:02d}") for number, prompt in enumerate(unrelated)]

    def draw(wanted: Sequence[Request], strength: float) -> None:
        own = notes if strength == 1 else notes | {"adapter_scale": f"{strength:g}"}
        if run.stage != PRETRAINED:
            for part in (pipe.unet, pipe.text_encoder):
                set_adapters(part, ["default"], [strength])
        generate_missing(
            pipe, accelerator, wanted, sampling, folder, own, batch_size=config.images.generation_batch_size
        )

    if run.stage == "scored" and hasattr(pipe.unet, "peft_config") and config.method.chosen().linear:
        first = {f"{number:02d}-0" for number in plan.shown_prompts[: plan.experiment.scale_prompts]}
        for scale in plan.scales:
            if scale != 1:  # 1 is what all prompts are drawn at
                few = [request for request in requests if request.name in first]
                draw([replace(request, name=f"scale-{scale:g}-{request.name}") for request in few], scale)
    draw([*requests, *others], 1.0)
    return Pictures(requests, sampling, digests, others)


def check_surroundings(plan: Plan) -> None:
    """Looks, before anything is trained, whether the photos of every concept have masks, where these score.

    Raises:
        UserError: a photo has none, or they cannot be used.
    """
    if SURROUNDINGS not in plan.metrics:
        return
    for name in plan.concepts:
        config = plan.config(next(run for run in plan.runs if run.concept == name))
        (source,), _ = find_images(replace(config.data, masks=True), [config.all_concepts[0]])
        subject_places(source.images)


def score_drawn(plan: Plan, run: Run, config: TrainConfig, pictures: Pictures, accelerator) -> dict[str, Any]:
    """What scores.json holds: who made the pictures, by what they are scored, and the scores.

    Raises:
        UserError: a network cannot be opened, or a picture not be read.
    """
    folder, concept = plan.run_folder(run) / DRAWN, config.all_concepts[0]
    data = replace(config.data, masks=config.data.masks or SURROUNDINGS in plan.metrics)
    (source,), _ = find_images(data, [concept], accelerator)
    networks = [open_network(name, accelerator.device, RESIZE) for name in plan.networks]
    plain = image_requests(plan.templates(run), concept.plain_word, plan.experiment.images_per_prompt)
    bases = (
        plan.run_folder(plan.named(f"{run.name.split('/')[0]}/{PRETRAINED}")) / DRAWN if pictures.others else folder
    )

    def files(requests: Sequence[Request], where: Path) -> list[Path]:
        return [where / f"{request.name}.png" for request in requests]

    drawn = Drawn(
        images=files(pictures.requests, folder),
        prompts=[request.prompt for request in plain],
        unrelated=files(pictures.others, folder),
        unrelated_base=files(pictures.others, bases),
    )
    found = score_run(networks, drawn, source.images, plan.metrics, plan.folder / CACHE, accelerator)
    photos = {"photos": [image.digest() for image in source.images]}
    return run_entry(plan, run, config, pictures, networks, photos) | {"networks": found}


def image_requests(templates: Sequence[str], word: str, images_per_prompt: int) -> list[Request]:
    """The pictures of a run, prompt by prompt: "03-1" is the second one of the fourth template."""
    return [
        Request(fill(template, word), SEEDS_APART * picture + number, f"{number:02d}-{picture}")
        for number, template in enumerate(templates)
        for picture in range(images_per_prompt)
    ]

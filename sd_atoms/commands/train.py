"""Teaches Stable Diffusion a concept from a few pictures by training only filter atoms."""

import dataclasses
import shlex
from collections.abc import Sequence
from functools import partial
from itertools import cycle, islice
from pathlib import Path

import torch
from accelerate.utils import set_seed

from sd_atoms.commands.share import write_share_folder
from sd_atoms.commands.sheet import Settings as SheetSettings
from sd_atoms.commands.sheet import make_sheet
from sd_atoms.data.checked import usable
from sd_atoms.data.concepts import Source, find_images, image_prompts
from sd_atoms.data.config import Concept
from sd_atoms.data.images import fit
from sd_atoms.data.prompts import fill, load_templates
from sd_atoms.data.records import image_record
from sd_atoms.doctor import preflight
from sd_atoms.errors import UserError
from sd_atoms.evaluation.clip import ClipFeatures
from sd_atoms.evaluation.concept import mean_scores, score_concept
from sd_atoms.files import replacing, write_json
from sd_atoms.generation import Request, generate, generate_missing, making_notes, read_images, save_image
from sd_atoms.machine import on_main, peak_bytes
from sd_atoms.methods.adapters import adapters_off
from sd_atoms.pipeline import save_adapter
from sd_atoms.pipeline.hub import check_repo_id, own_repo_id, push, who_may_push
from sd_atoms.pipeline.sampling import Sampling, check_sampler
from sd_atoms.pipeline.sizes import training_resolution_px, training_unit_px
from sd_atoms.pipeline.tokens import check_new_token
from sd_atoms.report.grid import image_grid
from sd_atoms.report.run import concept_grid, learning_curve, summary_text
from sd_atoms.settings import replaced
from sd_atoms.training.adapter import header
from sd_atoms.training.base import open_base_of
from sd_atoms.training.class_images import class_image_paths
from sd_atoms.training.config import TrainConfig
from sd_atoms.training.dataset import class_prompts, data_digests, make_dataset
from sd_atoms.training.diffusion import Outcome, add_adapters, sized, train_diffusion
from sd_atoms.training.examples import Cropping
from sd_atoms.training.latents import remove_scratch
from sd_atoms.training.objective import noising
from sd_atoms.training.optimiser import with_defaults
from sd_atoms.training.run_folder import (
    ADAPTER,
    CURVES,
    IMAGES,
    LATENTS,
    LOG,
    METRICS,
    begin,
    check_data,
    check_names,
    check_output,
    concept_name,
    prepare,
    read_log,
    run_name,
)
from sd_atoms.training.sections import HubSettings, ImageSettings, OutputSettings
from sd_atoms.training.tracking import track_images, trackers_of

Settings = TrainConfig
MOST_SCORED = 100  # training images that scores and the grid compare with


def run(config: TrainConfig) -> Path:
    """Trains, saves, draws and scores; returns the run folder.

    Raises:
        UserError: something in the settings or the data is wrong; found before anything is written.
        Interrupted: Ctrl-C or SIGTERM; a checkpoint is on disk.
    """
    # Everything that can be wrong, before anything is written
    config = with_defaults(config)
    folder, name = Path(config.output.output_dir), run_name(config)
    base, concepts, seed = config.base.pretrained_model_name_or_path, config.all_concepts, config.loop.seed
    check_names([concept_name(concept, folder) for concept in concepts])
    config, accelerator, notes = prepare(config)
    on_main(accelerator, lambda: check_output(config))
    if config.hub.push_to_hub:
        on_main(accelerator, lambda: check_hub(config.hub, folder))
    sources, found = find_images(config.data, concepts, accelerator)
    notes += found
    templates = load_templates(config.images.prompts_file) if config.images.prompts_file else []
    for source in sources:
        image_prompts(source)
        if config.prior.prior == "teacher":
            class_prompts(config.prior, source.concept)
    scorer = ClipFeatures(config.images.clip_model_name_or_path) if config.images.clip_model_name_or_path else None
    torch.backends.cuda.matmul.allow_tf32 = config.precision.allow_tf32
    set_seed(seed)
    pipe = open_base_of(config.base, accelerator.device)
    config = replaced(config, resolution=training_resolution_px(pipe, config.data.resolution))
    if config.method.budget is not None:
        config = sized(config, pipe.unet)
        notes.append(f"budget: {config.method.given()} of method {config.method.method}")
    noising(pipe.scheduler, config.objective.prediction_type, config.objective.rescale_betas_zero_snr)
    check_sampler(config.images.scheduler, pipe.scheduler, {}, config.images.num_inference_steps)
    for token in config.tokens:
        check_new_token(pipe, token, config.tokens)
    notes += on_main(accelerator, lambda: preflight(config, sources, pipe, accelerator.num_processes))
    sampling = dataclasses.replace(config.images.sampling, resolution=config.data.resolution)
    if config.prior.prior == "images":
        sources = [with_class_images(config, pipe, accelerator, source, sampling) for source in sources]
    notes += on_main(accelerator, lambda: check_data(config.output, data_digests(sources, config.prior)))
    add_adapters(pipe, config)
    how = Cropping(config.data, config.data.resolution, training_unit_px(pipe), seed)
    scratch = folder / LATENTS
    dataset = make_dataset(
        pipe.vae, sources, how, config.prior, config.validation.holdout_images, scratch, accelerator
    )

    # Train
    def show(step: int):
        show_validation(config.validation.validation_prompt, config.validation.num_validation_images, pipe,
                        accelerator, sampling, folder / IMAGES, step)  # fmt: skip

    ready = partial(begin, config, accelerator, notes)
    outcome = train_diffusion(config, pipe, accelerator, dataset, folder, ready, show)
    memory = peak_bytes(accelerator.device.type)
    if accelerator.is_main_process:
        remove_scratch(scratch)

    # Save
    about = header(
        config,
        pictures=sum(len(source.images) for source in sources),
        steps=outcome.steps,
        pictures_per_step=config.loop.train_batch_size
        * config.loop.gradient_accumulation_steps
        * accelerator.num_processes,
    ).entries()
    if accelerator.is_main_process:
        for place in (folder / ADAPTER, folder / f"{name}.safetensors"):
            save_adapter(pipe, place, tokens=outcome.rows or config.tokens, about=about)

    # Draw
    plain = config.data.task.prompts if config.data.task is not None else None
    sets = [image_sets(config.images, config.output, concepts, concept, templates, plain) for concept in concepts]
    anew = config.output.resume_from_checkpoint is not None  # a run that went on draws otherwise than before
    requests = [request for own in sets for kind in ("instance", "prompt") for request in own[kind]]
    adapter_notes = making_notes(f"{name}.safetensors", base)
    together = config.images.generation_batch_size
    generate_missing(pipe, accelerator, requests, sampling, folder / IMAGES, adapter_notes, anew, together)
    requests = [request for own in sets for kind in ("base-instance", "base-prompt") for request in own[kind]]
    with adapters_off(pipe.unet, pipe.text_encoder):
        base_notes = making_notes("none", base)
        generate_missing(pipe, accelerator, requests, sampling, folder / IMAGES, base_notes, anew, together)

    # Report
    if accelerator.is_main_process:
        report(config, folder, sources, sets, scorer, outcome, memory)
    if config.images.contact_sheet:
        make_sheet(SheetSettings(run=str(folder), overwrite=anew), accelerator)
    accelerator.end_training()
    return folder


def report(
    config: TrainConfig,
    folder: Path,
    sources: Sequence[Source],
    sets: Sequence[dict[str, list[Request]]],
    scorer: ClipFeatures | None,
    outcome: Outcome,
    peak_memory_bytes: int,
) -> None:
    """Grids, scores, metrics.json and a summary, from the images in a run folder."""
    scores, grids = {}, []
    for source, own in zip(sources, sets, strict=True):
        photos = [
            fit(image.read(), config.data.resolution, center_crop=True, resample="lanczos", rng=None)
            for image in source.images[:MOST_SCORED]
        ]
        images = {kind: read_images(folder / IMAGES, requests) for kind, requests in own.items()}
        prompts = {kind: [request.prompt for request in requests] for kind, requests in own.items()}
        before = prefix(config.output, config.all_concepts, source.concept)
        grids.append(folder / IMAGES / f"{before}grid.png")
        with replacing(grids[-1]) as temporary:
            concept_grid(source.concept.placeholder_token, photos, images, prompts).save(temporary, format="PNG")
        if scorer is not None:
            name = concept_name(source.concept, folder)
            scores[name] = score_concept(scorer, photos, images, prompts["base-prompt"])
    cost = {"peak_memory_bytes": peak_memory_bytes}
    metrics = {"training": outcome.entries() | cost | learning_curve(read_log(folder / LOG))}
    if scores:
        metrics["clip"] = mean_scores(list(scores.values()))
        if len(scores) > 1:
            metrics["clip_by_concept"] = scores
    write_json(folder / METRICS, metrics)
    adapter = folder / f"{run_name(config)}.safetensors"
    print(summary_text(metrics, " ".join(config.tokens), adapter, grids[0], next_steps(config, adapter)))
    if config.hub.push_to_hub:
        repo_id = config.hub.hub_model_id or own_repo_id(folder)
        print(f"Shared at {push(write_share_folder(folder, repo_id), repo_id, config.hub.hub_private_repo)}")


def check_hub(hub: HubSettings, folder: Path) -> None:
    """Whether the adapter can be uploaded at the end: the id, the login and its rights.

    Raises:
        UserError: it cannot.
    """
    if hub.hub_model_id:
        check_repo_id(hub.hub_model_id)
    names = who_may_push()
    if names and hub.hub_model_id is None:
        own_repo_id(folder)
    elif names and hub.hub_model_id.split("/")[0] not in names:
        raise UserError(f"hub_model_id: {hub.hub_model_id!r} is not of those that are logged in: {', '.join(names)}")


def with_class_images(config: TrainConfig, pipe, accelerator, source: Source, sampling: Sampling) -> Source:
    """The same concept with images of its class, the missing ones drawn by the base."""
    paths = class_image_paths(
        pipe,
        accelerator,
        Path(source.concept.class_data_dir),
        source.concept.class_prompt,
        config.prior.num_class_images,
        sampling,
        config.loop.seed,
        config.base.pretrained_model_name_or_path,
        config.images.generation_batch_size,
    )
    cache = Path(config.data.cache_dir) if config.data.cache_dir else None
    images, _ = usable([image_record(path) for path in paths], "error", accelerator, cache)
    return dataclasses.replace(source, class_images=images)


def prefix(output: OutputSettings, concepts: Sequence[Concept], concept: Concept) -> str:
    """What the names of a concept's images begin with, where there are several concepts."""
    return f"{concept_name(concept, Path(output.output_dir))}-" if len(concepts) > 1 else ""


def image_sets(
    images: ImageSettings,
    output: OutputSettings,
    concepts: Sequence[Concept],
    concept: Concept,
    templates: Sequence[str],
    of_classes: Sequence[str] | None = None,
) -> dict[str, list[Request]]:
    """What is drawn at the end, by kind: the instance prompt and every template, with the adapter and by the base.

    The base does not know the new word and is asked for its initializer instead. Prompts of classes take turns in the
    place of the instance prompt.
    """

    def in_turn(prompt: str) -> list[str]:
        return list(islice(cycle(of_classes or [prompt]), images.num_instance_images))

    prompts = {
        "instance": in_turn(concept.instance_prompt),
        "prompt": [fill(template, concept.word) for template in templates],
        "base-instance": in_turn(concept.plain_prompt),
        "base-prompt": [fill(template, concept.plain_word) for template in templates],
    }
    before = prefix(output, concepts, concept)
    return {
        kind: [Request(prompt, seed, f"{before}{kind}-{seed:02d}") for seed, prompt in enumerate(texts)]
        for kind, texts in prompts.items()
    }


def show_validation(prompt: str, count: int, pipe, accelerator, sampling: Sampling, folder: Path, step: int) -> None:
    """One row of images on the way; they take nothing from the training but time."""
    requests = [Request(prompt, seed, "") for seed in range(count)]
    row = [image for _, image in generate(pipe, requests, sampling, accelerator)]
    if accelerator.is_main_process:
        grid = image_grid(
            [row], column_labels=[f"seed {seed}" for seed in range(count)], title=f"step {step}: {prompt}"
        )
        save_image(folder / f"validation-{step:06d}.png", grid, {"prompt": prompt, "step": step})
        track_images(accelerator, "validation", row, step)


def next_steps(config: TrainConfig, adapter: Path) -> list[str]:
    """Commands to try after a run."""
    concept = config.all_concepts[0].word or config.all_concepts[0].instance_prompt
    prompts = config.images.prompts_file or "few_shot"
    words = ["sd-atoms", "generate", "--adapter", str(adapter), "--prompts", prompts, "--seeds", "0-3"]
    commands = [shlex.join([*words, "--out", str(adapter.parent / "more")])]
    if "tensorboard" in trackers_of(config.output.report_to):
        commands.append(shlex.join(["tensorboard", "--logdir", str(adapter.parent / CURVES)]))
    load = "load_atoms" if config.method.chosen().name == "atoms" else "load_adapter"
    made_like = f", base_config={config.base.base_config!r}" if config.base.base_config else ""
    code = (
        f"from sd_atoms.pipeline import open_base, {load}; "
        f"pipe = open_base({config.base.pretrained_model_name_or_path!r}{made_like}); {load}(pipe, {str(adapter)!r}); "
        f"pipe({concept + ' at night'!r}, guidance_scale={config.images.guidance_scale:g})"
        ".images[0].save('night.png')"
    )
    return [*commands, shlex.join(["python", "-c", code])]

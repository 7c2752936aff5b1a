"""All checks together: the command, the check before a start, and what both look at."""

import dataclasses
from collections import Counter
from collections.abc import Sequence

from sd_atoms.data.concepts import Source, find_images, image_place
from sd_atoms.data.records import image_stats
from sd_atoms.doctor.disk import disk, disk_needs
from sd_atoms.doctor.findings import Finding, problem, raised, report
from sd_atoms.doctor.images import (
    alike,
    counted,
    cut,
    enlarged,
    held_out,
    masks,
    passes,
    training_size,
    turned,
)
from sd_atoms.doctor.memory import native_bf16, precision, run_memory
from sd_atoms.doctor.plan import class_images, intervals, rates, trainable_params
from sd_atoms.doctor.prompts import braces, new_words, run_prompts
from sd_atoms.errors import UserError
from sd_atoms.machine import make_accelerator
from sd_atoms.pipeline.sampling import check_sampler
from sd_atoms.pipeline.sizes import training_resolution_px, training_unit_px
from sd_atoms.sources import packaged_path, resolve_source
from sd_atoms.training.base import open_base_of
from sd_atoms.training.config import TrainConfig
from sd_atoms.training.objective import noising
from sd_atoms.training.optimiser import with_defaults
from sd_atoms.training.run_folder import check_output
from sd_atoms.training.steps import steps_of
from sd_atoms.training.tracking import trackers_of

MOST_LOOKED_AT = 1000  # pictures per concept that are compared with each other


def doctor(config: TrainConfig) -> None:
    """Prints everything there is to say of a run that these settings would start; nothing is written.

    Raises:
        UserError: there are errors among it.
    """
    config = with_defaults(config)
    sources, findings = _sources(config)
    accelerator = make_accelerator()
    pipe = None
    try:
        pipe = open_base_of(config.base, accelerator.device)
        noising(pipe.scheduler, config.objective.prediction_type, config.objective.rescale_betas_zero_snr)
        drawing = (config.images.scheduler, pipe.scheduler, {}, config.images.num_inference_steps)
        findings += raised(lambda: check_sampler(*drawing), "scheduler")
    except UserError as error:
        findings.append(problem(error, "pretrained_model_name_or_path"))
    findings += examine(config, sources, pipe, accelerator.num_processes)
    if not any(finding.level == "error" and finding.about == "output_dir" for finding in findings):
        findings += raised(lambda: check_output(config), "output_dir")
    findings += raised(lambda: trackers_of(config.output.report_to), "report_to")
    name = config.images.clip_model_name_or_path
    if name:
        findings += raised(
            lambda: packaged_path(name) or resolve_source(name, "clip_model_name_or_path"), "clip_model_name_or_path"
        )
    findings = list(dict.fromkeys(findings))
    if accelerator.is_main_process:
        print(report(findings))
    errors = sum(finding.level == "error" for finding in findings)
    if errors:
        raise UserError(f"{errors} problem{'s' * (errors > 1)} would stop this run; see above")


def preflight(config: TrainConfig, sources: Sequence[Source], pipe, processes: int) -> list[str]:
    """The warnings about a run that is to start, one line each, fix included.

    Raises:
        UserError: all errors, in one line.
    """
    findings = examine(config, sources, pipe, processes)
    errors = [finding.line for finding in findings if finding.level == "error"]
    if errors:
        raise UserError("; ".join(errors))
    return [f"warning: {finding.line}" for finding in findings if finding.level == "warning"]


def examine(config: TrainConfig, sources: Sequence[Source], pipe, processes: int) -> list[Finding]:
    """Everything there is to say of a run before it starts; nothing is changed, written or fetched.

    Args:
        config: settings, learning rates filled in.
        sources: the concepts whose pictures could be read.
        pipe: the base, without new tokens and adapter; None leaves out what cannot be said without one.
        processes: how many train together.
    """
    findings, resolution, unit_px = [], config.data.resolution, 1
    if pipe is not None:
        resolution, unit_px, findings = _training_size(pipe, config.data.resolution)
    for source in sources:
        about = image_place(config.data, source.concept)
        looks = [record.stats or image_stats(record) for record in source.images[:MOST_LOOKED_AT]]
        if config.data.masks:
            findings += masks(about, source.images)
        findings += counted(about, len(source.images), looks) + alike(about, looks) + turned(about, looks)
        if resolution:
            targets = [
                training_size(look.size, resolution, unit_px, config.data.aspect_ratio_buckets) for look in looks
            ]
            findings += enlarged(about, looks, targets) + cut(about, looks, targets)
    pictures = sum(len(source.images) for source in sources)
    examples = (
        sum(len(source.images) * source.concept.repeats for source in sources) - config.validation.holdout_images
    )
    if config.data.class_balanced:
        sizes = Counter(image.label for source in sources for image in source.images)
        examples = len(sizes) * max(sizes.values(), default=0)
    per_step = config.loop.train_batch_size * config.loop.gradient_accumulation_steps * processes
    steps = max(1, steps_of(config.loop, examples, processes))
    if len(sources) == len(config.all_concepts):
        findings += held_out(config.validation.holdout_images, pictures) + passes(examples, steps, per_step)
    prompts, found = run_prompts(config, sources)
    findings += found + braces(prompts, config.all_concepts)
    findings += class_images(config) + rates(config) + intervals(config, steps)
    trained = 0
    if pipe is not None:
        findings += new_words(config, pipe, prompts)
        trained, found = trainable_params(config, pipe)
        findings += found
        width = pipe.text_encoder.get_input_embeddings().weight.shape[1]
        findings += disk(config, disk_needs(config, trained, steps, resolution, pictures, len(prompts), width))
        findings += precision(pipe.device.type, config.precision.mixed_precision, native_bf16(pipe.device.type))
        findings += run_memory(config, pipe, trained, resolution, processes)
    return list(dict.fromkeys(findings))


def _sources(config: TrainConfig) -> tuple[list[Source], list[Finding]]:
    """The concepts with the pictures that can be read, and all that cannot."""
    sources, findings = [], []
    for concept in config.all_concepts:
        about = image_place(config.data, concept)
        try:
            found, notes = find_images(config.data, [concept])
        except UserError as error:
            try:
                skipping = dataclasses.replace(config.data, on_bad_image="skip")
                found, notes = find_images(skipping, [concept])
                notes = [note for note in notes if not note.startswith("Skipped: ")]
                fix = "mend or remove these, or set on_bad_image: skip to leave such pictures out"
                findings.append(Finding("error", about, str(error), fix))
            except UserError:
                findings.append(problem(error, about))
                continue
        sources += found
        findings += [Finding("fact", *note.split(": ", 1)) for note in notes]
    return sources, findings


def _training_size(pipe, resolution: int | None) -> tuple[int, int, list[Finding]]:
    """Side of the training images and what it is a multiple of, in px."""
    unit_px = training_unit_px(pipe)
    try:
        return training_resolution_px(pipe, resolution), unit_px, []
    except UserError as error:
        side = max(unit_px, (resolution or 0) // unit_px * unit_px)
        text = str(error).removeprefix("resolution: ")
        return side, unit_px, [Finding("error", "resolution", text, f"{side} or {side + unit_px} would do")]

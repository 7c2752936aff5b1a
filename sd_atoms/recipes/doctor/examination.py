"""All checks together: the command, the check before a start, and what both look at."""

import dataclasses
import math
from collections.abc import Sequence

from sd_atoms.errors import UserError
from sd_atoms.pipeline import open_base
from sd_atoms.pipeline.base import resolve_source
from sd_atoms.pocket import packaged_path
from sd_atoms.recipes.doctor.disk import disk, disk_needs
from sd_atoms.recipes.doctor.findings import Finding, problem, raised, report
from sd_atoms.recipes.doctor.memory import native_bf16, precision, run_memory
from sd_atoms.recipes.doctor.pictures import (
    alike,
    counted,
    cut,
    enlarged,
    held_out,
    look_at,
    passes,
    training_size,
    turned,
)
from sd_atoms.recipes.doctor.prompts import braces, new_words, run_prompts
from sd_atoms.recipes.doctor.settings import class_pictures, intervals, rates, trained_numbers
from sd_atoms.recipes.machine import make_accelerator
from sd_atoms.training.config import Concept, TrainConfig
from sd_atoms.training.dataset import Source
from sd_atoms.training.objective import noising
from sd_atoms.training.optimiser import with_rates
from sd_atoms.training.run_folder import check_output

MOST_LOOKED_AT = 1000  # pictures per concept that are decoded here: a few seconds


def doctor(config: TrainConfig) -> None:
    """Prints everything there is to say of a run that these settings would start; nothing is written.

    Raises:
        UserError: there are errors among it.
    """
    config = with_rates(config)
    sources, findings = _sources(config)
    accelerator = make_accelerator()
    pipe = None
    try:
        pipe = open_base(
            config.pretrained_model_name_or_path,
            revision=config.revision,
            variant=config.variant,
            device=accelerator.device,
        )
        noising(pipe.scheduler, config.prediction_type, config.rescale_betas_zero_snr)
    except UserError as error:
        findings.append(problem(error, "pretrained_model_name_or_path"))
    findings += examine(config, sources, pipe, accelerator.num_processes)
    if not any(finding.level == "error" and finding.about == "output_dir" for finding in findings):
        findings += raised(lambda: check_output(config), "output_dir")
    name = config.clip_model_name_or_path
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
    findings, resolution, unit_px = [], config.resolution, 1
    if pipe is not None:
        resolution, unit_px, findings = _training_size(config, pipe)
    for source in sources:
        about = _place(config, source.concept)
        looks = [look_at(picture) for picture in source.pictures[:MOST_LOOKED_AT]]
        findings += counted(about, len(source.pictures), looks) + alike(about, looks) + turned(about, looks)
        if resolution:
            targets = [training_size(look.size, resolution, unit_px, config.aspect_ratio_buckets) for look in looks]
            findings += enlarged(about, looks, targets) + cut(about, looks, targets)
    pictures = sum(len(source.pictures) for source in sources)
    examples = sum(len(source.pictures) * source.concept.repeats for source in sources) - config.holdout_images
    per_step = config.train_batch_size * config.gradient_accumulation_steps * processes
    steps = config.max_train_steps
    if config.num_train_epochs is not None:
        steps = max(1, math.ceil(config.num_train_epochs * examples / per_step))
    if len(sources) == len(config.all_concepts):
        findings += held_out(config.holdout_images, pictures) + passes(examples, steps, per_step)
    prompts, found = run_prompts(config, sources)
    findings += found + braces(prompts, config.all_concepts)
    findings += class_pictures(config) + rates(config) + intervals(config, steps)
    trained = 0
    if pipe is not None:
        findings += new_words(config, pipe, prompts)
        trained, found = trained_numbers(config, pipe)
        findings += found
        width = pipe.text_encoder.get_input_embeddings().weight.shape[1]
        findings += disk(config, disk_needs(config, trained, steps, resolution, pictures, len(prompts), width))
        findings += precision(pipe.device.type, config.mixed_precision, native_bf16(pipe.device.type))
        findings += run_memory(config, pipe, trained, resolution, processes)
    return list(dict.fromkeys(findings))


def _sources(config: TrainConfig) -> tuple[list[Source], list[Finding]]:
    """The concepts with the pictures that can be read, and all that cannot."""
    from sd_atoms.recipes.personalise import find_pictures  # which imports this package

    sources, findings = [], []
    for concept in config.all_concepts:
        own = config
        if config.concepts is not None:
            own = dataclasses.replace(config, concepts=(concept,), train_token_embedding=False)
        about = _place(config, concept)
        try:
            found, notes = find_pictures(own)
        except UserError as error:
            try:
                found, notes = find_pictures(dataclasses.replace(own, on_bad_image="skip"))
                notes = [note for note in notes if not note.startswith("Skipped: ")]
                fix = "mend or remove these, or set on_bad_image: skip to leave such pictures out"
                findings.append(Finding("error", about, str(error), fix))
            except UserError:
                findings.append(problem(error, about))
                continue
        sources += found
        findings += [Finding("fact", *note.split(": ", 1)) for note in notes]
    return sources, findings


def _training_size(config: TrainConfig, pipe) -> tuple[int, int, list[Finding]]:
    """Side of the training pictures and what it is a multiple of, in px."""
    from sd_atoms.recipes.personalise import size_unit, training_resolution  # which imports this package

    unit_px = size_unit(pipe)
    try:
        return training_resolution(config, pipe, unit_px), unit_px, []
    except UserError as error:
        side = max(unit_px, (config.resolution or 0) // unit_px * unit_px)
        about, text = str(error).split(": ", 1)
        return side, unit_px, [Finding("error", about, text, f"{side} or {side + unit_px} would do")]


def _place(config: TrainConfig, concept: Concept) -> str:
    return config.dataset_name or concept.instance_data_dir

"""The plan of a run beside what the base allows and what is usual: targets, rates, intervals, class images."""

import re

from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from sd_atoms.data.images import scan_folder
from sd_atoms.doctor.findings import Finding, plural, shortlist
from sd_atoms.errors import UserError
from sd_atoms.settings import replaced
from sd_atoms.training.config import TrainConfig
from sd_atoms.training.diffusion import adapter_config, text_adapter_config
from sd_atoms.training.optimiser import RATE_NAMES, with_rates
from sd_atoms.tuner import TARGET_SETS, AtomsConfig, layer_plan, named_targets

FAR_RATE = 30  # factor; the rates of all modes lie within one of 100


def trainable_params(config: TrainConfig, pipe) -> tuple[int, list[Finding]]:
    """How many numbers a run trains; an error where the settings fit no layer, or not all of them."""
    method, text = config.method, config.text
    try:
        parts = {"atoms": _planned(pipe.unet, adapter_config(method, config.loop.seed))}
    except (ValueError, re.error) as error:
        fix = "conv3x3 takes m up to 9, 1x1 and Linear layers take kc"
        return 0, [Finding("error", f"target={method.target!r}, m={method.m}", str(error), fix)]
    if text.train_token_embedding:
        width = pipe.text_encoder.get_input_embeddings().weight.shape[1]
        parts["embedding rows"] = width * len(config.tokens)
    if text.train_text_encoder:
        settings = text_adapter_config(text, config.loop.seed)
        if isinstance(settings, LoraConfig):
            ends = tuple(settings.target_modules)
            layers = [layer for name, layer in pipe.text_encoder.named_modules() if name.endswith(ends)]
            parts["the text encoder"] = settings.r * sum(sum(layer.weight.shape) for layer in layers)
        else:
            parts["the text encoder"] = _planned(pipe.text_encoder, settings)
    listed = " and ".join(f"{count:,} of {part}" for part, count in parts.items())
    return sum(parts.values()), [Finding("fact", "trained numbers", listed)]


def rates(config: TrainConfig) -> list[Finding]:
    """A warning for each learning rate in use that is far from what is usual in its mode; 0 is somebody's choice."""
    usual = with_rates(replaced(config, **dict.fromkeys(RATE_NAMES))).optimiser
    method, text = config.method, config.text
    in_use = (True, method.m1 and method.train_beta, text.train_token_embedding, text.train_text_encoder)
    findings = []
    for name, used in zip(RATE_NAMES, in_use, strict=True):
        rate, expected = getattr(config.optimiser, name), getattr(usual, name)
        if used and rate and not expected / FAR_RATE <= rate <= expected * FAR_RATE:
            times = f"{rate / expected:,.0f} times" if rate > expected else f"1/{expected / rate:,.0f} of"
            text = f"{rate:g} is {times} the usual {expected:g}"
            findings.append(Finding("warning", name, text, f"leave it out, which means {expected:g}"))
    return findings


def intervals(config: TrainConfig, steps: int) -> list[Finding]:
    """What will not happen because the run is over before."""
    findings = []
    if config.output.checkpointing_steps > steps:
        every = config.output.checkpointing_steps
        text = f"{every} is more than the {steps} steps of the run: one checkpoint, at its end"
        findings.append(Finding("fact", "checkpointing_steps", text))
    validation = config.validation
    for name, asked, what in (
        ("validation_steps", validation.validation_prompt, "no validation picture will be drawn"),
        ("validation_loss_steps", validation.validation_loss_steps, "no validation loss will be measured"),
    ):
        if asked and getattr(validation, name) > steps:
            text = f"{getattr(validation, name)} is more than the {steps} steps of the run: {what}"
            findings.append(Finding("warning", name, text, f"at most {steps} makes sense"))
    if config.optimiser.lr_warmup_steps >= steps and config.optimiser.lr_scheduler != "constant":
        text = f"{config.optimiser.lr_warmup_steps} of {steps} steps: the learning rate never reaches its value"
        findings.append(Finding("warning", "lr_warmup_steps", text, f"{steps // 15} would be as usual"))
    return findings


def class_images(config: TrainConfig) -> list[Finding]:
    """Facts about pictures of the class that the base has to draw first."""
    return [
        Finding("fact", f"class_data_dir {folder}", f"{plural(missing, 'picture')} will be drawn by the base first")
        for folder, missing in missing_class_images(config).items()
        if missing
    ]


def missing_class_images(config: TrainConfig) -> dict[str, int]:
    """Folder of class pictures -> how many the base has to draw first."""
    missing = {}
    for concept in config.all_concepts if config.prior.prior == "images" else ():
        try:
            own = len(scan_folder(concept.class_data_dir).paths)
        except UserError:  # no folder, or none in it: all are drawn
            own = 0
        missing[concept.class_data_dir] = max(0, config.prior.num_class_images - own)
    return missing


def _planned(model: nn.Module, settings: AtomsConfig) -> int:
    """The numbers that an adapter would train in a model; ValueError where it does not fit."""
    target = settings.target_modules
    if isinstance(target, str) and target in TARGET_SETS:
        names = set(named_targets(model, target))
    else:
        names = {name for name, _ in model.named_modules() if bool(check_target_module_exists(settings, name))}
    if not names:
        raise ValueError(f"matches no layer of {type(model).__name__}")
    total, unfit = 0, []
    for name, layer in model.named_modules():
        if name in names:
            try:
                total += layer_plan(settings, name, layer).trainable_params(layer, settings.train_beta)
            except ValueError as error:
                unfit.append(f"{name} {error}")
    if unfit:
        raise ValueError(f"{len(unfit)} layers do not fit: {shortlist(unfit)}")
    return total

"""Everything that could go wrong in a training run, found before it starts: `sd-atoms doctor`, and every start."""

import copy
import dataclasses
import math
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch
from peft.tuners.tuners_utils import check_target_module_exists
from PIL import ExifTags, Image
from torch import nn

from sd_atoms.data.buckets import bucket_sizes, nearest
from sd_atoms.data.images import scan_folder
from sd_atoms.data.pictures import Picture
from sd_atoms.data.prompts import fill, load_templates
from sd_atoms.errors import UserError
from sd_atoms.pipeline import open_base
from sd_atoms.pipeline.base import resolve_source
from sd_atoms.pipeline.tokens import check_new_token
from sd_atoms.pocket import packaged_path
from sd_atoms.recipes.machine import make_accelerator
from sd_atoms.training.config import Concept, TrainConfig
from sd_atoms.training.dataset import Source, class_prompts, concept_prompts, picture_prompts
from sd_atoms.training.loop import ADAPTER_SETTINGS, TEXT_TARGETS
from sd_atoms.training.objective import noising
from sd_atoms.training.optimiser import RATE_NAMES, with_rates
from sd_atoms.training.run_folder import check_output
from sd_atoms.tuner import TARGET_SETS, AtomsConfig, layer_plan, named_targets

LEVELS = ("error", "warning", "fact")
FEWEST_PICTURES = 3
MOST_LOST = 0.3  # share of a picture that a square crop may cut: 0.25 of the 4:3 of most cameras, 0.33 of 3:2
NEARLY_ALIKE = 2  # of 64 bits; the packaged pictures of one thing differ in 7 or more
MOST_LOOKED_AT = 1000  # pictures per concept that are decoded here: a few seconds
MOST_LONG_PROMPTS = 3  # listed one by one
FAR_RATE = 30  # factor; the rates of all modes lie within one of 100
PNG_BYTES_PER_PX = 2  # of photos in RGB
FLOAT32 = 4  # bytes

# Measured on the UNet of SD v1-4 (320 channels at its first level), a forward and backward pass in float32 on a CPU,
# beside its weights: 0.69 GB at 256 px and 2.05 GB at 512 px, which make the line; 1.16 GB for two pictures of 256 px
# lies on it. With gradient checkpointing 0.40 GB and 1.06 GB.
WORKSPACE_BYTES = 0.23e9
ACTIVATION_BYTES = 1400  # per latent position and channel of the first level
CHECKPOINTED = 0.46  # share of these that stays


@dataclass(frozen=True)
class Finding:
    """Something to mend (error), to weigh (warning) or to know (fact).

    about: the setting, file or thing it is about. text: what is so; several lines where it lists files. fix: what to
    do about it, empty for most facts.
    """

    level: str
    about: str
    text: str
    fix: str = ""

    @property
    def line(self) -> str:
        """The finding on one line, worded as a UserError."""
        return " ".join(f"{self.about}: {self.text}{'; ' * bool(self.fix)}{self.fix}".split())


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
        findings.append(_problem(error, "pretrained_model_name_or_path"))
    findings += examine(config, sources, pipe, accelerator.num_processes)
    if not any(finding.level == "error" and finding.about == "output_dir" for finding in findings):
        findings += _raised(lambda: check_output(config), "output_dir")
    name = config.clip_model_name_or_path
    if name:
        findings += _raised(
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


def report(findings: Sequence[Finding]) -> str:
    """All findings as one list, errors first, each fix after an arrow, and how many there are of each."""
    lines = []
    for level in LEVELS:
        for finding in findings:
            if finding.level == level:
                first, *rest = f"{finding.about}: {finding.text}".splitlines()
                lines += [f"{level:<8} {first}", *(f"           {line.strip()}" for line in rest)]
                lines += [f"         → {finding.fix}"] * bool(finding.fix)
    errors, warnings = (sum(finding.level == level for finding in findings) for level in LEVELS[:2])
    return "\n".join([*lines, "", f"{_count(errors, 'error')}, {_count(warnings, 'warning')}."])


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
        findings += _memory(config, pipe, trained, resolution, processes)
    return list(dict.fromkeys(findings))


# Pictures


@dataclass(frozen=True)
class Look:
    """What is to be seen of a picture.

    size: (width, height) in px, upright. turned: the file holds it turned, and says so. cells: which of 8×8 are
    brighter than the mean; None of a picture in one colour.
    """

    name: str
    size: tuple[int, int]
    digest: str
    turned: bool = False
    cells: tuple[bool, ...] | None = None


def look_at(picture: Picture) -> Look:
    """Reads a picture once."""
    image, path = picture.read(), Path(picture.name)
    orientation = 1
    if path.is_file():
        with Image.open(path) as file:
            orientation = file.getexif().get(ExifTags.Base.Orientation, 1)
    grey = np.asarray(image.convert("L").resize((8, 8), Image.Resampling.BOX), dtype=np.float64).ravel()
    cells = tuple((grey > grey.mean()).tolist()) if np.ptp(grey) > 8 else None
    return Look(path.name, image.size, picture.digest(), orientation not in (0, 1), cells)


def counted(about: str, count: int, looks: Sequence[Look]) -> list[Finding]:
    """How many pictures there are, and of what sizes; too few are a warning."""
    sizes = [look.size for look in looks]
    smallest, largest = min(sizes, key=math.prod), max(sizes, key=math.prod)
    span = _size(largest) if smallest == largest else f"{_size(smallest)} to {_size(largest)}"
    limit = f"; the first {len(looks)} were looked at" if len(looks) < count else ""
    found = [Finding("fact", about, f"{_count(count, 'picture')} of {span} px{limit}")]
    if count < FEWEST_PICTURES:
        text = f"{_count(count, 'picture')} can be learned by heart with the background"
        found.append(Finding("warning", about, text, f"take {FEWEST_PICTURES} or more, from several sides"))
    return found


def training_size(size: tuple[int, int], resolution: int, unit_px: int, buckets: bool) -> tuple[int, int]:
    """(width, height) in px that a picture of `size` is trained at."""
    return nearest(size, bucket_sizes(resolution, unit_px)) if buckets else (resolution, resolution)


def enlarged(about: str, looks: Sequence[Look], targets: Sequence[tuple[int, int]]) -> list[Finding]:
    """A warning about pictures smaller than their training size."""
    factors = {look: _factor(look.size, target) for look, target in zip(looks, targets, strict=True)}
    small = sorted((look for look in factors if factors[look] > 1), key=lambda look: -factors[look])
    if not small:
        return []
    worst = small[0]
    text = (
        f"{_of(small, looks)} too small and will be enlarged, by up to {factors[worst] - 1:.0%} ({worst.name}, "
        f"{_size(worst.size)} px); what is learned will be as blurred"
    )
    return [Finding("warning", about, text, "take larger pictures, or lower resolution")]


def cut(about: str, looks: Sequence[Look], targets: Sequence[tuple[int, int]]) -> list[Finding]:
    """A warning about pictures whose shape is so far from the training size's that much is cropped."""
    lost = {look: _lost(look.size, target) for look, target in zip(looks, targets, strict=True)}
    far = sorted((look for look in lost if lost[look] > MOST_LOST), key=lambda look: -lost[look])
    if not far:
        return []
    worst = far[0]
    text = f"{_of(far, looks)} cropped by up to {lost[worst]:.0%} ({worst.name}, {_size(worst.size)} px)"
    square = all(width == height for width, height in targets)
    fix = "set aspect_ratio_buckets, or crop them by hand" if square else "crop them by hand, no bucket is so long"
    return [Finding("warning", about, text, fix)]


def alike(about: str, looks: Sequence[Look]) -> list[Finding]:
    """A warning about pictures that are there twice, and one about those that nearly are."""
    same: dict[str, list[str]] = {}
    for look in looks:
        same.setdefault(look.digest, []).append(look.name)
    twice = [" = ".join(names) for names in same.values() if len(names) > 1]
    found = []
    if twice:
        text = f"the same picture several times: {_listed(twice)}"
        found.append(Finding("warning", about, text, "keep one of each; it counts for more than the others"))
    firsts = {look.digest: look for look in reversed(looks)}
    seen = [look for look in looks if look.cells and firsts[look.digest] is look]
    signs = np.array([look.cells for look in seen], dtype=np.float32).reshape(-1, 64) * 2 - 1
    distances = (64 - signs @ signs.T) / 2  # (N, 64) @ (64, N) -> (N, N) bits
    pairs = np.argwhere(np.triu(distances <= NEARLY_ALIKE, k=1))
    if len(pairs):
        text = f"nearly the same: {_listed([f'{seen[one].name} and {seen[other].name}' for one, other in pairs])}"
        found.append(Finding("warning", about, text, "keep one of them, unless they differ in what matters"))
    return found


def turned(about: str, looks: Sequence[Look]) -> list[Finding]:
    """A fact about pictures that are turned upright as their EXIF data say."""
    names = [look.name for look in looks if look.turned]
    return [Finding("fact", about, f"turned upright, as their EXIF data say: {_listed(names)}")] if names else []


def held_out(count: int, pictures: int) -> list[Finding]:
    """An error where no picture is left to learn from."""
    if count < pictures:
        return []
    text = f"{count} of {pictures} pictures leave none to learn from"
    return [Finding("error", "holdout_images", text, f"at most {pictures - 1} are allowed")]


def passes(examples: int, steps: int, per_step: int) -> list[Finding]:
    """How often each picture is seen; a warning where some are never."""
    seen = steps * per_step
    text = f"{_count(steps, 'step')} of {_count(per_step, 'picture')}"
    if seen >= examples or examples < 1:
        return [Finding("fact", "steps", f"{text}: each is seen {seen / max(examples, 1):,.0f} times")]
    text += f" end before the first epoch does: {examples - seen:,} of {examples:,} are never seen"
    return [Finding("warning", "steps", text, f"{math.ceil(examples / per_step):,} steps see each once")]


# Prompts


def run_prompts(config: TrainConfig, sources: Sequence[Source]) -> tuple[dict[str, str], list[Finding]]:
    """Every prompt of a run and the setting or picture it comes from; errors about files of prompts."""
    prompts: dict[str, str] = {}
    findings = []
    pictures_of = {source.concept: source for source in sources}

    def add(where: str, texts: Iterable[str]) -> None:
        for text in texts:
            prompts.setdefault(text, where)

    def gather(concept: Concept) -> None:
        where = concept.instance_prompts_file or "instance_prompt"
        if concept not in pictures_of:
            add(where, concept_prompts(concept))
            return
        source = pictures_of[concept]
        for picture, own in zip(source.pictures, picture_prompts(source), strict=True):
            add(where if picture.caption is None else f"caption of {picture.name}", own)

    for concept in config.all_concepts:
        add("instance_prompt", [concept.instance_prompt])
        findings += _raised(lambda concept=concept: gather(concept), "instance_prompts_file")
        if config.prior != "none":
            where = config.class_prompts_file or "class_prompt"
            findings += _raised(
                lambda concept=concept, where=where: add(where, class_prompts(config, concept)), "class_prompts_file"
            )
        add(config.prompts_file, [fill(template, concept.word) for template in _templates(config)])
    if config.prompts_file:
        findings += _raised(lambda: load_templates(config.prompts_file), "prompts_file")
    if config.validation_prompt:
        add("validation_prompt", [config.validation_prompt])
    return prompts, findings


def braces(prompts: Mapping[str, str], concepts: Sequence[Concept]) -> list[Finding]:
    """An error for each prompt with a brace too many, a warning for each {} that nothing will fill."""
    findings = []
    for text, where in prompts.items():
        rest = text
        for concept in concepts:
            for token in concept.tokens:
                rest = rest.replace(token, "")
        depth = lowest = 0
        for letter in rest:
            depth += (letter == "{") - (letter == "}")
            lowest = min(lowest, depth)
        if depth or lowest < 0:
            findings.append(Finding("error", where, f"{text!r} has a brace without its other half", "remove it"))
        elif "{}" in rest:
            word = next((concept.word for concept in concepts if concept.word), "the word itself")
            text = f"{text!r} is no template: {{}} stays as it is"
            findings.append(Finding("warning", where, text, f"write {word} in its place"))
    return findings


def new_words(config: TrainConfig, pipe, prompts: Mapping[str, str]) -> list[Finding]:
    """What is wrong with placeholder tokens, initialisers and the lengths of prompts, as the base reads them."""
    words = [token for concept in config.all_concepts for token in concept.tokens]
    refused = {word: _raised(lambda word=word: check_new_token(pipe, word), word) for word in words}
    findings = [finding for found in refused.values() for finding in found]
    words = [word for word in words if not refused[word]]
    for word in dict.fromkeys(word for concept in config.all_concepts for word in concept.initializers):
        findings += initializer(pipe.tokenizer, word)
    tokenizer = with_words(pipe.tokenizer, words)
    findings += whole_words(tokenizer, words) + long_prompts(tokenizer, prompts)
    if config.validation_prompt:
        findings += unseen_words(tokenizer, config.validation_prompt, [c.tokens for c in config.all_concepts])
    return findings


def with_words(tokenizer, words: Sequence[str]):
    """A copy of the tokenizer that knows the new words, as it will in training."""
    own = copy.deepcopy(tokenizer)
    own.add_tokens([word for word in words if word not in own.get_vocab()])
    return own


def initializer(tokenizer, word: str) -> list[Finding]:
    """An error for an initialiser that is not one token: how it is split."""
    ids = _ids(tokenizer, word)
    if len(ids) == 1 and ids[0] != tokenizer.unk_token_id:
        return []
    text = f"{word!r} is {len(ids)} tokens of the base model ({_pieces(tokenizer, ids)}), one word is needed"
    return [Finding("error", "initializer_token", text, "name a common word for such a thing")]


def whole_words(tokenizer, words: Sequence[str]) -> list[Finding]:
    """An error for each new word that is not read as one token."""
    findings = []
    for word in words:
        ids = _ids(tokenizer, word)
        if ids != [tokenizer.convert_tokens_to_ids(word)]:
            text = f"{word!r} is read as {len(ids)} tokens ({_pieces(tokenizer, ids)})"
            findings.append(Finding("error", "placeholder_token", text, "choose another, such as <thing>"))
    return findings


def long_prompts(tokenizer, prompts: Mapping[str, str]) -> list[Finding]:
    """A warning for each prompt that is cut, with the first words that are lost."""
    findings, most = [], tokenizer.model_max_length
    for text, where in prompts.items():
        spans = tokenizer(text, verbose=False, return_offsets_mapping=True).offset_mapping
        if len(spans) > most:
            start, _ = spans[most - 1]  # the one before is the last that stays, the end token takes this one's place
            lost = text[text.rfind(" ", 0, start) + 1 :].split()  # from the start of a word that is cut in two
            shown = " ".join(lost[:6]) + " …" * (len(lost) > 6)
            text = f"{text[:40]!r}… has {len(spans)} tokens, of {most} that are read: lost from {shown!r} on"
            findings.append(Finding("warning", where, text, "make it shorter"))
    more = len(findings) - MOST_LONG_PROMPTS
    if more > 0:
        findings[MOST_LONG_PROMPTS:] = [Finding("warning", "prompts", f"{more} more are cut too", "make them shorter")]
    return findings


def unseen_words(tokenizer, prompt: str, words: Sequence[tuple[str, ...]]) -> list[Finding]:
    """A warning where the validation prompt shows no concept in full; `words`: the placeholders of each."""
    seen = set(_ids(tokenizer, prompt))
    missing = [[word for word in own if tokenizer.convert_tokens_to_ids(word) not in seen] for own in words if own]
    if not missing or not all(missing):
        return []
    first = missing[0]
    text = f"{prompt!r} lacks the placeholder {' '.join(first)}, so its pictures will not show what is learned"
    return [Finding("warning", "validation_prompt", text, f"write {' '.join(first)} into it")]


# What is trained, and the disk


def trained_numbers(config: TrainConfig, pipe) -> tuple[int, list[Finding]]:
    """How many numbers a run trains; an error where the settings fit no layer, or not all of them."""
    own = {name: getattr(config, name) for name in ADAPTER_SETTINGS}
    try:
        parts = {"atoms": _planned(pipe.unet, AtomsConfig(**own, target_modules=config.target))}
    except (ValueError, re.error) as error:
        fix = "conv3x3 takes m up to 9, 1x1 and Linear layers take kc"
        return 0, [Finding("error", f"target={config.target!r}, m={config.m}", str(error), fix)]
    if config.train_token_embedding:
        width = pipe.text_encoder.get_input_embeddings().weight.shape[1]
        parts["embedding rows"] = width * sum(len(concept.tokens) for concept in config.all_concepts)
    if config.train_text_encoder:
        if config.text_adapter == "lora":
            layers = [layer for name, layer in pipe.text_encoder.named_modules() if name.endswith(tuple(TEXT_TARGETS))]
            parts["the text encoder"] = config.text_rank * sum(sum(layer.weight.shape) for layer in layers)
        else:
            text = AtomsConfig(m=0, kc=config.text_kc, target_modules=TEXT_TARGETS)
            parts["the text encoder"] = _planned(pipe.text_encoder, text)
    listed = " and ".join(f"{count:,} of {part}" for part, count in parts.items())
    return sum(parts.values()), [Finding("fact", "trained numbers", listed)]


def disk_needs(
    config: TrainConfig, trained: int, steps: int, resolution: int, pictures: int, prompts: int, width: int
) -> dict[str, int]:
    """Setting of a folder -> bytes that a run writes there.

    A checkpoint has the trained numbers and AdamW's two moments of each, in float32; the adapter is written twice, its
    initial atoms with it; a picture counts 2 bytes per pixel, and the grids of all pictures count as much again.
    """
    copies = 3 + bool(config.ema_decay) + (config.keep == "best")
    kept = math.ceil(steps / config.checkpointing_steps)
    if config.checkpoints_total_limit:
        kept = min(kept, config.checkpoints_total_limit + 1)  # the oldest goes after the newest has come
    png = PNG_BYTES_PER_PX * resolution**2
    drawn = 4 * len(config.all_concepts) * (config.num_instance_images + len(_templates(config)))
    if config.validation_prompt:
        drawn += config.num_validation_images * (steps // config.validation_steps)
    needs = {"output_dir": (kept * copies + 4) * trained * FLOAT32 + drawn * png}
    if config.cache_dir:
        # mean and std of 4 channels at an eighth of the side, mirrored too; states of 77 tokens
        latents = pictures * (1 + config.random_flip) * 2 * 4 * (resolution // 8) ** 2
        needs["cache_dir"] = (latents + prompts * 77 * width) * FLOAT32
    if config.prior == "images":
        needs["class_data_dir"] = sum(_missing_class_pictures(config).values()) * png
    return {about: needed for about, needed in needs.items() if needed}


def disk(config: TrainConfig, needs: Mapping[str, int]) -> list[Finding]:
    """Errors where a folder cannot be written to or a disk has no room; facts about the bytes otherwise."""
    findings, on_disk = [], {}
    for about, needed in needs.items():
        folder = getattr(config, about) or next(c.class_data_dir for c in config.all_concepts if c.class_data_dir)
        place = existing_parent(Path(folder))
        found = writable(about, place)
        findings += found
        if not found:
            entry = on_disk.setdefault(place.stat().st_dev, ([], [], place))
            entry[0].append(about)
            entry[1].append(needed)
    for names, sizes, place in on_disk.values():
        findings.append(room(" and ".join(names), sum(sizes), shutil.disk_usage(place).free))
    return findings


def existing_parent(path: Path) -> Path:
    """The path itself, or the nearest folder above it that is there."""
    path = path.expanduser().absolute()
    return next(place for place in (path, *path.parents) if place.exists())


def writable(about: str, place: Path) -> list[Finding]:
    """An error where no file can be made in a folder; nothing is tried."""
    if not place.is_dir():
        return [Finding("error", about, f"{place} is a file", "name a folder")]
    if not os.access(place, os.W_OK | os.X_OK):
        return [Finding("error", about, f"{place} cannot be written to", "name a folder of your own")]
    return []


def room(about: str, needed: int, free: int) -> Finding:
    """Whether a disk has room for what is written: a fact or an error."""
    text = f"about {_bytes(needed)} will be written, {_bytes(free)} are free"
    if needed <= free:
        return Finding("fact", about, text)
    fix = "name a folder on a larger disk, set checkpoints_total_limit, or draw fewer pictures"
    return Finding("error", about, text, fix)


# Device and memory


def native_bf16(device: str) -> bool | None:
    """Whether a "cpu" or "cuda" device computes in bf16 without emulation; None where nobody can say."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    flags = cpu_flags(Path("/proc/cpuinfo")) if device == "cpu" else None
    return None if flags is None else bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})


def cpu_flags(cpuinfo: Path) -> set[str] | None:
    """What the first core of a Linux machine can do; None on other machines."""
    if not cpuinfo.is_file():
        return None
    for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):  # x86, ARM
            return set(value.split())
    return None


def precision(device: str, wanted: str, native: bool | None) -> list[Finding]:
    """What is wrong with a mixed precision on a device ("cpu", "cuda", "mps")."""
    if wanted == "fp16" and device == "cpu":
        return [Finding("error", "mixed_precision", "fp16 does not train on a CPU", "set no, or bf16 to save memory")]
    if wanted != "no" and device == "mps":
        text = f"{wanted} does not work on this Mac; training goes on in fp32"
        return [Finding("warning", "mixed_precision", text, "set no")]
    if wanted == "bf16" and native is False:
        what = "CPU" if device == "cpu" else "card"
        text = f"this {what} has no bf16 of its own; it is emulated and slow"
        return [Finding("warning", "mixed_precision", text, "set no" if device == "cpu" else "set fp16 or no")]
    return []


def memory_needed(numbers: int, trained: int, activations: float, precision: str) -> float:
    """Bytes at the peak: all weights are opened in float32, then one step works in `precision`.

    Args:
        numbers: of UNet, text encoder and VAE.
        trained: of these there are the values, gradients and two moments of AdamW, in float32.
        activations: as `activation_bytes` says.
        precision: "no", "fp16" or "bf16".
    """
    each = FLOAT32 if precision == "no" else 2
    return max(FLOAT32 * numbers, each * numbers + 4 * FLOAT32 * trained + activations)


def activation_bytes(channels: int, positions: int, batch: int, precision: str, checkpointing: bool) -> float:
    """What a step keeps beside weights, by the line through the measurements at the head of this file.

    Args:
        channels: of the UNet's first level.
        positions: of one picture's latents, height times width.
        batch: pictures that go through at once.
        precision: half of it in fp16 and bf16.
        checkpointing: only some layers keep theirs.
    """
    kept = ACTIVATION_BYTES * channels * positions * batch * (CHECKPOINTED if checkpointing else 1)
    return (WORKSPACE_BYTES + kept) * (1 if precision == "no" else 0.5)


def memory(needed: float, free: float) -> Finding:
    """Whether a device has the memory: a fact or a warning."""
    text = f"about {_bytes(needed)} are needed, {_bytes(free)} are free"
    if needed <= free:
        return Finding("fact", "memory", text)
    fix = (
        "lower train_batch_size and raise gradient_accumulation_steps, set gradient_checkpointing, or lower resolution"
    )
    return Finding("warning", "memory", text, fix)


# Settings


def rates(config: TrainConfig) -> list[Finding]:
    """A warning for each learning rate in use that is far from what is usual in its mode; 0 is somebody's choice."""
    usual = with_rates(dataclasses.replace(config, **dict.fromkeys(RATE_NAMES)))
    in_use = (True, config.m1 and config.train_beta, config.train_token_embedding, config.train_text_encoder)
    findings = []
    for name, used in zip(RATE_NAMES, in_use, strict=True):
        rate, expected = getattr(config, name), getattr(usual, name)
        if used and rate and not expected / FAR_RATE <= rate <= expected * FAR_RATE:
            times = f"{rate / expected:,.0f} times" if rate > expected else f"1/{expected / rate:,.0f} of"
            text = f"{rate:g} is {times} the usual {expected:g}"
            findings.append(Finding("warning", name, text, f"leave it out, which means {expected:g}"))
    return findings


def intervals(config: TrainConfig, steps: int) -> list[Finding]:
    """What will not happen because the run is over before."""
    findings = []
    if config.checkpointing_steps > steps:
        text = f"{config.checkpointing_steps} is more than the {steps} steps of the run: one checkpoint, at its end"
        findings.append(Finding("fact", "checkpointing_steps", text))
    for name, wanted, what in (
        ("validation_steps", config.validation_prompt, "no validation picture will be drawn"),
        ("validation_loss_steps", config.validation_loss_steps, "no validation loss will be measured"),
    ):
        if wanted and getattr(config, name) > steps:
            text = f"{getattr(config, name)} is more than the {steps} steps of the run: {what}"
            findings.append(Finding("warning", name, text, f"at most {steps} makes sense"))
    if config.lr_warmup_steps >= steps and config.lr_scheduler != "constant":
        text = f"{config.lr_warmup_steps} of {steps} steps: the learning rate never reaches its value"
        findings.append(Finding("warning", "lr_warmup_steps", text, f"{steps // 15} would be as usual"))
    return findings


def class_pictures(config: TrainConfig) -> list[Finding]:
    """Facts about pictures of the class that the base has to draw first."""
    return [
        Finding("fact", f"class_data_dir {folder}", f"{_count(missing, 'picture')} will be drawn by the base first")
        for folder, missing in _missing_class_pictures(config).items()
        if missing
    ]


def _sources(config: TrainConfig) -> tuple[list[Source], list[Finding]]:
    """The concepts with the pictures that can be read, and all that cannot."""
    from sd_atoms.recipes.personalise import find_pictures  # which imports this file

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
                findings.append(_problem(error, about))
                continue
        sources += found
        findings += [Finding("fact", *note.split(": ", 1)) for note in notes]
    return sources, findings


def _training_size(config: TrainConfig, pipe) -> tuple[int, int, list[Finding]]:
    """Side of the training pictures and what it is a multiple of, in px."""
    from sd_atoms.recipes.personalise import size_unit, training_resolution  # which imports this file

    unit_px = size_unit(pipe)
    try:
        return training_resolution(config, pipe, unit_px), unit_px, []
    except UserError as error:
        side = max(unit_px, (config.resolution or 0) // unit_px * unit_px)
        about, text = str(error).split(": ", 1)
        return side, unit_px, [Finding("error", about, text, f"{side} or {side + unit_px} would do")]


def _memory(config: TrainConfig, pipe, trained: int, resolution: int, processes: int) -> list[Finding]:
    parts = (pipe.unet, pipe.text_encoder, pipe.vae)
    numbers = sum(parameter.numel() for part in parts for parameter in part.parameters())
    held = sum(p.numel() * p.element_size() for part in parts for p in part.parameters())
    batch = config.train_batch_size * (1 if config.prior == "none" else 2)
    activations = activation_bytes(
        pipe.unet.config.block_out_channels[0],
        (resolution // pipe.vae_scale_factor) ** 2,
        batch,
        config.mixed_precision,
        config.gradient_checkpointing,
    )
    needed = memory_needed(numbers, trained, activations, config.mixed_precision)
    if pipe.device.type == "cuda":
        return [memory(needed, torch.cuda.mem_get_info(pipe.device)[0] + held)]
    return [memory(needed * processes, psutil.virtual_memory().available + held * processes)]


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
                total += layer_plan(settings, name, layer).trained_numbers(layer, settings.train_beta)
            except ValueError as error:
                unfit.append(f"{name} {error}")
    if unfit:
        raise ValueError(f"{len(unfit)} layers do not fit: {_listed(unfit)}")
    return total


def _missing_class_pictures(config: TrainConfig) -> dict[str, int]:
    missing = {}
    for concept in config.all_concepts if config.prior == "images" else ():
        try:
            own = len(scan_folder(concept.class_data_dir).paths)
        except UserError:  # no folder, or none in it: all are drawn
            own = 0
        missing[concept.class_data_dir] = max(0, config.num_class_images - own)
    return missing


def _templates(config: TrainConfig) -> list[str]:
    """The templates of prompts_file; none where they cannot be read, which `run_prompts` reports."""
    try:
        return load_templates(config.prompts_file) if config.prompts_file else []
    except UserError:
        return []


def _raised(check, about: str) -> list[Finding]:
    """The error that a check raises, as a finding."""
    try:
        check()
    except UserError as error:
        return [_problem(error, about)]
    return []


def _problem(error: UserError, about: str) -> Finding:
    """An error as a finding: "field: what is wrong; what is allowed", or any text, which then is about `about`."""
    text = str(error)
    if "\n" in text:
        return Finding("error", about, text, "mend or remove them")
    start, colon, rest = text.partition(": ")
    if colon and len(start) < 100:
        about, text = start, rest
    text, _, fix = text.rpartition("; ") if "; " in text else (text, "", "")
    return Finding("error", about, text, fix)


def _place(config: TrainConfig, concept: Concept) -> str:
    return config.dataset_name or concept.instance_data_dir


def _ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False).input_ids


def _pieces(tokenizer, ids: Sequence[int]) -> str:
    return " + ".join(piece.removesuffix("</w>") for piece in tokenizer.convert_ids_to_tokens(ids))


def _factor(size: tuple[int, int], target: tuple[int, int]) -> float:
    return max(target[0] / size[0], target[1] / size[1])


def _lost(size: tuple[int, int], target: tuple[int, int]) -> float:
    """The share of a picture that is cropped."""
    return 1 - math.prod(target) / (math.prod(size) * _factor(size, target) ** 2)


def _of(some: Sequence, all_: Sequence) -> str:
    return f"{len(some)} of {_count(len(all_), 'picture')} {'is' if len(some) == 1 else 'are'}"


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"


def _listed(names: Sequence[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _bytes(count: float) -> str:
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if count >= unit:
            return f"{count / unit:,.1f} {name}"
    return f"{count / 1e3:,.0f} KB"

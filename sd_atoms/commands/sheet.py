"""Draws what every checkpoint of a run makes at several strengths on one sheet, to choose by eye, with scores."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sd_atoms.data.concepts import find_images
from sd_atoms.data.config import Concept
from sd_atoms.data.images import fit
from sd_atoms.data.prompts import check_lengths, fill, load_templates, parse_seeds
from sd_atoms.errors import UserError
from sd_atoms.evaluation.networks import Network, open_network, text_features
from sd_atoms.evaluation.run import per_image
from sd_atoms.files import write_json
from sd_atoms.generation import GRID_NOTE, Request, generate_missing, making_notes, read_images, save_image
from sd_atoms.machine import make_accelerator
from sd_atoms.methods.adapters import delete_adapter, set_adapters
from sd_atoms.pipeline import load_adapter
from sd_atoms.progress import followed
from sd_atoms.report.sheet import Cell, picked, sheet_entries, sheet_image, sheet_text
from sd_atoms.settings import setting
from sd_atoms.training.adapter import open_adapter, run_config
from sd_atoms.training.base import open_base_of
from sd_atoms.training.checkpoint import checkpoints_by_step
from sd_atoms.training.config import TrainConfig
from sd_atoms.training.run_folder import CHECKPOINTS, SHEET

WHAT, HOW, RESULT = "what is drawn", "how it is scored", "result"
STRENGTHS = (0.6, 0.8, 1.0, 1.2)
PROMPTS = 3  # of a run's own, where none are named
MOST_PHOTOS = 100
BATCH = 32  # pictures that go through a network together
PICTURE, NUMBERS = "sheet.png", "sheet.json"


@dataclass(frozen=True)
class Settings:
    """Settings of `sd-atoms sheet`. How pictures are drawn is as in the run."""

    run: str = setting(
        None, WHAT, "run folder with checkpoints (see checkpointing_steps)", required=True, positional=True
    )
    steps: str | None = setting(None, WHAT, "of which checkpoints, such as 200,300; none = all that were kept")
    strengths: str | None = setting(
        None,
        WHAT,
        f"of the adapter; none = {', '.join(f'{value:g}' for value in STRENGTHS)}, or 1 where its method has none",
    )
    prompts: str | None = setting(
        None,
        WHAT,
        f"text file of templates with {{}}; none = the first {PROMPTS} of the run's prompts_file or of few_shot",
        file=True,
    )
    seeds: str = setting("0-1", WHAT, "such as 0-3,7: one picture per prompt and seed in each cell")
    token: str | None = setting(None, WHAT, "which concept of a run of several, by its token; none = the first")
    pretrained_model_name_or_path: str | None = setting(
        None, WHAT, "where the run's base is now; none = where it was", aliases=["base"]
    )
    base_config: str | None = setting(
        None, WHAT, "of a base in one file: a folder or hub id with its configs; none = as the run had them"
    )
    networks: str | None = setting(
        None,
        HOW,
        "what scores, comma-separated, as for sd-atoms evaluate: the first judges the likeness, the first that knows "
        "texts the text; none = the run's clip_model_name_or_path",
    )
    out: str | None = setting(
        None, RESULT, f"folder for the pictures, {PICTURE} and {NUMBERS}; none = {SHEET}/ in the run"
    )
    overwrite: bool = setting(False, RESULT, "draw pictures again that are there already")


def run(settings: Settings) -> Path:
    """Draws, scores and prints what the scores would pick; returns the sheet's path.

    Raises:
        UserError: the run or the settings cannot be used.
    """
    accelerator = make_accelerator()
    path = make_sheet(settings, accelerator)
    accelerator.end_training()
    return path


def make_sheet(settings: Settings, accelerator) -> Path:
    """As `run`, by processes that are there already; all must call it."""
    folder, base = Path(settings.run), (settings.pretrained_model_name_or_path, settings.base_config)
    config = run_config(folder, *base)
    concept = _concept(config, settings.token)
    chosen, seeds = _chosen(folder, settings.steps), parse_seeds(settings.seeds)
    given = _strengths(settings.strengths)
    prompts = _prompts(config, concept, settings.prompts)
    names = settings.networks or config.images.clip_model_name_or_path or ""
    networks = [open_network(name.strip(), accelerator.device) for name in names.split(",") if name.strip()]
    out = Path(settings.out) if settings.out else folder / SHEET
    if out.exists() and not out.is_dir():
        raise UserError(f"out: {out} is a file")

    photos = []
    if networks:
        (source,), _ = find_images(config.data, [concept], accelerator)
        photos = [
            fit(image.read(), config.data.resolution, center_crop=True, resample="lanczos", rng=None)
            for image in source.images[:MOST_PHOTOS]
        ]
    pipe = open_base_of(config.base, accelerator.device)
    sampling = replace(config.images.sampling, resolution=config.data.resolution)
    requests = [
        Request(prompt, seed, f"prompt{number:02d}-seed{seed}")
        for seed in seeds
        for number, (prompt, _) in enumerate(prompts)
    ]
    cells = []
    for step, path in chosen.items():
        artefact = open_adapter(str(path), *base, of_step=True)
        load_adapter(pipe, artefact)
        if not cells:
            check_lengths(pipe.tokenizer, [prompt for prompt, _ in prompts])
            given = given or _usual_strengths(pipe)
        for strength in given:
            _set_strength(pipe, strength)
            notes = making_notes(path.name, config.base.pretrained_model_name_or_path)
            notes |= {"adapter_digest": artefact.digest(), "adapter_scale": f"{strength:g}"}
            place = out / f"step-{step}-strength-{strength:g}"
            generate_missing(pipe, accelerator, requests, sampling, place, notes, settings.overwrite)
            cells.append(Cell(step, strength))
        for part in (pipe.unet, pipe.text_encoder):
            if hasattr(part, "peft_config"):
                delete_adapter(part, "default")
    if accelerator.is_main_process:
        pictures = [read_images(out / f"step-{cell.step}-strength-{cell.strength:g}", requests) for cell in cells]
        if networks:
            cells = _scored(cells, pictures, photos, [plain for _, plain in prompts] * len(seeds), networks)
        choice, across = picked(cells), len(prompts)
        rows = [[own[start : start + across] for start in range(0, len(own), across)] for own in pictures]
        title = f"{concept.placeholder_token or folder.name}, seeds {', '.join(map(str, seeds))}"
        sheet = sheet_image(cells, choice, rows, [prompt for prompt, _ in prompts], title)
        save_image(out / PICTURE, sheet, {GRID_NOTE: ", ".join(cell.name for cell in cells)})
        about = {"prompts": [prompt for prompt, _ in prompts], "seeds": list(seeds), "sampling": asdict(sampling)}
        about["networks"] = [network.name for network in networks]
        write_json(out / NUMBERS, sheet_entries(cells, choice, about))
        print(f"{out / PICTURE}: {len(cells)} cells of {len(requests)} pictures.")
        print(sheet_text(cells, choice, settings.run))
    return out / PICTURE


def _concept(config: TrainConfig, token: str | None) -> Concept:
    concepts = config.all_concepts
    if token is None:
        return concepts[0]
    found = [concept for concept in concepts if token in concept.tokens]
    if not found:
        known = ", ".join(token for concept in concepts for token in concept.tokens) or "none"
        raise UserError(f"token: {token!r} is no token of this run; there is {known}")
    return found[0]


def _chosen(folder: Path, steps: str | None) -> dict[int, Path]:
    """Step -> checkpoint, of these steps."""
    kept = checkpoints_by_step(folder / CHECKPOINTS)
    if steps is None:
        return kept
    words = [word.strip() for word in steps.split(",") if word.strip()]
    gone = [word for word in words or [steps] if word not in map(str, kept)]
    if gone:
        raise UserError(f"steps: there is no checkpoint of step {gone[0]!r}; there are {', '.join(map(str, kept))}")
    return {step: path for step, path in kept.items() if str(step) in words}


def _strengths(text: str | None) -> list[float]:
    """Those that somebody named; none of them is to choose by method."""
    try:
        found = [float(part) for part in (text or "").split(",") if part.strip()]
    except ValueError:
        found = [float("nan")]
    if text is not None and (not found or not all(-10 <= value <= 10 for value in found)):
        raise UserError(f"strengths: {text!r}: numbers from -10 to 10 with commas between are allowed")
    if found and not any(found):
        raise UserError(f"strengths: {text!r}: at 0 there is no adapter; name another one beside it")
    # what reads alike has one folder
    return list({f"{value:g}": value for value in found}.values())


def _usual_strengths(pipe) -> Sequence[float]:
    """STRENGTHS, or 1 alone where the loaded adapter has no strength."""
    if not any(hasattr(part, "peft_config") for part in (pipe.unet, pipe.text_encoder)):
        return [1.0]
    try:
        _set_strength(pipe, STRENGTHS[0])
    except UserError:
        return [1.0]
    return STRENGTHS


def _set_strength(pipe, strength: float) -> None:
    """Of the loaded adapter, in the UNet and in the text encoder.

    Raises:
        UserError: it has none.
    """
    parts = [part for part in (pipe.unet, pipe.text_encoder) if hasattr(part, "peft_config")]
    if not parts and strength != 1:
        raise UserError(f"strengths: {strength:g}: tokens alone have no strength, only 1 is allowed")
    for part in parts:
        set_adapters(part, ["default"], [strength])


def _prompts(config: TrainConfig, concept: Concept, file: str | None) -> list[tuple[str, str]]:
    """Prompts, each with the same as the base and judges know it."""
    if file is None and config.data.task is not None:
        return [(prompt, prompt) for prompt in config.data.task.prompts[:PROMPTS]]
    if not concept.word:
        if file is not None:
            raise UserError("prompts: the run has neither a placeholder_token nor an initializer_token to put in {}")
        return [(concept.instance_prompt, concept.instance_prompt)]
    templates = load_templates(file or config.images.prompts_file or "few_shot")
    chosen = templates if file else templates[:PROMPTS]
    return [(fill(template, concept.word), fill(template, concept.plain_word)) for template in chosen]


@torch.no_grad()
def _scored(
    cells: Sequence[Cell],
    pictures: Sequence[Sequence[Any]],
    photos: Sequence[Any],
    texts: Sequence[str],
    networks: Sequence[Network],
) -> list[Cell]:
    judge, reader = networks[0], next((network for network in networks if network.of_texts is not None), None)
    reference, found = _features(judge, photos), []
    own = {} if reader is None else text_features(reader, texts)[0]
    for cell, drawn in followed(list(zip(cells, pictures, strict=True)), len(cells), "Scores", "cell"):
        cell = replace(cell, likeness=per_image(_features(judge, drawn), reference, texts, {})["image"])
        if reader is not None:
            features = _features(reader, drawn)
            cell = replace(cell, text=per_image(features, features, texts, own)["text"])
        found.append(cell)
    return found


def _features(network: Network, pictures: Sequence[Any]) -> torch.Tensor:
    """(N, d), BATCH pictures at once."""
    return torch.cat([network.of_images(pictures[n : n + BATCH]) for n in range(0, len(pictures), BATCH)])

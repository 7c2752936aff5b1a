"""Scores a folder of images, made here or elsewhere: likeness, copying, diversity, text, distance from a reference."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from PIL import Image

from sd_atoms.data.captions import folder_captions
from sd_atoms.data.checked import usable, with_masks
from sd_atoms.data.images import scan_folder
from sd_atoms.data.masks import folder_masks
from sd_atoms.data.records import ImageRecord, image_record
from sd_atoms.errors import UserError, first_lines
from sd_atoms.evaluation.folder import GROUPS, MORE_GROUPS, SETS, Draws, score_images
from sd_atoms.evaluation.intervals import mean_figure
from sd_atoms.evaluation.networks import RESIZES, features_of, open_network, text_features
from sd_atoms.evaluation.surroundings import NAME, surroundings
from sd_atoms.files import check_outputs, write_json
from sd_atoms.generation import GRID_NOTE
from sd_atoms.generation.png import AGAIN_NOTE
from sd_atoms.machine import make_accelerator, on_main
from sd_atoms.report.table import text_table
from sd_atoms.settings import setting

WHAT, HOW, RESULT = "what is scored", "how", "result"


@dataclass(frozen=True)
class Settings:
    """Settings of `sd-atoms evaluate`."""

    folder: str = setting(None, WHAT, "folder of images", required=True, positional=True)
    pattern: str = setting("*", WHAT, "only images whose names match, such as 'prompt-*'")
    reference: str | None = setting(None, WHAT, "folder of real images; none = only metrics that need none")
    replace: str | None = setting(
        None, WHAT, "'<castle>=castle': in prompts, replace the new word by one that the networks know"
    )

    networks: str = setting(
        None,
        HOW,
        "what makes features, comma-separated: pocket:clip, pocket:judge, efficientnet-lite0, colours, "
        "openai/clip-vit-large-patch14, facebook/dinov2-base, a folder, …; judges disagree, so take two",
        required=True,
    )
    metrics: str = setting(
        ",".join(GROUPS), HOW, f"comma-separated, of {', '.join(MORE_GROUPS)}; the last needs masks in reference"
    )
    resize: str = setting("antialiased", HOW, "how images are resized for a network", choices=RESIZES)
    draws: int = setting(100, HOW, "draws of the bootstrap for the 95 % intervals", low=2, high=10_000)
    seed: int = setting(0, HOW, "of the bootstrap and of random subsets", low=0)
    cache_dir: str | None = setting(
        None, HOW, "folder that keeps features, by the content of the images; none = do not"
    )
    on_bad_image: str = setting(
        "error", HOW, "what to do with an image that cannot be read", choices=("error", "skip")
    )

    json: str | None = setting(None, RESULT, "also write all figures to this file")
    overwrite: bool = setting(False, RESULT, "replace that file where it exists")


def run(settings: Settings) -> dict[str, Any]:
    """Prints a table for each network, writes the file asked for, and returns what is in it.

    Raises:
        UserError: a folder, network or setting cannot be used, or the file cannot be written.
    """
    groups = _listed("metrics", settings.metrics, MORE_GROUPS)
    names = [name.strip() for name in settings.networks.split(",") if name.strip()]
    if not names:
        raise UserError("networks: one or more are needed")
    word = _replacement(settings.replace)
    accelerator = make_accelerator()
    on_main(accelerator, lambda: check_outputs(settings.overwrite, json=settings.json))
    cache = Path(settings.cache_dir) if settings.cache_dir else None

    def images_of(folder: str, pattern: str, masks: bool = False) -> tuple[list[ImageRecord], tuple[str, ...]]:
        paths = [path for path in scan_folder(folder).paths if fnmatch(path.name, pattern)]
        paths = [path for path in paths if not {GRID_NOTE, AGAIN_NOTE} & _png_text(path).keys()]
        if not paths:
            raise UserError(f"{folder}: no images named {pattern}")
        own = folder_masks(Path(folder), paths) if masks else {}
        records = [image_record(path, mask=own.get(path)) for path in paths]
        return usable(records, settings.on_bad_image, accelerator, cache)

    images, notes = images_of(settings.folder, settings.pattern)
    real = None
    if settings.reference:
        real, skipped = images_of(settings.reference, "*", NAME in groups)
        notes += skipped
    if real is None and set(groups) <= {"subject", "copying", *SETS}:
        raise UserError(f"reference is required for metrics: {', '.join(groups)}")
    if NAME in groups:
        if real is None:
            raise UserError(f"metrics: {NAME} needs reference: photos with masks")
        real = with_masks(real, accelerator)
    prompts = image_prompts(settings.folder, images, word)
    result = {
        "folder": settings.folder, "images": len(images), "reference": settings.reference,
        "reference_images": None if real is None else len(real), "resize": settings.resize, "draws": settings.draws,
        "seed": settings.seed, "skipped": list(notes), "networks": {},
    }  # fmt: skip
    for name in names:
        network = open_network(name, accelerator.device, settings.resize)
        features = features_of(network, images, settings.resize, cache, accelerator)
        reference = None if real is None else features_of(network, real, settings.resize, cache, accelerator)
        texts, cut = text_features(network, prompts) if "text" in groups else ({}, [])
        found = score_images(features, reference, prompts, texts, groups, Draws(settings.draws, settings.seed))
        if "text" in groups and network.of_texts is not None and prompts is None:
            found.notes.append("text: not every image has a prompt, in its PNG text, NAME.txt or metadata.jsonl")
        if NAME in groups:
            alike = surroundings(network, images, real, settings.resize, accelerator)
            found.figures[NAME] = mean_figure(alike, settings.draws, settings.seed)
        if cut:
            found.notes.append(
                f"text: {len(cut)} prompts are longer than {name} takes and were cut, such as {cut[0]!r}"
            )
        result["networks"][name] = {
            "figures": {key: figure.entries() for key, figure in found.figures.items()},
            "notes": found.notes,
        }
    accelerator.print(evaluation_text(result))
    if settings.json:
        on_main(accelerator, lambda: write_json(settings.json, result))
    accelerator.end_training()
    return result


def image_prompts(folder: str, images: Sequence[ImageRecord], word: tuple[str, str]) -> list[str] | None:
    """The prompt of each image, from its PNG text, or from NAME.txt or metadata.jsonl; None unless all have one.

    Args:
        folder: where they are.
        images: in it.
        word: what is replaced in them, and by what.
    """
    paths = [Path(image.name) for image in images]
    found = [_own_prompt(path) for path in paths]
    if not all(found):
        captions = folder_captions(Path(folder), paths)
        found = [own or captions.get(path) for own, path in zip(found, paths, strict=True)]
    return [prompt.replace(*word) for prompt in found] if all(found) else None


def evaluation_text(result: Mapping[str, Any]) -> str:
    """A table for each network, and the notes."""
    against = f" against {result['reference_images']} of {result['reference']}" if result["reference"] else ""
    lines = [f"{result['images']} images of {result['folder']}{against}, {result['resize']} resize"]
    lines += [f"Skipped: {note}" for note in first_lines(result["skipped"])]
    for name, scores in result["networks"].items():
        rows = []
        for key, own in scores["figures"].items():
            interval = "" if own["low"] is None else f"{own['low']:.4g} to {own['high']:.4g}"
            rows.append([key, f"{own['value']:.4g}", interval, f"{own['n']:,}"])
        lines += ["", text_table([name, "value", "95 %", "n"], rows) if rows else f"{name}: no figure"]
        lines += [f"note: {note}" for note in scores["notes"]]
    return "\n".join(lines)


def _own_prompt(path: Path) -> str | None:
    """What the text of a PNG file says, unless it is a workflow of ComfyUI."""
    text = _png_text(path).get("prompt")
    return text if isinstance(text, str) and not text.lstrip().startswith("{") else None


def _png_text(path: Path) -> dict:
    try:
        with Image.open(path) as image:
            return dict(image.info) if image.format == "PNG" else {}
    except (OSError, ValueError, SyntaxError):  # such as text that is too long
        return {}


def _listed(name: str, text: str, allowed: Sequence[str]) -> list[str]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    unknown = [word for word in words if word not in allowed]
    if unknown or not words:
        raise UserError(
            f"{name}: {', '.join(map(repr, unknown)) or repr(text)}: of {', '.join(allowed)}, with commas between"
        )
    return words


def _replacement(text: str | None) -> tuple[str, str]:
    new, equals, known = (text or "=").partition("=")
    if text is not None and not (new and equals and known):
        raise UserError(f"replace: {text!r}: NEW=KNOWN is allowed, such as '<castle>=castle'")
    return (new, known) if text else ("\0", "")

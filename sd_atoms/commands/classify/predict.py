"""Says what images show, by a trained classifier: its best classes with their probabilities, as CSV or JSON."""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from sd_atoms.classify.file import load_classifier
from sd_atoms.classify.scores import logits_of
from sd_atoms.data.checked import usable
from sd_atoms.data.images import scan_folder
from sd_atoms.data.records import image_record
from sd_atoms.errors import UserError
from sd_atoms.files import check_outputs, write_text
from sd_atoms.machine import make_accelerator
from sd_atoms.report.table import csv_text
from sd_atoms.settings import add_flags, fields_of, resolve, setting

WHAT, HOW = "what is told", "how"


@dataclass(frozen=True)
class PredictSettings:
    """Settings of `sd-atoms classify predict`, its images aside."""

    classifier: str = setting(None, WHAT, "a run folder of `classify train`, or its file", required=True)
    model: str | None = setting(None, WHAT, "where the pretrained network is; none = as the file says")
    top: int = setting(1, HOW, "how many classes of each image", low=1)
    format: str | None = setting(
        None, HOW, "of what is told; none = json where out ends so, else csv", choices=("csv", "json")
    )
    out: str | None = setting(None, HOW, "a file for it; none = the terminal")
    overwrite: bool = setting(False, HOW, "replace that file where it exists")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the images, and every flag."""
    parser.usage = "%(prog)s --classifier RUN IMAGE …"
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="image files, or folders of them")
    add_flags(parser, PredictSettings)


def run(arguments: argparse.Namespace) -> None:
    """Tells.

    Raises:
        UserError: the classifier or an image cannot be used.
    """
    flags = vars(arguments)
    settings = resolve(PredictSettings, {name: flags[name] for name in fields_of(PredictSettings) if name in flags})
    check_outputs(settings.overwrite, out=settings.out)
    paths = [path for word in flags["images"] for path in _images(Path(word).expanduser())]
    classifier, file = load_classifier(settings.classifier, settings.model)
    accelerator = make_accelerator()
    records, _ = usable([image_record(path) for path in paths], "error", accelerator)
    classifier.to(accelerator.device)
    chances = logits_of(classifier, records, accelerator).softmax(1)
    values, places = chances.topk(min(settings.top, len(file.class_names)))
    told = [
        [(file.class_names[place], value) for place, value in zip(own, row, strict=True)]
        for own, row in zip(places.tolist(), values.tolist(), strict=True)
    ]
    if not accelerator.is_main_process:
        return
    suffix = Path(settings.out or "").suffix.lower()
    json_wanted = settings.format == "json" or (settings.format is None and suffix == ".json")
    text = as_json(paths, told) if json_wanted else as_csv(paths, told)
    if settings.out:
        write_text(Path(settings.out), text)
    else:
        sys.stdout.write(text)


def as_csv(paths: list[Path], told: list[list[tuple[str, float]]]) -> str:
    """path, class, probability, and class_2, probability_2, … beyond the best."""
    ends = ["", *(f"_{place}" for place in range(2, len(told[0]) + 1))]
    header = ["path", *(f"{name}{end}" for end in ends for name in ("class", "probability"))]
    cells = [
        [path, *(value for name, chance in row for value in (name, f"{chance:.6f}"))]
        for path, row in zip(paths, told, strict=True)
    ]
    return csv_text(header, cells)


def as_json(paths: list[Path], told: list[list[tuple[str, float]]]) -> str:
    """A list of {path, classes: [{class, probability}, …]}."""
    entries = [
        {"path": str(path), "classes": [{"class": name, "probability": chance} for name, chance in row]}
        for path, row in zip(paths, told, strict=True)
    ]
    return json.dumps(entries, ensure_ascii=False, indent=2) + "\n"


def _images(path: Path) -> list[Path]:
    if path.is_dir():
        return list(scan_folder(path).paths)
    if not path.is_file():
        raise UserError(f"{path}: no such file or folder; expected images")
    return [path]

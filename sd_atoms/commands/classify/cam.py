"""Draws what trained classifiers look at: Grad-CAM of the same images, side by side, and how large the regions are."""

from dataclasses import dataclass
from pathlib import Path

from sd_atoms.classify.cam import active_shares, chosen_block, maps_of
from sd_atoms.classify.config import TestedSettings
from sd_atoms.classify.file import load_classifier, open_tests, read_classifier
from sd_atoms.classify.images import labels_among, some_of
from sd_atoms.classify.scores import DRAWS, logits_of
from sd_atoms.classify.training import centre_crop
from sd_atoms.data.images import to_unit
from sd_atoms.data.records import ImageRecord
from sd_atoms.errors import UserError
from sd_atoms.evaluation.intervals import mean_figure, share_figure
from sd_atoms.files import check_outputs, replacing, write_json
from sd_atoms.machine import make_accelerator, read_ahead
from sd_atoms.progress import followed
from sd_atoms.report.classifier import cam_sheet
from sd_atoms.report.table import text_table
from sd_atoms.settings import section, setting

WHAT, HOW = "what is looked at", "how"


@dataclass(frozen=True)
class Settings:
    """Settings of `sd-atoms classify cam`."""

    classifiers: str = setting(
        None, WHAT, "run folders of `classify train` or their files, with commas between", required=True
    )
    tested: TestedSettings = section(TestedSettings)
    images: int = setting(64, WHAT, "how many, drawn by the seed", low=1)
    shown: int = setting(8, WHAT, "how many of these are in the picture", low=1)
    model: str | None = setting(
        None, HOW, "where the pretrained network is, or one for each with commas between; none = as each file says"
    )
    block: int | None = setting(None, HOW, "at the end of which block, from 1; none = the last", low=1)
    layer: str | None = setting(None, HOW, "at which layer, by its name, in place of block")
    out: str = setting("cam.png", HOW, "the picture")
    json: str | None = setting(None, HOW, "also write the sizes of the regions to this file")
    overwrite: bool = setting(False, HOW, "replace files that are there")


def run(settings: Settings) -> None:
    """Draws and prints.

    Raises:
        UserError: a classifier or the images cannot be used, or there is no such layer.
    """
    if settings.block is not None and settings.layer is not None:
        raise UserError(f"block: {settings.block}: layer {settings.layer!r} is in its place; one of them is allowed")
    check_outputs(settings.overwrite, out=settings.out, json=settings.json)
    places = [word.strip() for word in settings.classifiers.split(",") if word.strip()]
    if not places:
        raise UserError(f"classifiers: {settings.classifiers!r}: one or more are needed, with commas between")
    models = [word.strip() for word in settings.model.split(",")] if settings.model else [None]
    models = models * len(places) if len(models) == 1 else models
    if len(models) != len(places):
        raise UserError(f"model: {len(models)} networks for {len(places)} classifiers; one, or one for each")
    found = open_tests(settings.tested, [read_classifier(place) for place in places])
    records = some_of(found.test, settings.images, f"{settings.tested.seed or 0}/cam")
    names = [found.class_names[record.label] for record in records]
    shown = range(min(settings.shown, len(records)))
    accelerator = make_accelerator()
    if not accelerator.is_main_process:  # a few dozen images are no work to share
        return
    images = list(followed(read_ahead(ImageRecord.read, records), len(records), "Reading", "image"))
    columns, told = [], []
    for place, model in zip(places, models, strict=True):
        classifier, file = load_classifier(place, model)
        labels = labels_among(records, found.class_names, file.class_names, place)
        layer = chosen_block(classifier, settings.block, settings.layer)
        classifier.to(accelerator.device)
        maps = maps_of(classifier, images, labels, layer)
        said = logits_of(classifier, records).argmax(1)
        size, empty = mean_figure(active_shares(maps), DRAWS, seed=0), int((maps.amax((1, 2)) == 0).sum())
        right = share_figure(said == said.new_tensor(labels))
        figures = {"active": size.entries(), "empty_maps": empty, "accuracy": right.entries()}
        told.append({"classifier": place, "layer": layer, **figures})
        crops = to_unit([centre_crop(images[number], classifier.preprocessing) for number in shown])
        answers = [file.class_names[said[number]] for number in shown]
        columns.append(
            (f"{file.method}: {place}", crops.permute(0, 2, 3, 1).numpy(), answers, maps[: len(shown)].numpy())
        )
    sheet, notes = cam_sheet([names[number] for number in shown], columns)
    with replacing(Path(settings.out)) as temporary:
        sheet.savefig(temporary, format="png")
    print(sizes_text(told))
    for note in notes:
        print(note)
    print(
        f"{settings.out} shows {len(shown)} of the {len(records)} images. Maps are of each image's own class; one is "
        "empty where nothing at that layer speaks for it"
    )
    if settings.json:
        write_json(Path(settings.json), told)


def sizes_text(told: list[dict]) -> str:
    """A line for each classifier: how large the active region is, and how many of the images it gets right."""
    cells = []
    for entry in told:
        figures = [entry["active"], entry["accuracy"]]
        texts = [
            f"{own['value']:.1%}" + ("" if own["low"] is None else f" ({own['low']:.1%} to {own['high']:.1%})")
            for own in figures
        ]
        cells.append([entry["classifier"], entry["layer"], texts[0], str(entry["empty_maps"]), texts[1]])
    return text_table(["classifier", "layer", "active region", "empty maps", "right"], cells, left=(0, 1))

"""Tests a trained classifier: accuracy with its interval, by class, confusion, calibration."""

from dataclasses import dataclass
from pathlib import Path

from sd_atoms.classify.config import TestedSettings
from sd_atoms.classify.file import load_classifier, open_tests
from sd_atoms.classify.images import labels_among
from sd_atoms.classify.scores import logits_of, scores_of
from sd_atoms.data.checked import usable
from sd_atoms.errors import UserError
from sd_atoms.files import check_outputs, replacing, write_json
from sd_atoms.machine import make_accelerator
from sd_atoms.report.classifier import confusion_figure, scores_text
from sd_atoms.settings import section, setting

WHAT, HOW = "what is tested", "what is written"


@dataclass(frozen=True)
class Settings:
    """Settings of `sd-atoms classify evaluate`."""

    classifier: str = setting(None, WHAT, "a run folder of `classify train`, or its file", required=True)
    tested: TestedSettings = section(TestedSettings)
    model: str | None = setting(None, WHAT, "where the pretrained network is; none = as the file says")
    json: str | None = setting(None, HOW, "also write the figures to this file")
    confusion: str | None = setting(None, HOW, "also draw the confusion matrix into this PNG file")
    overwrite: bool = setting(False, HOW, "replace files that are there")


def run(settings: Settings) -> None:
    """Prints the scores.

    Raises:
        UserError: the classifier or the images cannot be used, or do not fit each other.
    """
    check_outputs(settings.overwrite, json=settings.json, confusion=settings.confusion)
    if settings.confusion and Path(settings.confusion).suffix.lower() != ".png":
        raise UserError(f"confusion: {settings.confusion}: a name that ends in .png is allowed")
    classifier, file = load_classifier(settings.classifier, settings.model)
    found = open_tests(settings.tested, [file])
    accelerator = make_accelerator()
    records, _ = usable(found.test, "error", accelerator)
    truth = labels_among(records, found.class_names, file.class_names, settings.classifier)
    classifier.to(accelerator.device)
    scores = scores_of(logits_of(classifier, records, accelerator), truth, file.class_names)
    if not accelerator.is_main_process:
        return
    print(scores_text(scores))
    if settings.json:
        write_json(Path(settings.json), scores)
    if settings.confusion:
        figure, notes = confusion_figure(scores["confusion"], file.class_names)
        with replacing(Path(settings.confusion)) as temporary:
            figure.savefig(temporary, format="png")
        for note in notes:
            print(note)

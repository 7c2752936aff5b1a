"""Writes a trained classifier without its adapter: as a folder of transformers, as an ONNX file, or both."""

from dataclasses import dataclass
from pathlib import Path

from sd_atoms.classify.file import load_classifier
from sd_atoms.classify.plain import merged, save_plain, write_onnx
from sd_atoms.errors import UserError
from sd_atoms.files import check_outputs, replacing_folder
from sd_atoms.settings import setting

WHAT, HOW = "what is written", "how"


@dataclass(frozen=True)
class Settings:
    """Settings of `sd-atoms classify merge`."""

    classifier: str = setting(None, WHAT, "a run folder of `classify train`, or its file", required=True)
    out: str | None = setting(None, WHAT, "folder for a classifier of transformers")
    onnx: str | None = setting(None, WHAT, "ONNX file; it takes normalised pixels")
    model: str | None = setting(None, HOW, "where the pretrained network is; none = as the file says")
    overwrite: bool = setting(False, HOW, "replace an ONNX file that is there")


def run(settings: Settings) -> None:
    """Merges and writes.

    Raises:
        UserError: nothing is to be written, a place is taken, or the classifier cannot be opened.
    """
    if settings.out is None and settings.onnx is None:
        raise UserError("out or onnx is required: where the merged classifier goes")
    check_outputs(settings.overwrite, onnx=settings.onnx)
    out = None if settings.out is None else Path(settings.out)
    if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"out: {out} is not an empty folder; choose a new one")
    classifier, file = load_classifier(settings.classifier, settings.model)
    merged(classifier)
    if out is not None:
        with replacing_folder(out) as folder:
            save_plain(folder, classifier, file.class_names)
        print(f"{out}: {len(file.class_names)} classes, for AutoModelForImageClassification.from_pretrained")
    if settings.onnx is not None:
        apart = write_onnx(Path(settings.onnx), classifier)
        own = file.preprocessing
        print(
            f"{settings.onnx}: pixels (N, 3, {own.size_px}, {own.size_px}), normalised by mean {own.mean} and std "
            f"{own.std}; logits of onnxruntime are within {apart:.1e} of torch's"
        )

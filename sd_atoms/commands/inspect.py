"""Says what an adapter changes, layer by layer, or what a UNet has to adapt; of any other file, what it is."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sd_atoms.classify.file import describe_classifier
from sd_atoms.errors import UserError
from sd_atoms.files import check_outputs, replacing, write_json
from sd_atoms.pipeline.architectures import ARCHITECTURES
from sd_atoms.pipeline.artefact_files import LORA_FILE, WEIGHTS_FILE, classifier_file, is_ours
from sd_atoms.pipeline.description import describe_file
from sd_atoms.pipeline.inspection import inspect_adapter, inspect_architecture
from sd_atoms.report.atoms import Change, atoms_figure
from sd_atoms.report.description import classifier_text, description_text
from sd_atoms.report.inspection import adapter_text, architecture_text
from sd_atoms.settings import setting
from sd_atoms.training.adapter import checkpoint_of, open_adapter

WHAT, RESULT = "what to look at", "result"
SHOWN = 12


@dataclass(frozen=True)
class Settings:
    """Settings of `sd-atoms inspect`."""

    adapter: str | None = setting(
        None,
        WHAT,
        "a folder, one .safetensors file, a run's checkpoint, or a hub id; a file of another program is measured with "
        "--base, and told about without, as a classifier is",
        positional=True,
    )
    arch: str | None = setting(
        None,
        WHAT,
        "instead of an adapter: what could be adapted in this UNet, and how many numbers that would train",
        choices=ARCHITECTURES,
    )
    pretrained_model_name_or_path: str | None = setting(
        None, WHAT, "base of the adapter; none = the one it was trained on", aliases=["base"]
    )
    base_config: str | None = setting(
        None, WHAT, "of a base in one file: a folder or hub id with its configs; none = as the adapter's run says"
    )
    top: int | None = setting(None, RESULT, f"print so many layers that changed most; 0 = all, none = {SHOWN}", low=0)
    plot: str | None = setting(None, RESULT, "also draw the atoms and the change of each layer into this PNG file")
    json: str | None = setting(None, RESULT, "also write all numbers to this file")
    overwrite: bool = setting(False, RESULT, "replace these files where they exist")


def run(settings: Settings) -> None:
    """Prints tables, then writes the files asked for.

    Raises:
        UserError: the settings do not go together, the adapter or its base cannot be used, or a file cannot be
            written.
    """
    if (settings.adapter is None) == (settings.arch is None):
        raise UserError("inspect takes either an ADAPTER or --arch; see sd-atoms inspect --help")
    classifier = None if settings.arch else classifier_file(Path(settings.adapter).expanduser())
    if settings.arch or classifier:
        of_adapters = ("pretrained_model_name_or_path", "base_config", "top", "plot")
        unused = [f"--{name}" for name in of_adapters if getattr(settings, name) is not None]
        if unused:
            raise UserError(f"{', '.join(unused)}: for an ADAPTER, not for {classifier or '--arch'}")
    if settings.plot and Path(settings.plot).suffix.lower() != ".png":
        raise UserError(f"--plot {settings.plot}: the name of a .png file is needed")
    check_outputs(settings.overwrite, plot=settings.plot, json=settings.json)
    if settings.arch:
        result = inspect_architecture(settings.arch)
        print(architecture_text(result))
    elif classifier:
        result = describe_classifier(classifier)
        print(classifier_text(result))
    elif settings.pretrained_model_name_or_path is None and (path := _foreign_file(settings.adapter)):
        if settings.plot or settings.top is not None:
            raise UserError(
                f"{'--plot' if settings.plot else '--top'}: {path} is measured on a base alone; pass --base"
            )
        result = describe_file(path)
        print(description_text(result))
    else:
        base = settings.pretrained_model_name_or_path
        result = inspect_adapter(
            open_adapter(settings.adapter, base, settings.base_config), base, settings.base_config
        )
        print(adapter_text(result, SHOWN if settings.top is None else settings.top))
    if settings.json:
        write_json(settings.json, result)
    if settings.plot:
        with replacing(settings.plot) as temporary:
            draw_adapter(result).savefig(temporary, format="png")


def _foreign_file(source: str) -> Path | None:
    """The file that a source is, if no program of ours wrote it."""
    path = Path(source).expanduser()
    if (path / LORA_FILE).is_file() and not (path / WEIGHTS_FILE).exists():
        path = path / LORA_FILE
    if not path.is_file() or path.suffix != ".safetensors" or checkpoint_of(source) is not None:
        return None
    return None if is_ours(path) else path


def draw_adapter(result: Mapping[str, Any]):
    """The result of `inspect_adapter` as a matplotlib figure."""
    changes = [
        Change(
            layer["layer"],
            layer["block"],
            layer["share"],
            layer["relative_change"],
            tuple(layer["kernel"]),
            layer["atoms"],
            layer["atoms_change"],
        )
        for layer in result["layers"]
    ]
    name, base = (
        Path(source).name if Path(source).expanduser().exists() else source
        for source in (result["adapter"], result["base"])
    )
    return atoms_figure(changes, f"{name} on {base}: |ΔF|/|F| = {result['relative_change']:.2%}")

"""A run folder: config.yaml, env.json, log.jsonl, logs/, checkpoints/, adapter/, images/, metrics.json, one file."""

import contextlib
import json
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from sd_atoms.data.config import Concept
from sd_atoms.errors import UserError
from sd_atoms.files import leftovers, write_json, write_text
from sd_atoms.machine import make_accelerator, on_main, precision_here
from sd_atoms.settings import fields_of, launcher_notes, plain_values, read_settings, replaced, to_yaml
from sd_atoms.training.checkpoint import checkpoints, find_checkpoint, read_header
from sd_atoms.training.config import TrainConfig
from sd_atoms.training.sections import OutputSettings
from sd_atoms.training.tracking import start_trackers, trackers_of
from sd_atoms.values import shown

CONFIG, ENVIRONMENT, LOG, METRICS = "config.yaml", "env.json", "log.jsonl", "metrics.json"
CHECKPOINTS, ADAPTER, IMAGES, CURVES, SHARE = "checkpoints", "adapter", "images", "logs", "share"
SHEET, PICKED = "sheet", "picked"  # of `sd-atoms sheet` and `sd-atoms pick`
LATENTS = "latents"  # during a run, where they do not fit into memory
LIBRARIES = ("sd-atoms", "torch", "diffusers", "transformers", "accelerate", "peft", "safetensors", "pillow", "numpy")
# a resumed run may differ from its start in these: they change no trained number that is already fixed
FREE_ON_RESUME = {
    "output_dir", "overwrite", "resume_from_checkpoint", "strict_resume", "max_train_steps", "num_train_epochs",
    "checkpointing_steps", "checkpoints_total_limit", "validation_prompt", "validation_steps", "num_validation_images",
    "prompts_file", "num_instance_images", "generation_batch_size", "guidance_scale", "num_inference_steps",
    "scheduler", "clip_model_name_or_path", "report_to", "push_to_hub", "hub_model_id", "hub_private_repo",
    "cache_dir", "latents_in_memory", "contact_sheet",
}  # fmt: skip


def concept_name(concept: Concept, folder: Path) -> str:
    """castle for <castle>; without a placeholder the name of the run folder."""
    return re.sub(r"[^\w-]+", "", (concept.tokens or ("",))[0]) or folder.resolve().name


def check_names(names: Sequence[str]) -> None:
    """Refuses concepts whose files would have one name, also where the disk knows no upper case, or none that this
    locale can spell."""
    for name in names:
        try:
            os.fsencode(name)
        except UnicodeEncodeError as error:
            raise UserError(
                f"placeholder_token: the locale ({error.encoding}) can name no file {name!r}; set PYTHONUTF8=1, or "
                "choose plain letters"
            ) from error
    if len({name.lower() for name in names}) < len(names):
        listed = ", ".join(names)
        raise UserError(
            f"concepts: their files would be called {listed}; give each a placeholder_token of other letters"
        )


def run_name(config: TrainConfig) -> str:
    """What the adapter's file is called: castle for <castle>, castle_canal for two concepts."""
    folder = Path(config.output.output_dir)
    return "_".join(dict.fromkeys(concept_name(concept, folder) for concept in config.all_concepts))


def check_output(config: TrainConfig) -> None:
    """Refuses, before anything is loaded, to mix two runs in one folder.

    Raises:
        UserError: the folder holds something and neither overwriting nor resuming was asked for; or the run to resume
            had other settings, or its checkpoint is missing or broken.
    """
    folder = Path(config.output.output_dir)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output_dir: {folder} is a file")
    holds_run = (folder / CONFIG).exists()
    if config.output.resume_from_checkpoint:
        if not holds_run:
            raise UserError(f"output_dir: {folder} holds no run to resume")
        _check_same_settings(config, folder / CONFIG)
        read_header(find_checkpoint(config.output.resume_from_checkpoint, folder / CHECKPOINTS))
    elif _in_use(folder):
        if not holds_run:
            raise UserError(f"output_dir: {folder} holds files that are not a run; choose an empty or new folder")
        if not config.output.overwrite:
            raise UserError(
                f"output_dir: {folder} holds another run; pass --overwrite to replace it, "
                "--resume_from_checkpoint latest to go on with it, or another --output_dir"
            )


def check_data(output: OutputSettings, data: Mapping[str, str]) -> list[str]:
    """What there is to say of a run that goes on with other data than its checkpoint learned from.

    Args:
        output: settings; without a checkpoint to resume there is nothing to say.
        data: name -> digest of its content, as `Progress.data`.

    Raises:
        UserError: the same, where strict_resume is set.
    """
    if not output.resume_from_checkpoint:
        return []
    path = find_checkpoint(output.resume_from_checkpoint, Path(output.output_dir) / CHECKPOINTS)
    before = read_header(path)[0].data
    if not before:  # of an older version, which kept no digests
        return []
    changes = {
        "new": [name for name in data if name not in before],
        "gone": [name for name in before if name not in data],
        "changed": [name for name in data if before.get(name, data[name]) != data[name]],
    }
    told = [f"{kind}: {', '.join(names[:3])}{', …' * (len(names) > 3)}" for kind, names in changes.items() if names]
    if not told:
        return []
    text = f"resume_from_checkpoint: {path.name} learned from other data; {'; '.join(told)}"
    if output.strict_resume:
        raise UserError(f"{text}; bring back what it was, or go on without strict_resume")
    return [f"warning: {text}"]


def is_first_start(output: OutputSettings) -> bool:
    """Whether going on with the latest checkpoint means to begin: there is no run yet, or one without checkpoint and
    result. So a job that a cluster starts again needs one command only."""
    folder = Path(output.output_dir)
    if output.resume_from_checkpoint != "latest" or checkpoints(folder / CHECKPOINTS):
        return False
    if (folder / ADAPTER).exists() or (folder / METRICS).exists() or any(folder.glob("*.safetensors")):
        return False
    return (folder / CONFIG).exists() or not _in_use(folder)


def prepare(config: Any) -> tuple[Any, Accelerator, list[str]]:
    """The settings of a training, of diffusion or a classifier, as they hold here; its processes; lines on changes.

    Raises:
        UserError: a tracker is not there, or the device cannot work in the precision asked for.
    """
    config = replaced(config, mixed_precision=precision_here(config.precision.mixed_precision))
    accelerator = make_accelerator(
        mixed_precision=config.precision.mixed_precision,
        gradient_accumulation_steps=config.loop.gradient_accumulation_steps,
        logging_dir=Path(config.output.output_dir) / CURVES,
        log_with=trackers_of(config.output.report_to) or None,
    )
    if not on_main(accelerator, lambda: is_first_start(config.output)):
        return config, accelerator, []
    note = "resume_from_checkpoint: there is no checkpoint yet; the run begins at its start"
    return replaced(config, resume_from_checkpoint=None, overwrite=True), accelerator, [note]


def begin(config: Any, accelerator: Accelerator, notes: Sequence[str]) -> None:
    """Opens the folder and the curves in it, and says what there is to say before step 1; all processes call it."""

    def curves(place: Path) -> None:
        if trackers_of(config.output.report_to):
            start_trackers(accelerator, place, Path(config.output.output_dir).resolve().name)

    on_main(accelerator, lambda: open_run(config, accelerator.num_processes, curves))
    for note in [*launcher_notes(config), *notes]:
        accelerator.print(note)


def _in_use(folder: Path) -> bool:
    """Whether a folder holds more than what a run leaves that was killed before its first step."""
    return folder.exists() and bool(set(folder.iterdir()) - {folder / LATENTS, *leftovers(folder)})


def open_run(config: TrainConfig, processes: int, start: Callable[[Path], None]) -> None:
    """Makes the folder ready: curves begun, old results out, resolved config and environment in; step 1 may follow.

    The folder counts as a run at every moment, so that --overwrite works on what a killed process left.

    Args:
        config: settings.
        processes: how many train.
        start: begins the curves in a folder, or raises; nothing of an old run has gone by then.
    """
    folder = Path(config.output.output_dir)
    old_curves = [path for path in (folder / CURVES).rglob("*") if path.is_file()]
    with _nothing_left_on_error(folder):
        if not (folder / CONFIG).exists():
            write_text(folder / CONFIG, to_yaml(config))
        start(folder / CURVES)
    for path in leftovers(folder):
        path.unlink(missing_ok=True)
    if not config.output.resume_from_checkpoint:
        for entry in (CHECKPOINTS, ADAPTER, IMAGES, SHARE, SHEET, PICKED):
            shutil.rmtree(folder / entry, ignore_errors=True)
        for path in old_curves:
            path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # the new ones are there
                os.removedirs(path.parent)
        for path in [folder / entry for entry in (LOG, METRICS, ENVIRONMENT)] + [*folder.glob("*.safetensors")]:
            path.unlink(missing_ok=True)
    saved = replaced(config, overwrite=False, resume_from_checkpoint=None)
    write_text(folder / CONFIG, to_yaml(saved))
    write_json(folder / ENVIRONMENT, environment(processes))


@contextlib.contextmanager
def _nothing_left_on_error(folder: Path) -> Iterator[None]:
    """Takes away what was made in a folder by what fails; what stood there stays."""
    before = {*folder.rglob("*")}
    try:
        yield
    except Exception:
        for path in sorted({*folder.rglob("*")} - before, reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        raise


def environment(processes: int) -> dict:
    """What a reader needs to repeat the run elsewhere."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": [os.path.basename(sys.argv[0]), *sys.argv[1:]],
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": device,
        "threads": torch.get_num_threads(),
        "processes": processes,
        "versions": {library: version(library) for library in LIBRARIES},
    }


def read_log(path: Path) -> list[dict]:
    """The entries of a log.jsonl, one per optimiser step; half a last line, as a killed run leaves it, is no entry."""
    entries = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            entry = json.loads(line)
            numbers = entry["step"], entry["loss"], entry.setdefault("seconds", 0.0)
        except (ValueError, KeyError, TypeError, RecursionError):
            break
        if not all(isinstance(number, (int, float)) for number in numbers):
            break
        entries.append(entry)
    return entries


def cut_log(path: Path, step: int) -> None:
    """Drops the entries after `step`, which a resumed run will write again."""
    kept = [entry for entry in read_log(path) if entry["step"] <= step]
    write_text(path, "".join(json.dumps(entry) + "\n" for entry in kept))


def changed_settings(config: TrainConfig, path: Path, free: Collection[str] = ()) -> list[str]:
    """How settings differ from those in a run's config.yaml, besides those that are `free`.

    A resolution that is left open is the base's own; a setting that the file, of an older version, does not have was
    as its default.

    Raises:
        UserError: the file cannot be read.
    """
    usual = {name: field.default for name, (_, field) in fields_of(type(config)).items()}
    before, now = usual | read_settings(type(config), path), plain_values(config)
    left_open = {*free} | ({"resolution"} if now.get("resolution", 0) is None else set())
    return [
        f"{key} was {shown(before.get(key))}, now {shown(now.get(key))}"
        for key in {**now, **before}
        if key not in left_open and before.get(key) != now.get(key)
    ]


def _check_same_settings(config: TrainConfig, path: Path) -> None:
    # a budget chooses the size anew, the same one for the same base
    sized = {"budget", *config.method.chosen().settings} if config.method.budget is not None else ()
    changed = changed_settings(config, path, {*FREE_ON_RESUME, *sized})
    if changed:
        raise UserError(f"resume_from_checkpoint: the run had other settings: {'; '.join(changed)}")

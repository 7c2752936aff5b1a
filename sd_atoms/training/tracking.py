"""Curves and pictures of a run in the trackers that Accelerate knows, beside log.jsonl."""

import contextlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from PIL import Image

from sd_atoms.errors import UserError

TRACKERS = tuple(sorted(LOGGER_TYPE_TO_CLASS))
PACKAGES = {"comet_ml": "comet-ml"}  # where the package is called otherwise
PROJECT = "sd-atoms"


def trackers_of(report_to: str) -> list[str]:
    """The trackers of a setting such as "tensorboard,wandb"; "all" are those installed, "none" is no tracker.

    Raises:
        UserError: one is not known, or its package is not installed.
    """
    names = list(dict.fromkeys(name.strip() for name in report_to.split(",")))
    if names == ["none"]:
        return []
    unknown = [name for name in names if name not in (*TRACKERS, "all")]
    if unknown:
        allowed = f"none, all, or a list of {', '.join(TRACKERS)} with commas between is allowed"
        raise UserError(f"report_to: {report_to!r} has {unknown[0]!r} in it; {allowed}")
    installed = [str(getattr(name, "value", name)) for name in get_available_trackers()]
    for name in names:
        if name not in (*installed, "all"):
            raise UserError(f"report_to: {name} is not installed; `pip install {PACKAGES.get(name, name)}`")
    return installed if "all" in names else names


def start_trackers(accelerator, folder: Path, run: str) -> None:
    """Begins a run of that name in every tracker; what they write on this machine goes into `folder`.

    Raises:
        UserError: one cannot begin, such as without its login.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = {
        "wandb": {"name": run, "dir": str(folder)},
        "trackio": {"name": run},
        "swanlab": {"experiment_name": run, "logdir": str(folder / "swanlab")},
        "clearml": {"task_name": run},
        "mlflow": {"run_name": run},
    }
    try:
        accelerator.init_trackers(PROJECT, init_kwargs=names)
    except Exception as error:  # each has errors of its own
        for tracker in accelerator.trackers:  # those before it
            with contextlib.suppress(Exception):
                tracker.finish()
        raise UserError(f"report_to: a tracker cannot begin ({' '.join(str(error).split())[:300]})") from error


def track_images(accelerator, key: str, images: Sequence[Image.Image], step: int) -> None:
    """Shows images of one size in every tracker that takes images."""
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.log_images({key: np.stack(images)}, step=step, dataformats="NHWC")
        elif tracker.name in ("wandb", "swanlab"):
            tracker.log_images({key: list(images)}, step=step)
        elif tracker.name in ("aim", "clearml"):  # one at a time
            for number, image in enumerate(images):
                tracker.log_images({f"{key} {number}": image}, step=step)

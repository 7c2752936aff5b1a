"""What an experiment on image sets will cost: hours of a device, and disk."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sd_atoms.data.labelled import task_images
from sd_atoms.errors import UserError
from sd_atoms.jobs.plan import PRETRAINED
from sd_atoms.jobs.results import SCORES, read_scores
from sd_atoms.jobs.sets import SetPlan
from sd_atoms.pipeline.architectures import SD_V1_4, build_unet
from sd_atoms.report.table import text_table
from sd_atoms.sources import packaged_path
from sd_atoms.training.config import TrainConfig
from sd_atoms.training.diffusion import adapter_config, sized
from sd_atoms.training.steps import steps_of

VTAB_1K = 1000  # training images of each task
PNG_BYTES_PER_PX = 2  # of photos in RGB; drawings take a fraction
COPIES = 3  # in a checkpoint: the trained numbers and AdamW's two moments of each, in float32
FLOAT32 = 4  # bytes


def plan_text(plan: SetPlan) -> str:
    """The runs, their steps and images, hours of one device, and disk, as far as that can be said."""
    config = plan.config(plan.runs[0])
    base, known = _unet_config(config.base.base_config or config.base.pretrained_model_name_or_path)
    sizes, images = _train_images(plan), plan.experiment.images
    side = config.data.resolution or 8 * base["sample_size"]
    rows, of_run, total_steps, total_bytes = [], {}, 0, 0
    trained = _trained(plan, base)
    for run in plan.runs:
        own = plan.config(run)
        steps = 0 if run.stage == PRETRAINED else steps_of(own.loop, sizes[run.concept], 1)
        numbers = 0 if run.stage == PRETRAINED else trained[run.method]
        size = images * side**2 * PNG_BYTES_PER_PX + _checkpoints(own, steps) * COPIES * numbers * FLOAT32
        state = "done" if (plan.run_folder(run) / SCORES).exists() else ""
        of_run[run.name] = steps
        rows.append([run.name, f"{steps:,}", f"{images:,}", f"{numbers:,}", f"{size / 1e9:.2f}", state])
        total_steps, total_bytes = total_steps + steps, total_bytes + size
    lines = [text_table(["run", "steps", "images", "trained numbers", "GB", "state"], rows, left=(0, 5)), ""]
    drawn = len(plan.runs) * images
    lines.append(f"{len(plan.runs)} runs on {len(plan.sets)} image sets: {total_steps:,} steps, {drawn:,} images")
    lines.append(_hours(plan, of_run))
    lines.append(
        f"disk: at most about {total_bytes / 1e9:.1f} GB, {PNG_BYTES_PER_PX} bytes a pixel of {side} px and all "
        "checkpoints; checkpoints_total_limit lowers it"
    )
    if not known:
        lines.append("the config of the base's UNet is not at hand: reckoned with that of Stable Diffusion v1-4")
    return "\n".join(lines)


def _hours(plan: SetPlan, steps: Mapping[str, int]) -> str:
    """Stage by stage: by its runs that are done, else by what a step and an image take.

    Args:
        plan: the experiment.
        steps: of each run.
    """
    hours, of_done, guessed, unknown = 0.0, 0, False, []
    per_step, per_image = plan.experiment.step_seconds, plan.experiment.image_seconds
    for stage in dict.fromkeys(run.stage for run in plan.runs):
        runs = [run for run in plan.runs if run.stage == stage]
        done = [run for run in runs if (plan.run_folder(run) / SCORES).exists()]
        if done:
            seconds = [read_scores(plan.run_folder(run) / SCORES)["seconds"] for run in done]
            hours += sum(seconds) / len(seconds) * len(runs) / 3600
            of_done += len(done)
        elif per_step is not None and per_image is not None:
            images = len(runs) * plan.experiment.images
            hours += (sum(steps[run.name] for run in runs) * per_step + images * per_image) / 3600
            guessed = True
        else:
            unknown.append(stage)
    if unknown:
        return "device hours: told once a run of each kind is done, or by step_seconds and image_seconds"
    by = [f"{of_done} runs that are done"] * bool(of_done)
    by += [f"step_seconds ({per_step:g}) and image_seconds ({per_image:g})"] if guessed else []
    return f"device hours: about {hours:.1f}, by {' and '.join(by)}"


def _train_images(plan: SetPlan) -> dict[str, int]:
    """Training images of each set; where one is not on this machine, as VTAB-1k has them."""
    found = {}
    for name, tasks in plan.sets.items():
        try:
            data = plan.config(next(run for run in plan.runs if run.concept == name)).data
            columns = dict(image_column=data.image_column, label_column=data.label_column)
            found[name] = len(task_images(tasks[0], plan.experiment.data_dir, **columns))
        except UserError:
            found[name] = VTAB_1K
    return found


def _trained(plan: SetPlan, base: Mapping[str, Any]) -> dict[str, int]:
    """Trained numbers of each method in the UNet."""
    unet, found = build_unet(dict(base), "meta"), {}
    for run in plan.runs:
        if run.stage != PRETRAINED and run.method not in found:
            config = sized(plan.config(run), unet)
            adapter = adapter_config(unet, config)
            found[run.method] = 0 if adapter is None else config.method.chosen().count(unet, adapter)
    return found


def _checkpoints(config: TrainConfig, steps: int) -> int:
    kept = math.ceil(steps / config.output.checkpointing_steps)
    most = config.output.checkpoints_total_limit
    return kept if most is None else min(kept, most + 1)  # the oldest goes after the newest has come


def _unet_config(base: str) -> tuple[dict[str, Any], bool]:
    """The config of a base's UNet; of one that is not here that of Stable Diffusion v1-4."""
    path = Path(packaged_path(base) or base) / "unet" / "config.json"
    try:
        return json.loads(path.read_text(encoding="utf-8")), True
    except (OSError, ValueError):
        return SD_V1_4, False

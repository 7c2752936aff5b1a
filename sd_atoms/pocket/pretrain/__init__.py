"""How the pocket base is made: pictures and captions, a tokenizer, an autoencoder, a CLIP, a UNet, a judge of
identity, the pipeline.

All of it takes about half a day of two quiet CPU cores with bfloat16 instructions (avx512_bf16). The budgets are in
seconds: slower processors need larger ones for the same number of steps. Every stage can be interrupted: the same
command goes on where it stopped. Under `accelerate launch` (several GPUs) or `torchrun` (several CPU processes) the
training stages average their gradients over the processes; rendering pictures and preparing latents is shared out.
"""

import dataclasses
import importlib
from pathlib import Path

from sd_atoms.errors import UserError
from sd_atoms.files import write_json
from sd_atoms.pocket.pretrain.stages import STAGES, TRAINING_STAGES, TrainingSettings


def pretrain(
    stage: str,
    work_dir: Path,
    *,
    budget_seconds: float | None = None,
    max_steps: int | None = None,
    picture_count: int | None = None,
    from_packaged: bool = False,
) -> None:
    """Runs one stage, or all of them in order; finished stages are skipped.

    Args:
        stage: a key of STAGES, or "all".
        work_dir: holds what the stages hand on to each other; the result is `work_dir`/weights.
        budget_seconds: training time over all resumes; "all" splits it between its training stages in the
            proportions of their defaults. None: the defaults of STAGES.
        max_steps: trains each training stage for exactly so many steps instead of for a time.
        picture_count: training pictures to render; None: the default of STAGES.
        from_packaged: stage unet starts at the packaged weights; `max_steps` counts theirs too.

    Raises:
        UserError: an argument is out of range or does not apply to the stage, an earlier stage is not finished,
            or `work_dir` holds something unusable.
    """
    work_dir = Path(work_dir)
    all_settings = resolve_settings(stage, budget_seconds, max_steps, picture_count, from_packaged)
    import torch
    from accelerate import PartialState

    state = PartialState(cpu=not torch.accelerator.is_available())  # told so, it sees other processes on the CPU too
    for name, settings in all_settings.items():
        finished = finished_path(work_dir, name)
        if finished.exists():
            state.print(f"{name}: finished, skipped ({finished} says how it was made)")
            continue
        for needed in STAGES[name].needs:
            if not finished_path(work_dir, needed).exists():
                raise UserError(f"stage {name!r} needs stage {needed!r} to be finished in {work_dir}; run that first")
        state.print(f"{name}: started in {work_dir}")
        module = importlib.import_module(f"sd_atoms.pocket.pretrain.{name}")
        figures = module.run(work_dir, settings, state)
        state.wait_for_everyone()
        if state.is_main_process:
            write_json(finished, _record(name, settings, figures, state.num_processes))
        state.wait_for_everyone()
        state.print(f"{name}: finished {figures}")


def resolve_settings(
    stage: str,
    budget_seconds: float | None,
    max_steps: int | None,
    picture_count: int | None,
    from_packaged: bool = False,
) -> dict[str, object]:
    """The settings of each stage to run; raises UserError as `pretrain` does."""
    if stage != "all" and stage not in STAGES:
        raise UserError(f"stage {stage!r} is unknown; there is {', '.join(STAGES)} and all")
    names = list(STAGES) if stage == "all" else [stage]
    trained = [name for name in names if name in TRAINING_STAGES]
    for flag, value in (("budget_seconds", budget_seconds), ("max_steps", max_steps)):
        if value is not None and not trained:
            raise UserError(f"{flag}: stage {stage!r} trains nothing; only {', '.join(TRAINING_STAGES)} and all do")
        if value is not None and value <= 0:
            raise UserError(f"{flag} is {value}; it must be positive")
    if budget_seconds is not None and max_steps is not None:
        raise UserError("budget_seconds and max_steps both say when training ends; give one of them")
    if picture_count is not None and "images" not in names:
        raise UserError(f"count: stage {stage!r} renders nothing; only images and all do")
    if picture_count is not None and picture_count <= 0:
        raise UserError(f"count is {picture_count}; it must be positive")
    if from_packaged and "unet" not in names:
        raise UserError(f"from_packaged: stage {stage!r} trains no UNet; only unet and all do")

    resolved = {name: STAGES[name].settings for name in names}
    default_seconds = sum(resolved[name].budget_seconds for name in trained)
    for name in trained:
        if budget_seconds is not None:
            share = resolved[name].budget_seconds / default_seconds
            resolved[name] = dataclasses.replace(resolved[name], budget_seconds=budget_seconds * share)
        if max_steps is not None:
            resolved[name] = dataclasses.replace(resolved[name], max_steps=max_steps)
    if picture_count is not None:
        held_out_count = max(8, picture_count // 24)  # the default's proportion
        resolved["images"] = dataclasses.replace(
            resolved["images"], picture_count=picture_count, held_out_count=held_out_count
        )
    if from_packaged:
        resolved["unet"] = dataclasses.replace(resolved["unet"], from_packaged=True)
    return resolved


def finished_path(work_dir: Path, stage: str) -> Path:
    """The file that says that a stage is finished, and how it was made."""
    return work_dir / "finished" / f"{stage}.json"


def _record(stage: str, settings: object, figures: dict, num_processes: int) -> dict:
    from importlib.metadata import version

    libraries = ("accelerate", "diffusers", "numpy", "pillow", "safetensors", "tokenizers", "torch", "transformers")
    arguments = ""
    if isinstance(settings, TrainingSettings):
        if settings.max_steps is None:
            arguments = f" --budget_seconds {settings.budget_seconds:g}"
        else:
            arguments = f" --max_steps {settings.max_steps}"
    elif stage == "images":
        arguments = f" --count {settings.picture_count}"
    if getattr(settings, "from_packaged", False):
        arguments += " --from_packaged"
    return {
        "command": f"sd-atoms pretrain-pocket {stage} --work_dir WORK_DIR{arguments}",
        "processes": num_processes,
        "settings": dataclasses.asdict(settings),
        "figures": figures,
        "libraries": {name: version(name) for name in libraries},
    }

"""Makes the pocket base again, from its procedural world to the finished folders.

Half a day of two CPU cores with bfloat16 instructions; on slower processors, raise the budgets for the same number of
steps. Interrupt it at any time; the same command goes on where it stopped. Several processes average their gradients:
  torchrun --nproc_per_node 2 -m sd_atoms pretrain-pocket all --work_dir DIR                      (two CPU cores)
  accelerate launch --multi_gpu --num_processes 2 -m sd_atoms pretrain-pocket all --work_dir DIR  (two GPUs)
"""

from dataclasses import dataclass
from pathlib import Path

from sd_atoms.pocket.pretrain import pretrain
from sd_atoms.pocket.pretrain.stages import STAGES, TRAINING_STAGES
from sd_atoms.settings import setting

WHAT = "what is made"
BUDGETS = ", ".join(f"{name} {STAGES[name].settings.budget_seconds:g}" for name in TRAINING_STAGES)


@dataclass(frozen=True)
class Settings:
    """Settings of `sd-atoms pretrain-pocket`."""

    stage: str = setting(
        None, WHAT, f"one of {', '.join(STAGES)}, all", choices=(*STAGES, "all"), required=True, positional=True
    )
    work_dir: str = setting(
        None, WHAT, "folder for everything that is made; ends in its subfolder weights", required=True
    )
    budget_seconds: float | None = setting(
        None, WHAT, f"training time over all resumes; none = {BUDGETS}; with all, split in these proportions"
    )
    max_steps: int | None = setting(None, WHAT, "train for so many steps instead of for a time")
    count: int | None = setting(
        None, WHAT, f"training pictures to render; none = {STAGES['images'].settings.picture_count}"
    )
    from_packaged: bool = setting(
        False, WHAT, "train the UNet on from the packaged weights, instead of from random numbers"
    )


def run(settings: Settings) -> None:
    """Runs the stages; raises UserError as `pretrain` does."""
    pretrain(
        settings.stage,
        Path(settings.work_dir),
        budget_seconds=settings.budget_seconds,
        max_steps=settings.max_steps,
        picture_count=settings.count,
        from_packaged=settings.from_packaged,
    )

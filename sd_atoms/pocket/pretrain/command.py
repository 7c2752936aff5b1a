"""The command `sd-atoms pretrain-pocket`: its arguments, and what they start."""

import argparse
from pathlib import Path

from sd_atoms.pocket.pretrain.settings import STAGES, TRAINING_STAGES

DESCRIPTION = """Makes the pocket base from nothing: half a day of two CPU cores with bfloat16 instructions.
On slower processors, raise the budgets for the same number of steps.
Interrupt it at any time; the same command goes on where it stopped. Several processes average their gradients:
  torchrun --nproc_per_node 2 -m sd_atoms pretrain-pocket all --work_dir DIR                      (two CPU cores)
  accelerate launch --multi_gpu --num_processes 2 -m sd_atoms pretrain-pocket all --work_dir DIR  (two GPUs)"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `run`."""
    parser.description = DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    budgets = ", ".join(f"{name} {STAGES[name].settings.budget_seconds:g}" for name in TRAINING_STAGES)
    default_count = STAGES["images"].settings.picture_count
    parser.add_argument("stage", choices=[*STAGES, "all"], metavar="STAGE", help=f"one of {', '.join(STAGES)}, all")
    parser.add_argument(
        "--work_dir",
        type=Path,
        required=True,
        help="folder for everything that is made; ends in its subfolder weights",
    )
    parser.add_argument(
        "--budget_seconds",
        type=float,
        help=f"training time over all resumes (default: {budgets}); with all, split in these proportions",
    )
    parser.add_argument("--max_steps", type=int, help="train for so many steps instead of for a time")
    parser.add_argument("--count", type=int, help=f"training pictures to render (default: {default_count})")


def run(arguments: argparse.Namespace) -> None:
    """Runs what `add_arguments` parsed; raises UserError as `pretrain` does."""
    from sd_atoms.pocket.pretrain import pretrain

    pretrain(
        arguments.stage,
        arguments.work_dir,
        budget_seconds=arguments.budget_seconds,
        max_steps=arguments.max_steps,
        picture_count=arguments.count,
    )

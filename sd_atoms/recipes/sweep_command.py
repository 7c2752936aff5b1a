"""The words of `sd-atoms sweep`."""

import argparse

from sd_atoms.settings import add_flags
from sd_atoms.training.config import TrainConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what is varied, and every flag of `sd-atoms train`."""
    parser.add_argument(
        "--vary",
        action="append",
        required=True,
        metavar="FIELD=VALUE,VALUE,…",
        help="a setting and its values, such as learning_rate=3e-3,1e-2; several --vary make a grid",
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="YAML file of settings; flags win over it, and --vary over both",
    )
    add_flags(parser, TrainConfig)


def run(arguments: argparse.Namespace) -> None:
    """Trains the grid.

    Raises:
        UserError: the words or the settings are wrong, or no point could be finished.
        Interrupted: Ctrl-C or SIGTERM; a checkpoint of the point is on disk.
    """
    from sd_atoms.recipes.sweep import parse_vary, sweep

    flags = vars(arguments)
    vary, path = parse_vary(flags.pop("vary")), flags.pop("config")
    sweep(vary, flags, path)

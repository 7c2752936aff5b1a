"""The words of `sd-atoms inspect`."""

import argparse
from pathlib import Path

from sd_atoms.errors import UserError

SHOWN = 12


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the adapter, or --arch, and what to do with the numbers."""
    parser.add_argument("adapter", nargs="?", metavar="ADAPTER", help="a folder, one .safetensors file, or a hub id")
    parser.add_argument(
        "--arch",
        choices=("sd-v1-4", "sd-v2-1", "sdxl", "pocket"),
        help="instead of an adapter: what could be adapted in this UNet, and how many numbers that would train",
    )
    parser.add_argument("--base", metavar="MODEL", help="base of the adapter (default: the one it was trained on)")
    parser.add_argument(
        "--top", type=_count, metavar="N", help=f"print the N layers that changed most; 0 = all (default: {SHOWN})"
    )
    parser.add_argument(
        "--plot", type=Path, metavar="FILE.png", help="also draw the atoms and the change of each layer"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all numbers to this file")


def run(arguments: argparse.Namespace) -> None:
    """Prints tables, then writes the files asked for.

    Raises:
        UserError: the words do not go together, the adapter or its base cannot be used, or a file cannot be written.
    """
    if (arguments.adapter is None) == (arguments.arch is None):
        raise UserError("inspect takes either an ADAPTER or --arch; see sd-atoms inspect --help")
    if arguments.arch:
        unused = [f"--{name}" for name in ("base", "top", "plot") if getattr(arguments, name) is not None]
        if unused:
            raise UserError(f"{', '.join(unused)}: for an ADAPTER, not for --arch")
    if arguments.plot and arguments.plot.suffix.lower() != ".png":
        raise UserError(f"--plot {arguments.plot}: the name of a .png file is needed")

    from sd_atoms.files import replacing, write_json
    from sd_atoms.recipes.inspect import draw_adapter, inspect_adapter, inspect_architecture
    from sd_atoms.recipes.inspect_text import adapter_text, architecture_text

    if arguments.arch:
        result = inspect_architecture(arguments.arch)
        print(architecture_text(result))
    else:
        result = inspect_adapter(arguments.adapter, arguments.base)
        print(adapter_text(result, SHOWN if arguments.top is None else arguments.top))
    if arguments.json:
        write_json(arguments.json, result)
    if arguments.plot:
        with replacing(arguments.plot) as temporary:
            draw_adapter(result).savefig(temporary, format="png")


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: an integer from 0 on is allowed")
    return int(text)

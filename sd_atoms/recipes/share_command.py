"""The words of `sd-atoms share`."""

import argparse
import shlex
from pathlib import Path

from sd_atoms.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the run and where it goes. A token is no flag: the hub library has its own login."""
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder with a finished adapter")
    parser.add_argument(
        "--hub_model_id", metavar="OWNER/NAME", help="its id on the hub, which the model card tells how to load"
    )
    parser.add_argument(
        "--push_to_hub",
        action="store_true",
        help="upload it; log in with `hf auth login` (default id: your name and the run's)",
    )
    parser.add_argument("--private", action="store_true", help="make the repository private if it is new")


def run(arguments: argparse.Namespace) -> None:
    """Writes RUN/share, uploads it if asked to, and says what is there.

    Raises:
        UserError: the words do not go together, the run is not finished, a place cannot be written to, or the hub did
            not take it.
    """
    if arguments.private and not arguments.push_to_hub:
        raise UserError("--private: only for --push_to_hub")

    from sd_atoms.recipes.share import CARD, PICTURES, own_repo_id, push, write_share_folder

    repo_id = arguments.hub_model_id
    if repo_id is None and arguments.push_to_hub:
        repo_id = own_repo_id(arguments.run)
    folder = write_share_folder(arguments.run, repo_id)
    files = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    pictures = [path.name for path in files if path.parts[0] == PICTURES]
    grids = [name for name in pictures if name.endswith("grid.png")]
    adapter = [str(path) for path in files if path.name != CARD and path.parts[0] != PICTURES]
    note = f"; {', '.join(grids)} with the training pictures in it" if grids else ""
    print(f"Written to {folder}:")
    print(f"  {CARD}: the model card; look through it before others do")
    print(f"  {', '.join(adapter)}: the adapter, as a folder and as one file")
    print(f"  {PICTURES}/: {len(pictures)} pictures{note}")
    if arguments.push_to_hub:
        print(f"Uploaded to {push(folder, repo_id, arguments.private)}")
    source = repo_id if arguments.push_to_hub else folder
    print(f"\nTo load it: load_atoms(pipe, {str(source)!r})")
    if not arguments.push_to_hub:
        words = ["sd-atoms", "share", str(arguments.run), "--hub_model_id", repo_id or "owner/name", "--push_to_hub"]
        print(f"To upload it: {shlex.join(words)}")

"""Makes a finished run a folder to give away, and uploads it if asked to.

What is shared says nothing of the machine: headers hold no local path in the first place, and what an older run wrote
is written again without.
"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from sd_atoms.errors import UserError
from sd_atoms.files import parse_json, replacing_folder, write_text
from sd_atoms.generation.png import image_notes, save_image
from sd_atoms.pipeline.artefact import Artefact
from sd_atoms.pipeline.artefact_files import CONFIG_FILE, TOKENS_FILE, read_artefact, write_artefact
from sd_atoms.pipeline.hub import check_repo_id, own_repo_id, push
from sd_atoms.report.card import AdapterFile, CardImage, model_card
from sd_atoms.settings import coerced, read_yaml, setting
from sd_atoms.sources import public_name
from sd_atoms.training.adapter import checkpoint_of, open_adapter, run_of
from sd_atoms.training.config import TrainConfig
from sd_atoms.training.run_folder import ADAPTER, CONFIG, ENVIRONMENT, IMAGES, METRICS, SHARE

CARD, PICTURES = "README.md", "pictures"
MOST_PICTURES, FEWEST_PICTURES = 8, 4


@dataclass(frozen=True)
class Settings:
    """Settings of `sd-atoms share`. A token is no flag: the hub library has its own login."""

    run: str = setting(
        None, "sharing", "a run folder with a finished adapter, or a run's checkpoint", required=True, positional=True
    )
    hub_model_id: str | None = setting(
        None, "sharing", "its id on the hub, owner/name, which the model card tells how to load; none = yours"
    )
    push_to_hub: bool = setting(False, "sharing", "upload it; log in with `hf auth login`")
    hub_private_repo: bool = setting(False, "sharing", "make the repository private if it is new", aliases=["private"])


def run(settings: Settings) -> None:
    """Writes RUN/share, uploads it if asked to, and says what is there.

    Raises:
        UserError: the settings do not go together, the run is not finished, a place cannot be written to, or the hub
            did not take it.
    """
    if settings.hub_private_repo and not settings.push_to_hub:
        raise UserError("--hub_private_repo: only for --push_to_hub")
    checkpoint = checkpoint_of(settings.run)
    run_folder = Path(settings.run) if checkpoint is None else run_of(checkpoint)
    repo_id = settings.hub_model_id
    if repo_id is None and settings.push_to_hub:
        repo_id = own_repo_id(run_folder)
    folder = write_share_folder(run_folder, repo_id, checkpoint)
    files = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    pictures = [path.name for path in files if path.parts[0] == PICTURES]
    grids = [name for name in pictures if name.endswith("grid.png")]
    adapter = [str(path) for path in files if path.name != CARD and path.parts[0] != PICTURES]
    note = f"; {', '.join(grids)} with the training pictures in it" if grids else ""
    print(f"Written to {folder}:")
    print(f"  {CARD}: the model card; look through it before others do")
    print(f"  {', '.join(adapter)}: the adapter, as a folder and as one file")
    print(f"  {PICTURES}/: {len(pictures)} pictures{note}")
    if settings.push_to_hub:
        print(f"Uploaded to {push(folder, repo_id, settings.hub_private_repo)}")
    source = repo_id if settings.push_to_hub else folder
    load = "load_atoms" if read_artefact(folder).is_atoms else "load_adapter"
    print(f"\nTo load it: {load}(pipe, {str(source)!r})")
    if not settings.push_to_hub:
        words = ["sd-atoms", "share", settings.run, "--hub_model_id", repo_id or "owner/name", "--push_to_hub"]
        print(f"To upload it: {shlex.join(words)}")


def write_share_folder(run: Path, repo_id: str | None, checkpoint: Path | None = None) -> Path:
    """Writes <run>/share/: model card, the adapter as a folder and as one file, pictures; replaces an older one.

    Args:
        run: a run folder whose training is finished, unless a checkpoint is given.
        repo_id: the id that the card tells its reader to load, "owner/name"; None = the file beside the card.
        checkpoint: of the run; what it holds is shared in place of the finished adapter. Pictures and scores are of
            that one, and come with it only if both are the same.

    Returns:
        The folder: `load_atoms` takes it as it is. It appears whole or not at all.

    Raises:
        UserError: there is no finished adapter, a file of the run is corrupt, or the place cannot be written to.
    """
    if repo_id is not None:
        check_repo_id(repo_id)
    artefact, name, finished = _adapter(run, checkpoint)
    config = _recorded_settings(run / CONFIG)
    names = ("pretrained_model_name_or_path", "clip_model_name_or_path")  # which the card tells
    config |= {key: public_name(config[key]) for key in names if isinstance(config.get(key), str)}
    metrics, environment = _read_json(run / METRICS) if finished else {}, _read_json(run / ENVIRONMENT)
    base = artefact.about.get("base")
    about = artefact.about | ({"base": public_name(base)} if isinstance(base, str) else {})
    drawn, grids = _pictures(run / IMAGES) if finished else ([], [])
    shown = _spread(drawn, MOST_PICTURES)

    with replacing_folder(run / SHARE) as folder:
        write_artefact(replace(artefact, about=about), folder)
        write_artefact(replace(artefact, about=about), folder / name)
        for path in [*shown, *grids]:
            notes = image_notes(path)
            if "base" in notes:
                notes["base"] = public_name(notes["base"])
            with Image.open(path, formats=["PNG"]) as image:
                save_image(folder / PICTURES / path.name, image, notes)
        try:
            card = model_card(
                config,
                about | {"versions": environment.get("versions", about.get("versions", {}))},
                metrics,
                [CardImage(f"{PICTURES}/{path.name}", image_notes(path).get("prompt", "")) for path in shown],
                AdapterFile(name, (folder / name).stat().st_size),
                grids=[f"{PICTURES}/{path.name}" for path in grids],
                drawn=len(drawn),
                repo_id=repo_id,
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:  # their values are of kinds of their own
            raise UserError(
                f"{run}: {METRICS} or {ENVIRONMENT} does not hold what a run writes there ({error})"
            ) from error
        write_text(folder / CARD, card)
    return run / SHARE


def _recorded_settings(path: Path) -> dict[str, Any]:
    """The settings that a run wrote down, each of the kind and range that training takes."""
    recorded = read_yaml(path)
    for name, value in recorded.items():
        try:
            coerced(TrainConfig, name, value)
        except ValueError as error:
            raise UserError(f"{path}: {name}: {error}") from error
    return recorded


def _adapter(run: Path, checkpoint: Path | None) -> tuple[Artefact, str, bool]:
    """What is shared, the name of its file, and whether it is what the run ended with."""
    if checkpoint is None:
        artefact, file = _finished_adapter(run)
        return artefact, file.name, True
    artefact = open_adapter(str(checkpoint))
    try:
        finished, file = _finished_adapter(run)
        if finished.digest() == artefact.digest():
            return finished, file.name, True
    except UserError:  # the run goes on
        pass
    return artefact, f"{run.resolve().name}-{artefact.about['training']['steps']}.safetensors", False


def _finished_adapter(run: Path) -> tuple[Artefact, Path]:
    """The adapter of a run, and the file that holds the same."""
    if not run.is_dir():
        raise UserError(f"{run}: no such run folder")
    if not (run / CONFIG).exists():
        raise UserError(f"{run}: not a run folder, {CONFIG} is missing")
    if not any((run / ADAPTER / name).exists() for name in (CONFIG_FILE, TOKENS_FILE)):
        raise UserError(f"{run}: holds no finished adapter, {ADAPTER}/ lacks it; train it to its end first")
    artefact = read_artefact(run / ADAPTER)
    for path in sorted(run.glob("*.safetensors"), key=lambda path: path.stat().st_size):  # an export may be large
        try:
            if not path.name.startswith(".") and read_artefact(path).digest() == artefact.digest():
                return artefact, path
        except UserError:  # another file of the user's
            continue
    raise UserError(f"{run}: no .safetensors file in it holds what {ADAPTER}/ holds; train it to its end first")


def _pictures(folder: Path) -> tuple[list[Path], list[Path]]:
    """The pictures with the adapter, of templates if there are enough of them, and the contact sheets."""

    def adapted(pattern: str) -> list[Path]:
        return [path for path in sorted(folder.glob(pattern)) if image_notes(path).get("adapter") != "none"]

    drawn = adapted("*prompt-[0-9]*.png")
    if len(drawn) < FEWEST_PICTURES:
        drawn += adapted("*instance-[0-9]*.png")[: FEWEST_PICTURES - len(drawn)]
    return drawn, sorted(folder.glob("*grid.png"))


def _spread(items: Sequence[Path], most: int) -> list[Path]:
    """At most so many of them, the first, the last and some at even distances between."""
    if len(items) <= most:
        return list(items)
    return [items[round(place * (len(items) - 1) / (most - 1))] for place in range(most)]


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is no file, as a run that was stopped while drawing has no scores."""
    if not path.exists():
        return {}
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: must hold a JSON object, got a {type(value).__name__}")
    return value

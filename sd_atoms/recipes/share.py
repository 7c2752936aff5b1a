"""A finished run as a folder to give away, and the way from there to the hub: the job of `sd-atoms share`.

What is shared says nothing of the machine: local paths are reduced to their last part in the card, in the headers of
the safetensors files, in the JSON files and in the text of the pictures. Numbers and pixels stay as they are.
"""

import json
import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any

from huggingface_hub import HfApi
from PIL import Image

from sd_atoms.errors import UserError
from sd_atoms.files import parse_json, replacing, write_json, write_text
from sd_atoms.generation import picture_notes, save_picture
from sd_atoms.pipeline import Artefact, read_artefact
from sd_atoms.report.card import AdapterFile, Picture, model_card
from sd_atoms.settings import read_yaml
from sd_atoms.training.run_folder import ADAPTER, CONFIG, ENVIRONMENT, IMAGES, METRICS, SHARE

CARD, PICTURES = "README.md", "pictures"
MOST_PICTURES, FEWEST_PICTURES = 8, 4
# what an earlier push may have left that this one lacks, and that a reader would take for a part of it
REPLACED = ("pictures/*.png", "learned_embeds.safetensors", "text_encoder/adapter_*")


def write_share_folder(run: Path, repo_id: str | None) -> Path:
    """Writes <run>/share/: model card, the adapter as a folder and as one file, pictures; replaces an older one.

    Args:
        run: a run folder whose training is finished.
        repo_id: the id that the card tells its reader to load, "owner/name"; None = the file beside the card.

    Returns:
        The folder: `load_atoms` takes it as it is. It appears whole or not at all.

    Raises:
        UserError: there is no finished adapter, a file of the run is corrupt, or the place cannot be written to.
    """
    run = Path(run)
    if repo_id is not None:
        check_repo_id(repo_id)
    artefact, file = _finished_adapter(run)
    config = public(read_yaml(run / CONFIG))
    metrics, environment = _read_json(run / METRICS), _read_json(run / ENVIRONMENT)
    about = public(artefact.about)
    about["versions"] = environment.get("versions", about.get("versions", {}))
    drawn, grids = _pictures(run / IMAGES)
    shown = _spread(drawn, MOST_PICTURES)

    with _replacing_folder(run / SHARE) as folder:
        for source in _adapter_files(run / ADAPTER):
            target = folder / source.relative_to(run / ADAPTER)
            if source.suffix == ".json":
                write_json(target, public(_read_json(source)))
            else:
                _copy_tensors(source, target)
        _copy_tensors(file, folder / file.name)
        for path in [*shown, *grids]:
            notes = picture_notes(path)
            with Image.open(path, formats=["PNG"]) as image:
                save_picture(folder / PICTURES / path.name, image, public(notes))
        pictures = [Picture(f"{PICTURES}/{path.name}", picture_notes(path).get("prompt", "")) for path in shown]
        card = model_card(
            config,
            about,
            metrics,
            pictures,
            AdapterFile(file.name, (folder / file.name).stat().st_size),
            grids=[f"{PICTURES}/{path.name}" for path in grids],
            drawn=len(drawn),
            repo_id=repo_id,
        )
        write_text(folder / CARD, card)
    return run / SHARE


def push(folder: Path, repo_id: str, private: bool) -> str:
    """Uploads a folder of `write_share_folder` to the hub, as whoever is logged in there; returns its address.

    Args:
        folder: <run>/share.
        repo_id: "owner/name"; the repository is made if it is not there, and keeps its other files.
        private: whether a new repository is private; False leaves it to the owner's default.

    Raises:
        UserError: the hub did not take it; the folder is complete all the same.
    """
    check_repo_id(repo_id)
    try:
        api = HfApi()
        url = str(api.create_repo(repo_id, private=private or None, exist_ok=True))
        api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message="Filter atoms, pictures and model card",
            delete_patterns=list(REPLACED),
        )
    except Exception as error:  # the hub library raises a dozen kinds, of its own and of the network's
        again = ["sd-atoms", "share", str(Path(folder).parent), "--hub_model_id", repo_id, "--push_to_hub"]
        command = shlex.join(again + ["--private"] * private)
        raise UserError(
            f"push_to_hub: {repo_id} was not uploaded ({_reason(error)}); {folder} is complete, "
            f"try again with: {command}"
        ) from error
    return url


def own_repo_id(run: Path) -> str:
    """<who is logged in>/<name of the run folder>.

    Raises:
        UserError: nobody is logged in, the hub cannot be reached, or the run's name cannot be an id.
    """
    try:
        owner = HfApi().whoami()["name"]
    except Exception as error:
        raise UserError(
            f"hub_model_id: none given, and who is logged in cannot be found out ({_reason(error)}); "
            "pass --hub_model_id owner/name, or log in with `hf auth login`"
        ) from error
    name = re.sub(r"([^A-Za-z0-9._]|\.\.+)+", "-", Path(run).resolve().name).strip("-.")
    return check_repo_id(f"{owner}/{name}")


def check_repo_id(repo_id: str) -> str:
    """The id itself, if the hub could have it.

    Raises:
        UserError: it is not of the form owner/name.
    """
    part = r"(?!.*(--|\.\.))[A-Za-z0-9_]([A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"
    owner, _, name = repo_id.partition("/")
    if not (re.fullmatch(part, owner) and re.fullmatch(part, name)) or name.endswith(".git"):
        raise UserError(
            f"hub_model_id: {repo_id!r} is not of the form owner/name, of letters, digits and single . _ - in between"
        )
    return repo_id


def public(value: Any) -> Any:
    """The same with local paths reduced to their last part, at any depth.

    Entries called …fingerprint (numbers as text) or …prompt (sentences) are no paths, whatever they begin with.
    """
    if isinstance(value, dict):
        return {
            key: own if str(key).endswith(("fingerprint", "prompt")) else public(own) for key, own in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [public(own) for own in value]
    if isinstance(value, str) and _is_local(value):
        return PurePath(value.replace("\\", "/")).name or "local"
    return value


def _is_local(text: str) -> bool:
    """Whether it is a path, and neither a hub id nor a sentence."""
    if re.match(r"[/~\\]|\.\.?[/\\]|file:|[A-Za-z]:[/\\]", text):
        return True
    if "://" in text or not re.search(r"[/\\]", text):
        return False
    return os.path.exists(text) or (" " not in text and len(re.findall(r"[/\\]", text)) > 1)


def _finished_adapter(run: Path) -> tuple[Artefact, Path]:
    """The adapter of a run, and the file that holds the same."""
    if not run.is_dir():
        raise UserError(f"{run}: no such run folder")
    if not (run / CONFIG).exists():
        raise UserError(f"{run}: not a run folder, {CONFIG} is missing")
    if not (run / ADAPTER / "adapter_config.json").exists():
        raise UserError(f"{run}: holds no finished adapter, {ADAPTER}/ lacks it; train it to its end first")
    artefact = read_artefact(run / ADAPTER)
    for path in sorted(run.glob("*.safetensors"), key=lambda path: path.stat().st_size):  # an export may be large
        try:
            if not path.name.startswith(".") and read_artefact(path).digest() == artefact.digest():
                return artefact, path
        except UserError:  # another file of the user's
            continue
    raise UserError(f"{run}: no .safetensors file in it holds what {ADAPTER}/ holds; train it to its end first")


def _adapter_files(folder: Path) -> list[Path]:
    """The files of an adapter folder, with those of a text_encoder/ in it."""
    found = sorted([*folder.glob("**/adapter_config.json"), *folder.glob("**/*.safetensors")])
    return [path for path in found if not path.name.startswith(".")]


def _pictures(folder: Path) -> tuple[list[Path], list[Path]]:
    """The pictures with the adapter, of templates if there are enough of them, and the contact sheets."""

    def adapted(pattern: str) -> list[Path]:
        return [path for path in sorted(folder.glob(pattern)) if picture_notes(path).get("adapter") != "none"]

    drawn = adapted("*prompt-[0-9]*.png")
    if len(drawn) < FEWEST_PICTURES:
        drawn += adapted("*instance-[0-9]*.png")[: FEWEST_PICTURES - len(drawn)]
    return drawn, sorted(folder.glob("*grid.png"))


def _spread(items: Sequence[Path], most: int) -> list[Path]:
    """At most so many of them, the first, the last and some at even distances between."""
    if len(items) <= most:
        return list(items)
    return [items[round(place * (len(items) - 1) / (most - 1))] for place in range(most)]


def _copy_tensors(source: Path, target: Path) -> None:
    """Copies a safetensors file with a public header; the numbers stay byte for byte.

    Such a file is the length of its header (8 bytes, little-endian), the header as JSON, the numbers.
    """
    try:
        with open(source, "rb") as original, replacing(target) as temporary, open(temporary, "wb") as copy:
            length = int.from_bytes(original.read(8), "little")
            if length > source.stat().st_size:
                raise ValueError("its header is cut off")
            header = json.loads(original.read(length))
            if "__metadata__" in header:
                entries = header["__metadata__"].items()
                header["__metadata__"] = {key: _public_entry(key, text) for key, text in entries}
            text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
            text += b" " * (-len(text) % 8)  # numbers begin at a multiple of 8 bytes
            copy.write(len(text).to_bytes(8, "little") + text)
            shutil.copyfileobj(original, copy)
    except (ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{source}: corrupt or not a safetensors file ({error})") from error


def _public_entry(key: str, text: str) -> str:
    """An entry of the header: text, or JSON as text."""
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if isinstance(value, (dict, list)):
        return json.dumps(public(value), ensure_ascii=False, separators=(",", ":"))
    return public({key: text})[key]


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


@contextmanager
def _replacing_folder(folder: Path) -> Iterator[Path]:
    """Yields an empty folder that becomes `folder` on a clean exit; on any error what stood there stays."""
    work = None
    try:
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder}: is a file; a folder is to be written there")
        work = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        new, old = work / "new", work / "old"
        new.mkdir()
        yield new
        if folder.exists():
            folder.rename(old)
        try:
            new.rename(folder)
        except OSError:
            old.rename(folder)
            raise
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror or error})") from error
    finally:
        if work is not None:
            shutil.rmtree(work, ignore_errors=True)


def _reason(error: Exception) -> str:
    """An error of the hub in a few words on one line, without the token that the line may quote."""
    line = " ".join(str(error).split())
    line = re.sub(r"([Bb]earer\s+|hf_)[^\s'\"]+", "…", line)
    kind = type(error).__name__
    return f"{kind}: {line[:200]}" if line else kind

"""Adapters on the hub: ids, and uploading a folder."""

import re
import shlex
import warnings
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import LocalTokenNotFoundError

from sd_atoms.errors import AtomsWarning, UserError

# what an earlier push may have left that this one lacks, and that a reader would take for a part of it
REPLACED = ("pictures/*.png", "learned_embeds.safetensors", "text_encoder/adapter_*")


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
            commit_message="Adapter, pictures and model card",
            delete_patterns=list(REPLACED),
        )
    except Exception as error:  # the hub library raises a dozen kinds, of its own and of the network's
        again = ["sd-atoms", "share", str(Path(folder).parent), "--hub_model_id", repo_id, "--push_to_hub"]
        command = shlex.join(again + ["--hub_private_repo"] * private)
        raise UserError(
            f"push_to_hub: {repo_id} was not uploaded ({_reason(error)}); {folder} is complete, "
            f"try again with: {command}"
        ) from error
    return url


def who_may_push() -> list[str]:
    """Who is logged in at the hub, and the organisations that they belong to; asked before hours of work.

    Raises:
        UserError: nobody is logged in, or the token is refused or may not write.

    Warns:
        AtomsWarning: the hub cannot be reached; nobody is known then, and the list is empty.
    """
    try:
        who = HfApi().whoami()
    except Exception as error:
        refused = getattr(getattr(error, "response", None), "status_code", None) in (401, 403)
        if refused or isinstance(error, LocalTokenNotFoundError):
            raise UserError(f"push_to_hub: log in with `hf auth login` first ({_reason(error)})") from error
        text = f"push_to_hub: the hub cannot be reached now ({_reason(error)}); the upload will be tried at the end"
        warnings.warn(text, AtomsWarning, stacklevel=2)
        return []
    if who.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise UserError("push_to_hub: the token that is logged in may only read; make one that may write")
    return [who["name"], *(group["name"] for group in who.get("orgs", []))]


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


def _reason(error: Exception) -> str:
    """An error of the hub in a few words on one line, without the token that the line may quote."""
    line = " ".join(str(error).split())
    line = re.sub(r"([Bb]earer\s+|hf_)[^\s'\"]+", "…", line)
    kind = type(error).__name__
    return f"{kind}: {line[:200]}" if line else kind

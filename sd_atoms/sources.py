"""Where things come from: packaged with sd_atoms, a file or folder, or the hub."""

import os
import re
from pathlib import Path, PurePath

from sd_atoms.errors import UserError

_PACKAGE = Path(__file__).parent
_PACKAGED = {
    "pocket": _PACKAGE / "pocket" / "weights" / "pocket-sd",  # a StableDiffusionPipeline
    "pocket:clip": _PACKAGE / "pocket" / "weights" / "pocket-clip",  # the CLIPModel that scores its images
    "pocket:judge": _PACKAGE / "pocket" / "weights" / "pocket-judge",  # tells whether two show one landmark
    "pocket:castle": _PACKAGE / "pocket" / "concepts" / "castle",  # five photos of a personal concept
    "pocket:canal": _PACKAGE / "pocket" / "concepts" / "canal",
}


def packaged_path(name: str) -> Path | None:
    """The folder behind a packaged name; None for any name that is not one, such as a path or a hub id.

    Raises:
        UserError: `name` begins with "pocket:" but nothing of that name is packaged.
    """
    there = {packaged: path for packaged, path in _PACKAGED.items() if path.is_dir()}
    if name not in there and name.startswith("pocket:"):
        raise UserError(f"{name!r} is not packaged; there is {', '.join(there)}")
    return there.get(name)


def packaged_file(name: str, folder: str, suffix: str) -> Path | None:
    """The file behind the short name of a packaged one: ("pocket/castle", "configs", ".yaml"), ("few_shot",
    "prompts", ".txt"); None where there is none.

    An installed package holds such folders inside it, a checkout beside it.
    """
    if not re.fullmatch(r"[\w-]+(/[\w-]+)*", name):
        return None
    for place in (_PACKAGE / folder, _PACKAGE.parent / folder):
        path = place / f"{name}{suffix}"
        if path.is_file():
            return path
    return None


def resolve_source(name: str, field: str) -> str:
    """Tells a folder from a hub id before anything is opened.

    Raises:
        UserError: `name` is neither.
    """
    path = Path(name).expanduser()
    if path.exists():
        return str(path)
    looks_local = name.startswith((".", "/", "~")) or (os.sep != "/" and os.sep in name) or name.count("/") != 1
    if looks_local or not all(name.split("/")):
        raise UserError(f"{field}: {name!r} is neither an existing path nor a hub id of the form owner/name")
    return name


def public_name(name: str) -> str:
    """What others may be told of a source: a packaged name or a hub id as it is, of a local path its last part."""
    if name.split(":")[0] == "pocket" or (is_hub_id(name) and not Path(name).exists()):
        return name
    return PurePath(name.replace("\\", "/")).name or "local"


def is_hub_id(name: str) -> bool:
    """Whether a name is of the form owner/name."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name, re.ASCII) is not None

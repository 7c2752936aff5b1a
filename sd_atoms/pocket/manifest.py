"""The manifest of a weights folder: what each file must contain, and how the files were made."""

import hashlib
from pathlib import Path

WEIGHTS_FOLDER = Path(__file__).parent / "weights"
MANIFEST_NAME = "manifest.json"


def file_entries(folder: Path) -> dict[str, dict[str, int | str]]:
    """Size and sha256 of every file under `folder` except its manifest, by relative path with forward slashes."""
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file() and path.name != MANIFEST_NAME)
    return {path.relative_to(folder).as_posix(): file_entry(path) for path in files}


def file_entry(path: Path) -> dict[str, int | str]:
    """Size and sha256 of one file."""
    content = path.read_bytes()
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}

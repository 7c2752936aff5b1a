"""Writing files so that a reader never meets half of one."""

import contextlib
import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sd_atoms.errors import UserError

# what a file system says that cannot do such a thing: shares of other systems, FUSE, some containers
_CANNOT = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)
_UNSAFE = re.compile(r"[^\w.+-]+")
_TEMPORARY = re.compile(r"\.(?P<name>.+)\.[a-z0-9_]{8}(?P<suffix>\.[^.]+)")  # as `replacing` calls them


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on a clean exit it is synced to disk and renamed to `path`.

    On any error the temporary file is removed and whatever stood at `path` is left as it was.

    Raises:
        UserError: the folder cannot be written to, or the disk is full.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        with open(temporary, "rb") as file:
            _if_possible(os.fsync, file.fileno())
        _if_possible(os.chmod, temporary, 0o666 & ~_umask())  # mkstemp makes files that only their owner can read
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except Exception as error:
        number = _error_number(error)
        if number in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"{path}: no space left on the disk; nothing was overwritten") from error
        if number in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
            raise UserError(f"{path}: cannot be written ({os.strerror(number)})") from error
        raise
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
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


def safe_name(label: str) -> str:
    """A label as the name of a file or folder, on any system and without surprises in a shell."""
    return _UNSAFE.sub("_", label).strip("._-") or "_"


def leftovers(folder: str | os.PathLike) -> list[Path]:
    """Temporary files of `replacing` anywhere in a folder: what a killed process could not remove."""
    found = [(path, _TEMPORARY.fullmatch(path.name)) for path in Path(folder).rglob(".*")]
    return [path for path, match in found if match and Path(match["name"]).suffix == match["suffix"]]


def check_outputs(overwrite: bool, **paths: str | None) -> None:
    """Whether results may be written to files; before the work whose results they are.

    Args:
        overwrite: whether what stands there may be replaced.
        paths: flag -> the file it names, None without one.

    Raises:
        UserError: a file exists and may not be replaced, is a folder, or is named twice.
    """
    named = {flag: Path(path) for flag, path in paths.items() if path is not None}
    for flag, path in named.items():
        twice = [other for other in named if other != flag and named[other].absolute() == path.absolute()]
        if twice:
            raise UserError(f"--{flag} {path}: --{twice[0]} names the same file")
        if path.is_dir():
            raise UserError(f"--{flag} {path}: is a folder; the name of a file is needed")
        if path.exists() and not overwrite:
            raise UserError(f"--{flag} {path}: exists; pass --overwrite to replace it, or another name")


def parse_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is none, or a string in it holds half a surrogate pair, which JSON can spell but no file hold.
    """
    value = json.loads(text)
    json.dumps(value, ensure_ascii=False).encode()
    return value


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes `text` as UTF-8, all or nothing."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, value: object) -> None:
    """Writes `value` as indented JSON, all or nothing."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _error_number(error: Exception) -> int | None:
    """The operating system's number of an error; the safetensors library hides it in its text."""
    if isinstance(error, OSError):
        return error.errno
    hidden = re.search(r"\(os error (\d+)\)", str(error))
    return int(hidden[1]) if hidden else None


def _if_possible(call: Callable[..., None], *arguments: Any) -> None:
    """Calls it, and passes over that the file system has no such thing; the file is written without."""
    try:
        call(*arguments)
    except OSError as error:
        if error.errno not in _CANNOT:
            raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    """Makes the rename itself survive a power cut; a no-op where folders cannot be opened (Windows)."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _if_possible(os.fsync, descriptor)
    finally:
        os.close(descriptor)

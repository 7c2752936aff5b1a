"""Files are written whole or not at all, on any file system."""

import errno
import os
from pathlib import Path

import pytest

from sd_atoms.errors import UserError
from sd_atoms.files import write_text


@pytest.mark.parametrize("call", ["chmod", "fsync"])
@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS])
def test_what_a_file_system_cannot_do_is_left_out(tmp_path, monkeypatch, call, number):
    def refuse(*arguments):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, refuse)
    write_text(tmp_path / "a.txt", "β")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "β"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_file_that_did_not_reach_the_disk_replaces_none(tmp_path, monkeypatch, number):
    (tmp_path / "a.txt").write_text("before")

    def fail(descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError if number == errno.EIO else UserError):
        write_text(tmp_path / "a.txt", "after")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert Path(tmp_path / "a.txt").read_text() == "before"

"""Files are written whole or not at all, on any file system."""

import contextlib
import errno
import os
from pathlib import Path

import pytest

from sd_atoms.cli import VERBS, main
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


# commands with files of results, and what else they ask for
RESULTS = {
    "drift": ["--adapter", "none", "--prompts", "none", "--clip_model_name_or_path", "none"],
    "evaluate": ["none", "--networks", "none"],
    "inspect": ["none"],
    **{f"bench {name}": [] for name in VERBS["bench"]},
}


@pytest.mark.parametrize("command", RESULTS)
def test_a_result_that_exists_is_refused_before_the_work_unless_asked_for(command, tmp_path, monkeypatch, capsys):
    file, folder = tmp_path / "a.json", tmp_path / "b"
    file.write_text("{}")
    folder.mkdir()
    words = [*command.split(), *RESULTS[command]]
    for name in VERBS["bench"]:  # what would take its time
        monkeypatch.setattr(f"sd_atoms.commands.bench.{name}.bench_{name}", lambda *args, **more: 1 / 0)
    assert main([*words, "--json", str(file)]) == 2
    assert f"--json {file}: exists; pass --overwrite to replace it" in capsys.readouterr().err
    assert main([*words, "--json", str(folder), "--overwrite"]) == 2
    assert f"--json {folder}: is a folder" in capsys.readouterr().err
    with contextlib.suppress(ZeroDivisionError):
        assert main([*words, "--json", str(file), "--overwrite"]) == 2
        assert "none" in capsys.readouterr().err  # goes on to what is wrong with the rest
    assert file.read_text() == "{}"


def test_two_results_need_two_names(tmp_path, capsys):
    file = str(tmp_path / "a.png")
    assert main(["inspect", "none", "--json", file, "--plot", file]) == 2
    assert f"--plot {file}: --json names the same file" in capsys.readouterr().err

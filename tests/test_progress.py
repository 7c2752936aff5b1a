"""A log file gets lines, a terminal a bar."""

import sys
from itertools import count
from unittest import mock

from tqdm import tqdm

from sd_atoms.progress import Lines, progress_bar


def test_a_log_file_gets_a_line_every_half_minute(monkeypatch, capsys):
    seconds = count(0, 12)
    monkeypatch.setattr("sd_atoms.progress.time.monotonic", lambda: next(seconds))
    with progress_bar(120, "Training", "step", initial=20) as bar:
        for step in range(100):
            bar.set_postfix(loss=f"0.{step:03d}")
            bar.update()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Training: step 23 of 120, loss 0.002, 12.0 s a step, 19:24 left"
    assert len(lines) == 33


def test_nothing_done_takes_no_time_each(monkeypatch, capsys):
    seconds = count(0, 40)
    monkeypatch.setattr("sd_atoms.progress.time.monotonic", lambda: next(seconds))
    with progress_bar(3, "Runs", "run", initial=1) as bar:
        bar.update(0)
    assert capsys.readouterr().err == ""


def test_a_quick_run_says_nothing_in_between_and_other_processes_never_do(capsys):
    for main in (True, False):
        with progress_bar(3, "Pictures", "picture", main=main) as bar:
            bar.update(3)
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar():
    with (
        mock.patch.object(sys.stderr, "isatty", return_value=True, create=True),
        progress_bar(3, "Training", "step") as bar,
    ):
        assert isinstance(bar, tqdm)
        assert not bar.disable
    assert isinstance(progress_bar(3, "Training", "step"), Lines)

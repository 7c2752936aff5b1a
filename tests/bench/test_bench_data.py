"""`bench data`: sets of pictures, from nothing and from the cache."""

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

import sd_atoms
from sd_atoms.bench import data
from sd_atoms.cli import main
from sd_atoms.commands.bench.data import Settings
from sd_atoms.machine import GIVEN_CORES, usable_cores

NOTHING = [sys.executable, "-c", "import time; time.sleep(0.3)"]


@pytest.mark.slow
def test_data_measures_sets_and_their_draws(bench, tmp_path):
    printed = bench("data", "--sizes", "6", "--folder", str(tmp_path), "--json", str(tmp_path / "data.json"))
    (entry,) = json.loads((tmp_path / "data.json").read_text())["sets"]
    assert entry["pictures"] == len(list((tmp_path / "6").iterdir())) == 6
    assert min(entry[key] for key in entry if key.endswith(("_per_second", "_per_draw"))) > 0
    assert "check + encode s" in printed


@pytest.mark.parametrize("sizes", ["", "5,", "0", "many", "-1"])
def test_sizes_that_are_none_are_refused(sizes, capsys):
    assert main(["bench", "data", "--sizes", sizes]) == 2
    assert "integers from 1 on" in capsys.readouterr().err


def test_every_set_is_first_trained_on_from_nothing_with_the_cores_asked_for_and_no_card(bench, tmp_path, monkeypatch):
    started, popen = [], subprocess.Popen

    def training(command, env, **streams):
        """Leaves a log and a cache as one does, and says what it began with."""
        flags = dict(pairwise(command))
        cache, out = Path(flags["--cache_dir"]), Path(flags["--output_dir"])
        started.append((Path(flags["--instance_data_dir"]).name, cache.exists()))
        assert env[GIVEN_CORES] == "1"
        assert env["ACCELERATE_USE_CPU"] == "true"
        assert env["CUDA_VISIBLE_DEVICES"] == ""
        assert env["PYTHONPATH"].split(os.pathsep)[0] == str(Path(sd_atoms.__file__).parents[1])
        cache.mkdir(exist_ok=True)
        out.mkdir()
        (out / "log.jsonl").write_text("{}")
        return popen(NOTHING, **streams)

    monkeypatch.setattr(data.subprocess, "Popen", training)
    bench("data", "--sizes", "6,7", "--folder", str(tmp_path))
    assert started == [("5", False), ("6", False), ("6", True), ("7", False), ("7", True)]


def test_pictures_are_read_by_the_threads_asked_for(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(4), raising=False)
    cores, read = [], data.read_image

    def reading(name):
        cores.append(usable_cores())
        return read(name)

    monkeypatch.setattr(data, "read_image", reading)
    monkeypatch.setattr(data.torch, "set_num_threads", lambda count: None)
    result = data.bench_data([3], 2, str(tmp_path), check_only=True)
    assert cores == [2] * 3
    assert (result["machine"]["threads"], result["machine"]["cores"], usable_cores()) == (2, 4, 4)


def test_half_a_picture_is_not_left_for_the_next_time(monkeypatch, tmp_path):
    class Broken:
        def save(self, path):
            Path(path).write_bytes(b"half")
            raise KeyboardInterrupt

    monkeypatch.setattr(data, "render", lambda scene: Broken())
    with pytest.raises(KeyboardInterrupt):
        data.bench_data([1], 1, str(tmp_path), check_only=True)
    monkeypatch.undo()
    result = data.bench_data([1], 1, str(tmp_path), check_only=True)
    assert result["sets"][0]["pictures"] == 1
    assert [path.name for path in (tmp_path / "1").iterdir()] == ["000000.png"]


def test_the_default_sizes_are_above_what_they_are_compared_with():
    assert min(int(size) for size in Settings().sizes.split(",")) > data.FEW

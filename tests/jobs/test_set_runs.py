"""Whole data sets × methods: the plan, the images of a set, runs, report; stopped and begun again."""

import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors.torch import load_file
from tiny import one_core, write_tiny_base

from sd_atoms.cli import main
from sd_atoms.commands.vtab.run import check_plan, do_run, report
from sd_atoms.data.records import ImageRecord
from sd_atoms.data.vtab import load_task
from sd_atoms.errors import UserError
from sd_atoms.generation import image_notes
from sd_atoms.jobs.results import SCORES, read_scores
from sd_atoms.jobs.set_drawing import seed_of, set_requests, shares
from sd_atoms.jobs.sets import SetExperiment, read_set_plan
from sd_atoms.report.sets import sentence

TASKS = {"patch_camelyon": ("without", "with"), "dsprites_loc": tuple(str(n) for n in range(16))}


def experiment(folder, **changes):
    """Writes an experiment on the tiny base with two sets, one of them without classes in its prompt; its file."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "base").exists():
        write_tiny_base(folder / "base")
        generator = np.random.default_rng(0)
        for task, names in TASKS.items():
            for split, count in (("train", 4), ("test", 5)):
                for name in names:
                    place = folder / "data" / task / split / name
                    place.mkdir(parents=True)
                    for number in range(count if task == "patch_camelyon" else 1):
                        pixels = generator.integers(0, 255, (32, 32, 3), dtype=np.uint8)
                        Image.fromarray(pixels).save(place / f"{split}-{name}-{number}.png")
    entries = {
        "output_dir": str(folder / "out"),
        "data_dir": str(folder / "data"),
        "tasks": ["patch_camelyon", "dsprites_loc"],
        "methods": {"atoms": None, "lora": {"rank": 2}},
        "settings": {
            "pretrained_model_name_or_path": str(folder / "base"),
            "max_train_steps": 3,
            "train_batch_size": 1,
            "checkpointing_steps": 1,
            "num_inference_steps": 1,
        },
        "images": 7,
        "columns": 3,
        "networks": ["pocket:clip"],
        **changes,
    }
    (folder / "e.yaml").write_text(yaml.safe_dump(entries, sort_keys=False))
    return str(folder / "e.yaml")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished experiment, its runs made one after the other in this process."""
    folder = tmp_path_factory.mktemp("sets")
    plan = read_set_plan(experiment(folder), {})
    check_plan(plan)
    with one_core():
        for run in plan.runs:
            do_run(plan, run)
    report(plan, {})
    return folder, plan


def test_runs_are_the_base_and_every_method_on_every_set(tmp_path):
    plan = read_set_plan(experiment(tmp_path, seeds="0-1"), {})
    assert [run.name for run in plan.runs] == [
        f"{name}/{own}"
        for name in ("patch_camelyon", "dsprites")
        for own in ("pretrained", "atoms/seed-0", "atoms/seed-1", "lora/seed-0", "lora/seed-1")
    ]
    config = plan.config(plan.runs[3])
    assert (config.data.dataset_name, config.method.method, config.method.rank) == ("vtab:patch_camelyon", "lora", 2)
    both = read_set_plan(experiment(tmp_path, tasks="dsprites_ori,dsprites_loc"), {})
    assert [(own.name) for own in both.sets["dsprites"]] == ["dsprites_ori", "dsprites_loc"]
    assert len(both.runs) == 3
    assert [run.method for run in read_set_plan(experiment(tmp_path), {"methods": "lora,lycoris-loha"}).runs[:3]] == [
        "pretrained", "lora", "lycoris-loha"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (dict(tasks="dtd,cifar10"), "vtab:cifar10: no such task"),
        (dict(images=1), "images: 1 is out of range"),
        (dict(metrics="fid,text"), "metrics: 'text': of fid, kid"),
        (dict(networks=""), "networks: one or more are needed"),
        (dict(methods=None), "methods: one or more are needed, such as atoms,lora"),
        (dict(methods=["atom"]), "atoms/seed-0|no method 'atom'|atom"),
        (dict(methods=["a b", "a_b"]), "two of a b, a_b would have one folder"),
        (dict(methods={"atoms": {"max_train_steps": 9}}), "max_train_steps: goes under settings"),
        (dict(settings={"dataset_name": "x"}), "settings: dataset_name: the sets and the methods decide it"),
        (dict(settings={"seed": 3}), "settings: seed: the experiment decides it"),
        (dict(settings={"max_steps": 3}), "unknown key 'max_steps'"),
        (dict(concepts={}), "unknown key 'concepts'"),
    ],
)
def test_what_is_wrong_with_an_experiment_is_named(tmp_path, changes, why):
    with pytest.raises(UserError, match=why) as error:
        read_set_plan(experiment(tmp_path, **changes), {})
    assert "e.yaml: " in str(error.value) or "vtab:" in str(error.value)


def records(labels):
    return [ImageRecord(str(n), None, bytes, label=label) for n, label in enumerate(labels)]


def test_images_come_in_the_proportions_of_the_test_split_or_equal():
    task = load_task("patch_camelyon")
    reference = records([0] * 6 + [1] * 3)
    settings = dict(output_dir="x", data_dir="x", networks="x")
    for per_class, counts in (("as_test", [4, 2]), ("equal", [3, 3])):
        requests, labels = set_requests(task, SetExperiment(images=6, per_class=per_class, **settings), reference)
        assert [labels.count(label) for label in (0, 1)] == counts
        assert [request.prompt for request in requests] == [task.prompts[label] for label in labels]
        assert len({request.seed for request in requests}) == len({request.name for request in requests}) == 6
    few, many = (set_requests(task, SetExperiment(images=n, **settings), reference)[0] for n in (6, 60))
    assert {(own.prompt, own.seed, own.name) for own in few} < {(own.prompt, own.seed, own.name) for own in many}
    requests, labels = set_requests(load_task("kitti"), SetExperiment(images=5, **settings), records([0, 1]))
    assert labels is None
    assert {request.prompt for request in requests} == {"This is a picture from KITTI dataset."}
    assert len({request.seed for request in requests}) == 5


def test_shares_add_up_and_are_nearest_to_the_proportions():
    assert shares(10, [1, 1, 1]) == [4, 3, 3]
    assert shares(7, [5, 0, 2]) == [5, 0, 2]
    for count in range(1, 40):
        weights = [3, 1, 8, 0, 5]
        found = shares(count, weights)
        assert sum(found) == count
        assert all(abs(own - count * weight / 17) < 1 for own, weight in zip(found, weights, strict=True))
    assert seed_of("a", 0) != seed_of("a", 1) != seed_of("b", 1)
    assert all(0 <= seed_of("x", n) < 2**40 for n in range(100))


def test_a_finished_experiment_has_scores_a_table_figures_and_a_page(finished):
    _, plan = finished
    for run in plan.runs:
        scores = read_scores(plan.run_folder(run) / SCORES)
        figures = scores["networks"]["pocket:clip"]["figures"]
        assert {"fid", "kid", "cmmd", "coverage"} <= figures.keys()
        assert figures["kid"]["low"] < figures["kid"]["value"] < figures["kid"]["high"]
        names = run.concept == "patch_camelyon"
        assert ("accuracy" in figures) == names  # a prompt that names no class has none to hit
        assert len(scores["networks"]["pocket:clip"]["coverage_by_class"]) == (2 if names else 16)
        drawn = sorted((plan.run_folder(run) / "drawn").glob("*.png"))
        assert len(drawn) == 7
        prompt = image_notes(drawn[0])["prompt"]
        assert prompt == (
            load_task("patch_camelyon").prompts[0] if names else "This is a picture from dSprites dataset."
        )
    place = plan.folder / "report"
    results = json.loads((place / "results.json").read_text())
    assert len(results["rows"]) == 6
    by_hand = [read_scores(plan.folder / "runs/dsprites" / own / SCORES)["networks"]["pocket:clip"]["figures"]["kid"]
               for own in ("pretrained", "atoms/seed-0", "lora/seed-0")]  # fmt: skip
    assert [row["figures"]["kid"][0] for row in results["rows"][3:]] == [own["value"] for own in by_hand]
    rows = list(csv.DictReader((place / "table.csv").read_text().splitlines()))
    assert [row["set"] for row in rows] == ["patch_camelyon"] * 3 + ["dsprites"] * 3
    assert "comes nearest of the methods (kid" in results["sentences"][0]
    markdown = (place / "table.md").read_text()
    assert markdown.count("| dsprites |") == 3
    page = (place / "index.html").read_text()
    for text in ("Patch Camelyon", "dSprites location", "figure-dsprites.png", "Coverage by class"):
        assert text in page
    grid = Image.open(place / "figure-patch_camelyon.png")
    assert grid.width > 2 * 160  # two classes
    assert grid.height > 4 * 160  # real, base, two methods


@pytest.mark.parametrize(
    ("figure", "why"),
    [
        ((0.2, 0.1, 0.3), "(kid 0.200, base 0.500: nearer)"),
        ((0.4, 0.3, 0.5), "(kid 0.400, base 0.500, not apart by the intervals)"),
        ((0.8, 0.7, 0.9), "(kid 0.800, base 0.500: farther)"),
        ((0.8, None, None), "(kid 0.800, base 0.500)"),
    ],
)
def test_the_page_says_whether_the_best_method_is_nearer_than_the_base(figure, why):
    row = {"set": "x", "network": "n"}
    rows = [
        row | {"method": "pretrained", "figures": {"kid": (0.5, 0.4, 0.6)}},
        row | {"method": "worse", "figures": {"kid": (0.95, 0.94, 0.96)}},
        row | {"method": "atoms", "figures": {"kid": figure}},
    ]
    assert sentence(rows, "x") == f"x: by n atoms comes nearest of the methods {why}."


def test_the_first_rows_of_a_figure_are_real_images_and_the_base(finished):
    from sd_atoms.jobs.set_report import set_comparison
    from sd_atoms.report.sets import set_figure

    folder, plan = finished
    comparison = set_comparison(plan, {})
    own = comparison.sets[0]
    assert own.columns == ["without", "with"]
    real = Image.open(folder / "data/patch_camelyon/test/without/test-without-0.png")
    assert own.real[0].tobytes() == real.tobytes()
    assert own.shown == ["000-00000", "001-00000"]
    assert set_figure(comparison, own).size == Image.open(plan.folder / "report/figure-patch_camelyon.png").size
    sprites = comparison.sets[1]
    assert list(sprites.columns) == ["sample 0", "sample 1", "sample 2"]
    wide = replace(plan, experiment=replace(plan.experiment, columns=40))
    sprites = set_comparison(wide, {}).sets[1]
    assert len({image.tobytes() for image in sprites.real}) == len(sprites.columns) == 16  # none of them twice
    assert sprites.shown[6:] == ["00006"] + [""] * 9


def test_a_finished_experiment_repeats_nothing_and_other_settings_are_refused(finished, capsys, monkeypatch):
    folder, plan = finished
    before = {path: path.stat().st_mtime_ns for path in (plan.folder / "runs").rglob("*") if path.is_file()}
    assert main(["vtab", "run", "--config", str(folder / "e.yaml")]) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    capsys.readouterr()
    for words, why in (
        (["--images", "8"], "was drawn or scored with other images"),
        (["--metrics", "kid"], "other metrics"),
        (["--reference_images", "3"], "other reference_asked"),
        (["--networks", "efficientnet-lite0"], "other networks"),
        (["--data_dir", str(folder)], "holds no images of patch_camelyon"),
    ):
        assert main(["vtab", "run", "--config", str(folder / "e.yaml"), *words]) == 2
        assert why in capsys.readouterr().err
    assert main(["vtab", "run", "--config", str(folder / "e.yaml"), "--status"]) == 0
    assert "    6 done" in capsys.readouterr().out
    assert main(["vtab", "run", "--config", str(folder / "e.yaml"), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "6 runs on 2 image sets: 12 steps, 42 images" in out
    assert "by 6 runs that are done" in out


def test_the_plan_of_the_paper_s_experiment_is_reckoned_without_data_base_or_card(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["vtab", "run", "--config", "vtab/full_sd14", "--dry-run"]) == 0
    out = capsys.readouterr().out
    runs = 16 * 7  # the base and six methods
    assert f"{runs} runs on 16 image sets: {16 * 6 * 5000:,} steps, {runs * 2048:,} images" in out
    hours = (16 * 6 * 5000 * 0.5 + runs * 2048 * 2) / 3600
    assert f"device hours: about {hours:.1f}, by step_seconds (0.5) and image_seconds (2)" in out
    # 4,212 atoms: a run is its images at 2 bytes a pixel and three checkpoints of three numbers each
    size = 2048 * 512 * 512 * 2 + 3 * 3 * 4 * 4212
    line = next(line for line in out.splitlines() if line.startswith("dtd/atoms/seed-0"))
    assert line.split()[1:5] == ["5,000", "2,048", "4,212", f"{size / 1e9:.2f}"]
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_failed_run_is_told_and_the_others_are_reported(tmp_path):
    file = experiment(tmp_path, tasks="patch_camelyon", methods={"atoms": None, "lora": {"learning_rate": 1e30}})
    words = [sys.executable, "-m", "sd_atoms", "vtab", "run", "--config", file, "--threads", "1"]
    assert subprocess.run(words, check=False, capture_output=True).returncode == 1
    results = json.loads((tmp_path / "out/report/results.json").read_text())
    assert [row["method"] for row in results["rows"]] == ["pretrained", "atoms"]
    assert list(results["failed"]) == ["patch_camelyon/lora/seed-0"]
    assert "What failed" in (tmp_path / "out/report/table.md").read_text()


def test_a_report_without_some_runs_shows_the_others_and_says_why(finished, tmp_path, capsys):
    folder, _ = finished
    shutil.copytree(folder / "out", tmp_path / "out")
    part = read_set_plan(str(folder / "e.yaml"), {"output_dir": str(tmp_path / "out")})
    (tmp_path / "out/runs/dsprites/lora/seed-0" / SCORES).unlink()
    report(part, {"dsprites/lora/seed-0": "the loss is <nan>"})
    assert "failed: dsprites/lora/seed-0: the loss is <nan>" in capsys.readouterr().out
    results = json.loads((tmp_path / "out/report/results.json").read_text())
    assert [row["method"] for row in results["rows"]] == ["pretrained", "atoms", "lora", "pretrained", "atoms"]
    assert "(the loss is &lt;nan&gt;)" in (tmp_path / "out/report/index.html").read_text()
    for run in part.runs:
        (part.run_folder(run) / SCORES).unlink(missing_ok=True)
    with pytest.raises(UserError, match="no run could be finished; the first: it broke"):
        report(part, {"x": "it broke"})


def outcome(folder):
    """What an experiment found, without the time that it took and where it lies."""
    found = {}
    for path in sorted((folder / "out/runs").rglob("*")):
        if path.name == SCORES:
            scores = read_scores(path)
            found[path.parent.relative_to(folder)] = {key: own for key, own in scores.items() if key != "seconds"}
        elif path.suffix == ".png" and path.parent.name == "drawn":
            found[path.relative_to(folder)] = Image.open(path).tobytes()
        elif path.suffix == ".safetensors" and path.parent.parent.parent.name in ("atoms", "lora"):
            found[path.relative_to(folder)] = {key: own.tolist() for key, own in load_file(path).items()}
    return found


@pytest.mark.slow
def test_killed_at_random_moments_it_repeats_nothing_and_ends_equal(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    words = [sys.executable, "-m", "sd_atoms", "vtab", "run", "--threads", "1", "--config"]
    subprocess.run([*words, experiment(whole)], check=True, capture_output=True)
    for part in ("base", "data"):
        broken.mkdir(exist_ok=True)
        shutil.copytree(whole / part, broken / part)
    file, rng, done = experiment(broken), random.Random(0), {}
    for _ in range(6):
        process = subprocess.Popen([*words, file], start_new_session=True, stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL)  # fmt: skip
        time.sleep(rng.uniform(8, 25))
        for child in _children(process.pid):
            os.kill(child, signal.SIGKILL)
        process.kill()
        process.wait()
        for path in (broken / "out/runs").rglob(SCORES):
            assert done.setdefault(path, path.stat().st_mtime_ns) == path.stat().st_mtime_ns
    subprocess.run([*words, file], check=True, capture_output=True)
    for path, written in done.items():
        assert path.stat().st_mtime_ns == written
    ours, theirs = outcome(broken), outcome(whole)
    assert ours.keys() == theirs.keys()
    for key in theirs:
        assert ours[key] == theirs[key], key


def _children(process: int) -> list[int]:
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process)], capture_output=True, text=True, check=False)
    return [int(number) for number in listed.stdout.split()]

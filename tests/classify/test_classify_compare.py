"""`sd-atoms classify compare`: methods on the same images, from one file."""

import csv
import json

import pytest
import yaml
from small import COLOURS, coloured, write_classes, write_model

from sd_atoms.cli import main
from sd_atoms.commands.classify.compare import image_problems
from sd_atoms.jobs.classifiers import read_classifier_plan
from sd_atoms.report.classifier import ClassifierRow
from sd_atoms.report.classifier_tasks import group_means, mean_rows, tasks_markdown


def experiment(folder, **changes):
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "model").exists():
        write_model(folder / "model", "resnet")
        write_classes(folder / "set", 5)
    entries = {
        "output_dir": str(folder / "out"),
        "settings": {
            "model": str(folder / "model"), "data": str(folder / "set"), "max_train_steps": 2, "train_batch_size": 4,
            "lr_warmup_steps": 0, "report_to": "none",
        },
        "methods": {"head": None, "atoms m=4": {"method": "atoms", "m": 4}},
        "seeds": "3",
        **changes,
    }  # fmt: skip
    (folder / "e.yaml").write_text(yaml.safe_dump(entries, sort_keys=False))
    return str(folder / "e.yaml")


def test_methods_are_trained_alike_and_told_side_by_side(tmp_path, capsys):
    path = experiment(tmp_path)
    assert main(["classify", "compare", path, "--dry_run"]) == 0
    assert "atoms_m_4/seed-3: 2 steps" in capsys.readouterr().out
    assert main(["classify", "compare", path]) == 0
    report = tmp_path / "out" / "report"
    rows = list(csv.DictReader((report / "table.csv").open()))
    assert [(row["method"], row["seeds"]) for row in rows] == [("head", "1"), ("atoms m=4", "1")]
    assert rows[0]["parameters"] == "0"
    results = json.loads((report / "results.json").read_text())["rows"]
    runs = [json.loads(found.read_text()) for found in sorted((tmp_path / "out" / "runs").glob("head/*/metrics.json"))]
    mean = sum(run["test"]["accuracy"]["value"] for run in runs) / len(runs)
    assert results[0]["test"][0] == pytest.approx(mean)
    gap = sum(run["train"]["accuracy"]["value"] - run["test"]["accuracy"]["value"] for run in runs) / len(runs)
    assert results[0]["gap"][0] == pytest.approx(gap)
    assert (report / "accuracy.png").stat().st_size > 5000
    before = {found: found.stat().st_mtime_ns for found in (tmp_path / "out" / "runs").rglob("metrics.json")}
    capsys.readouterr()
    assert main(["classify", "compare", path, "--status"]) == 0
    assert "2 done" in capsys.readouterr().out
    assert main(["classify", "compare", path]) == 0
    assert before == {found: found.stat().st_mtime_ns for found in before}
    changed = experiment(tmp_path, methods={"head": {"head_learning_rate": 0.5}})
    assert main(["classify", "compare", changed]) == 2
    assert "holds a run of other settings" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"colour": 1}, "unknown key 'colour'"),
        ({"methods": {}}, "methods: one or more are needed"),
        ({"methods": {"x": {"method": "nowhere"}}}, "nowhere"),
        ({"methods": {"head": {"seed": 3}}}, "seed: the comparison decides it"),
        ({"methods": {"a b": {"method": "head"}, "A b": {"method": "head"}}}, "one name for their folder"),
        ({"seeds": "2-1"}, "runs backwards"),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path, capsys, changes, message):
    assert main(["classify", "compare", experiment(tmp_path, **changes)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def on_tasks(folder, **changes):
    """An experiment on two tasks of VTAB, Patch Camelyon as folders of classes."""
    for split, count in (("train", 4), ("test", 4)):
        for name, colour in zip(("without", "with"), COLOURS, strict=False):
            place = folder / "vtab" / "patch_camelyon" / split / name
            place.mkdir(parents=True, exist_ok=True)
            for number in range(count):
                coloured(colour, number + 10 * (split == "test")).save(place / f"{number}.png")
    path = experiment(folder)
    entries = yaml.safe_load((folder / "e.yaml").read_text())
    del entries["settings"]["data"]
    entries |= {"data_dir": str(folder / "vtab"), "tasks": "patch_camelyon", **changes}
    (folder / "e.yaml").write_text(yaml.safe_dump(entries, sort_keys=False))
    return path


def test_tasks_of_vtab_by_vtab_run(tmp_path, capsys):
    words = ["vtab", "run", "--config", on_tasks(tmp_path)]  # of classifiers, since its settings name a model
    assert main([*words, "--dry_run"]) == 0
    assert "patch_camelyon/head/seed-3: 2 steps" in capsys.readouterr().out
    assert main([*words, "--methods", "head"]) == 0
    lines = list(csv.DictReader((tmp_path / "out" / "report" / "table.csv").open()))
    assert [(line["task"], line["method"]) for line in lines] == [("patch_camelyon", "head")]
    run = json.loads((tmp_path / "out" / "runs" / "patch_camelyon" / "head" / "seed-3" / "metrics.json").read_text())
    assert float(lines[0]["test"]) == run["test"]["accuracy"]["value"]
    assert "| specialized | mean |" in (tmp_path / "out" / "report" / "table.md").read_text()
    capsys.readouterr()
    assert main([*words, "--status"]) == 0
    assert "1 done" in capsys.readouterr().out
    for flags, message in {
        ("--images", "7"): "images: of kind=generate alone",
        ("--run", "x"): "run needs kind=generate",
        ("--tasks", "nowhere"): "nowhere",
        ("--methods", "lora"): "'lora': of head, atoms m=4",
    }.items():
        assert main([*words, *flags]) == 2
        assert message in capsys.readouterr().err


def test_the_images_of_all_tasks_are_looked_at_before_the_first_run(tmp_path, capsys):
    path = on_tasks(tmp_path, tasks="dtd,patch_camelyon,svhn,cifar")
    vtab = tmp_path / "vtab"
    (vtab / "cifar").mkdir()
    (vtab / "cifar" / "train800val200.txt").write_text("images/a.jpg 0\n")
    for more in ([], ["--dry_run"]):
        assert main(["classify", "compare", path, *more]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert lines[-2] == f"  {vtab / 'cifar' / 'train800val200.txt'}, line 1: images/a.jpg is missing"
        assert lines[-1] == f"  data_dir: {vtab}: lacks 2 of 4 tasks: dtd, svhn"
    assert not (tmp_path / "out").exists()
    on_tasks(tmp_path, tasks="dtd", data_dir=str(tmp_path / "nowhere"))
    assert main(["classify", "compare", path, "--dry_run"]) == 0
    assert "not here: data_dir: " in capsys.readouterr().out
    assert main(["classify", "compare", path]) == 2
    assert "lacks 1 of 1 tasks: dtd" in capsys.readouterr().err


def test_the_images_of_every_method_are_looked_at_and_not_those_of_runs_that_are_done(tmp_path, capsys):
    own = {"method": "head", "data": str(tmp_path / "other.csv")}
    path = experiment(tmp_path, methods={"head": None, "others": own})
    (tmp_path / "other.csv").write_text("a.png,red\nb.png,blue\n")
    assert main(["classify", "compare", path]) == 2
    assert "other.csv, line 1: a.png is missing" in " ".join(capsys.readouterr().err.split("\n"))
    for seed in ("head/seed-3", "others/seed-3"):
        done = tmp_path / "out" / "runs" / seed / "metrics.json"
        done.parent.mkdir(parents=True)
        done.write_text("{}")
    plan = read_classifier_plan(path, {})
    assert image_problems(plan) == ([], [])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"settings": {"model": "x", "data": "y"}}, "data: the comparison decides it by its tasks"),
        ({"methods": {"head": {"data": "y"}}}, "methods.head: data: the comparison decides it by its tasks"),
        ({"data_dir": None}, "data_dir is required with tasks"),
        ({"tasks": None}, "data_dir needs tasks"),
    ],
)
def test_tasks_and_data_do_not_mix(tmp_path, capsys, changes, message):
    assert main(["classify", "compare", on_tasks(tmp_path, **changes)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("file", "count"), [("vtab/classify", 19 * 9 * 3), ("vtab/classify_demo", 9)])
def test_packaged_plans_are_whole(file, count):
    plan = read_classifier_plan(file, {})
    assert len({run.name for run in plan.runs}) == len(plan.runs) == count
    assert plan.runs[0].task == plan.tasks[0].name  # task by task


def row(method, accuracy, train=1.0):
    means = ((accuracy, None, None), (train, None, None), (train - accuracy, None, None))
    return ClassifierRow(method, 1, 10, 2, *means, 0.1, 1.0, 0.5)


def test_means_are_over_groups_and_only_where_every_task_is_done():
    groups = {"a": "natural", "b": "natural", "c": "structured"}
    by_task = {"a": [row("x", 0.2), row("y", 0.3)], "b": [row("x", 0.4), row("y", 0.5)], "c": [row("x", 0.9)]}
    means = group_means(by_task, groups)
    assert means["x"] == pytest.approx({"natural": 0.3, "structured": 0.9, "mean": 0.6})
    assert means["y"]["structured"] is means["y"]["mean"] is None
    (mean,) = mean_rows(by_task, groups)
    assert (mean.method, mean.test[0], mean.gap[0]) == ("x", pytest.approx(0.6), pytest.approx(0.4))
    assert "| y | 10 | 12 | 30.0 | 50.0 | – | 40.0 | – | – |" in tasks_markdown("t", by_task, groups, {})

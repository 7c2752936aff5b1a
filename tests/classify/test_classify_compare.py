"""`sd-atoms classify compare`: methods on the same images, from one file."""

import csv
import json

import pytest
import yaml
from small import write_classes, write_model

from sd_atoms.cli import main


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
        ({"methods": {"head": {"seed": 3}}}, "seed is what the comparison decides"),
        ({"methods": {"a b": {"method": "head"}, "A b": {"method": "head"}}}, "one name for their folder"),
        ({"seeds": "2-1"}, "runs backwards"),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path, capsys, changes, message):
    assert main(["classify", "compare", experiment(tmp_path, **changes)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

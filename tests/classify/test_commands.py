"""`sd-atoms classify`: trained, gone on with, tested and asked."""

import csv
import io
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from small import coloured, write_classes, write_model

from sd_atoms.classify.file import NAME
from sd_atoms.cli import main
from sd_atoms.training.interrupt import Interrupted


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classify")
    write_model(folder / "model", "resnet")
    write_classes(folder / "set", 10)
    return folder


def words(place, out, **settings):
    own = {
        "model": place / "model", "data": place / "set", "output_dir": out, "max_train_steps": 30,
        "train_batch_size": 6, "lr_warmup_steps": 2, "head_learning_rate": 0.05, "report_to": "none",
        "checkpointing_steps": 10, **settings,
    }  # fmt: skip
    return ["classify", "train", *(f"--{name}={value}" for name, value in own.items())]


@pytest.fixture(scope="module")
def trained(place):
    assert main(words(place, place / "run")) == 0
    return place / "run"


def test_a_run_leaves_its_file_figures_and_picture(trained):
    metrics = json.loads((trained / "metrics.json").read_text())
    assert metrics["test"]["accuracy"]["value"] >= 0.8  # three colours
    assert metrics["training"]["method"] == "atoms"
    assert metrics["training"]["trained_numbers"] > 0
    assert metrics["training"]["head_numbers"] == 3 * 16 + 3
    for name in (NAME, "config.yaml", "env.json", "log.jsonl", "images/confusion.png"):
        assert (trained / name).exists()
    assert "/" not in load_header(trained / NAME)["model"]


def load_header(path):
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["sd_atoms_classifier"])


def test_a_run_that_was_stopped_goes_on_bit_for_bit(place, trained, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(trained, out)
    for step in (20, 30):
        (out / "checkpoints" / f"checkpoint-{step}.safetensors").unlink()
    (out / NAME).unlink()
    assert main([*words(place, out), "--resume_from_checkpoint", "latest"]) == 0
    ours, theirs = load_file(out / NAME), load_file(trained / NAME)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert main([*words(place, out, seed=4), "--resume_from_checkpoint", "latest"]) == 2
    assert main(words(place, out)) == 2  # it holds a run


def test_it_is_tested_again_and_says_the_same(place, trained, tmp_path, capsys):
    path = tmp_path / "scores.json"
    assert main(["classify", "evaluate", f"--classifier={trained}", f"--data={place / 'set'}", f"--json={path}",
                 f"--confusion={tmp_path / 'c.png'}", f"--model={place / 'model'}"]) == 0  # fmt: skip
    scores, metrics = json.loads(path.read_text()), json.loads((trained / "metrics.json").read_text())
    assert scores == metrics["test"]
    assert "test images right" in capsys.readouterr().out
    assert main(["classify", "evaluate", f"--classifier={trained}", f"--data={place / 'set'}", f"--json={path}",
                 f"--model={place / 'model'}"]) == 2  # fmt: skip


def test_inspect_says_what_it_is(place, trained, tmp_path, capsys):
    assert main(["inspect", str(trained), f"--json={tmp_path / 'told.json'}"]) == 0
    said, told = capsys.readouterr().out, json.loads((tmp_path / "told.json").read_text())
    metrics = json.loads((trained / "metrics.json").read_text())
    assert {name: told[name] for name in ("trained_numbers", "head_numbers")} == {
        name: metrics["training"][name] for name in ("trained_numbers", "head_numbers")
    }
    assert told["accuracy"] == metrics["test"]["accuracy"]
    for line in ("kind         classifier", "method       atoms: m=9, svd solver", "classes      3: blue, green, red",
                 f"accuracy     {told['accuracy']['value']:.1%} of 6 test images"):  # fmt: skip
        assert line in said
    shutil.copy(trained / NAME, tmp_path / "moved.safetensors")  # without its run
    assert main(["inspect", str(tmp_path / "moved.safetensors")]) == 0
    assert "accuracy     not known here" in capsys.readouterr().out
    for words_, message in (
        (["inspect", str(trained), "--top=3"], "--top: for an ADAPTER, not for"),
        (["inspect", str(trained / "checkpoints")], "is the run of a classifier, of which `sd-atoms classify`"),
        (["export", str(trained), "--to=lora"], "is a classifier, which `sd-atoms classify` takes"),
        (["export", str(trained / NAME), "--to=lora"], "is a classifier, which `sd-atoms classify` takes"),
    ):
        assert main(words_) == 2
        assert message in capsys.readouterr().err


def test_what_is_skipped_is_told_briefly(place, tmp_path, capsys):
    shutil.copytree(place / "set", tmp_path / "set")
    for number in range(22):
        coloured("red", number).resize((8, 8)).save(tmp_path / "set" / "red" / f"small{number}.png")
    small = dict(data=tmp_path / "set", on_bad_image="skip", test_data=place / "set", max_train_steps=1)
    (tmp_path / "all").mkdir()
    assert main([*words(place, tmp_path / "run", **small)]) == 0
    said = capsys.readouterr().out
    assert said.count("Skipped: ") == 21
    assert "Skipped: … and 2 more" in said


def test_images_are_told(place, trained, tmp_path, capsys):
    for name in ("red", "blue"):
        coloured(name, 77).save(tmp_path / f"{name}.png")
    own = ["classify", "predict", f"--classifier={trained}", f"--model={place / 'model'}"]
    assert main([*own, str(tmp_path / "red.png"), str(tmp_path / "blue.png")]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["class"] for row in rows] == ["red", "blue"]
    assert main([*own, str(tmp_path), "--top=3", "--format=json", f"--out={tmp_path / 'o.json'}"]) == 0
    told = json.loads((tmp_path / "o.json").read_text())
    assert [entry["classes"][0]["class"] for entry in told] == ["blue", "red"]
    assert sum(own["probability"] for own in told[0]["classes"]) == pytest.approx(1)
    capsys.readouterr()
    assert main([*own, str(tmp_path / "nowhere.png")]) == 2
    assert "no such file or folder" in capsys.readouterr().err


def test_images_of_a_list_alone_are_all_tested(place, trained, tmp_path, capsys):
    coloured("red", 77).save(tmp_path / "a.png")
    (tmp_path / "new.csv").write_text("path,label\na.png,red\n")
    own = ["classify", "evaluate", f"--classifier={trained}", f"--model={place / 'model'}"]
    assert main([*own, f"--test_data={tmp_path / 'new.csv'}"]) == 0
    assert "of 1 test images right" in capsys.readouterr().out
    (tmp_path / "new.csv").write_text("path,label\na.png,penguin\n")
    for words_, message in (
        ([f"--test_data={tmp_path / 'new.csv'}"], "class 'penguin' is not among those learned"),
        ([], "data or test_data is required"),
        ([f"--data={place / 'set'}", f"--confusion={tmp_path / 'c.jpg'}"], "ends in .png"),
    ):
        assert main([*own, *words_]) == 2
        assert message in capsys.readouterr().err


def test_what_it_was_trained_with_is_said_where_it_is_missing(place, trained, tmp_path, capsys):
    coloured("red", 77).save(tmp_path / "a.png")
    for run, message in ((trained, "--model says where it is"), (tmp_path / "nowhere.safetensors", "no such file")):
        assert main(["classify", "predict", f"--classifier={run}", str(tmp_path / "a.png")]) == 2
        assert message in capsys.readouterr().err
    out = tmp_path / "told.json"
    own = ["classify", "predict", f"--classifier={trained}", f"--model={place / 'model'}", str(tmp_path / "a.png")]
    assert main([*own, f"--out={out}"]) == 0
    assert json.loads(out.read_text())[0]["classes"][0]["class"] == "red"


def test_a_stopped_training_names_the_command_that_goes_on(place, tmp_path, capsys, monkeypatch):
    def stop(config):
        raise Interrupted(7, tmp_path, 2)

    monkeypatch.setattr("sd_atoms.commands.classify.train.run", stop)
    with pytest.raises(SystemExit):
        main(words(place, tmp_path / "run"))
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.strip().startswith("sd-atoms classify train")
    assert last.endswith("--resume_from_checkpoint latest")


def test_a_dry_run_says_what_it_can(place, tmp_path, capsys):
    assert main([*words(place, tmp_path / "run"), "--dry_run"]) == 0
    told = capsys.readouterr().out
    assert "24 to learn from, 6 to test on, 3 classes" in told
    assert "51 of the head" in told
    for name in ("cifar100_convnext", "cub_resnet50"):  # neither network nor images are here
        assert main(["classify", "train", f"--config=classify/{name}", "--dry_run"]) == 0
        told = capsys.readouterr().out
        assert "epochs" in told
        assert "not here" in told
    (tmp_path / "set" / "red").mkdir(parents=True)
    for wrong in ({"data": tmp_path / "set"}, {"target": "nowhere"}):  # they are here
        assert main([*words(place, tmp_path / "run", **wrong), "--dry_run"]) == 2
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "difffit"}, "method='difffit': one of head, atoms, "),
        ({"method": "head", "learning_rate": 1e-2}, "there is head_learning_rate"),
        ({"dataset_dir": "."}, "has its own images"),
        ({"method": "head", "rank": 4}, "method head has no settings"),
        ({"method": "lora", "m": 4}, "m"),
        ({"keep_head": "SWITCH"}, "has 7 classes, the data 3"),
        ({"target": "nowhere"}, "nowhere"),
        ({"max_train_samples": 1}, "1 images are left, none of"),
        ({"data": "vtab:dtd"}, "dataset_dir is required"),
    ],
)
def test_what_cannot_be_is_one_line_and_writes_nothing(place, tmp_path, capsys, settings, message):
    own = [word.removesuffix("=SWITCH") for word in words(place, tmp_path / "run", **settings)]
    assert main(own) == 2
    error = capsys.readouterr().err
    assert message in error
    assert not (tmp_path / "run").exists()

"""Which step, which strength: the sheet of a run, and what is picked from it."""

import json

import numpy as np
import pytest
import yaml
from helpers import tiny_base
from PIL import Image
from tiny import one_core, write_photos

from sd_atoms.cli import main, train_main
from sd_atoms.generation import image_notes
from sd_atoms.pipeline import read_artefact
from sd_atoms.report.sheet import Cell, picked, sheet_text

SMALL = dict(
    instance_prompt="photo of a <castle>.",
    placeholder_token="<castle>",
    initializer_token="castle",
    train_token_embedding=True,
    train_batch_size=1,
    max_train_steps=4,
    checkpointing_steps=2,
    learning_rate=1e-2,
    lr_warmup_steps=0,
    num_instance_images=1,
    num_inference_steps=1,
    report_to="none",
)


@pytest.fixture(autouse=True, scope="module")
def _one_core():
    with one_core():
        yield


def trained(folder, **settings):
    path = folder.parent / f"{folder.name}.yaml"
    photos = folder.parent / "photos"
    if not photos.exists():
        write_photos(photos)
    base = dict(pretrained_model_name_or_path=tiny_base(), instance_data_dir=str(photos), output_dir=str(folder))
    path.write_text(yaml.safe_dump({**SMALL, **base, **settings}))
    assert train_main(["--config", str(path)]) == 0
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("sheet") / "run")


def words(*given):
    return [str(word) for word in given]


def test_a_sheet_has_a_row_for_each_step_and_a_column_for_each_strength(run, tmp_path, capsys):
    (tmp_path / "two.txt").write_text("a {} at night\nthe {} in snow\n")
    out = tmp_path / "out"
    command = words("sheet", run, "--prompts", tmp_path / "two.txt", "--strengths", "0,0.5,1", "--seeds", "0-1")
    command += words("--networks", "pocket:judge,pocket:clip", "--out", out)
    assert main(command) == 0
    told = capsys.readouterr().out
    numbers = json.loads((out / "sheet.json").read_text())
    cells = {(cell["step"], cell["strength"]): cell for cell in numbers["cells"]}
    assert list(cells) == [(2, 0.0), (2, 0.5), (2, 1.0), (4, 0.0), (4, 0.5), (4, 1.0)]
    best = max((cell for cell in cells.values() if cell["strength"]), key=lambda cell: cell["score"])
    assert cells[numbers["picked"]["step"], numbers["picked"]["strength"]]["score"] == best["score"]
    assert f"would pick step {numbers['picked']['step']} at strength {numbers['picked']['strength']:g}" in told
    assert f"sd-atoms pick {run} --step {numbers['picked']['step']}" in told
    assert numbers["prompts"] == ["a <castle> at night", "the <castle> in snow"]
    drawn = sorted(path.relative_to(out).as_posix() for path in out.rglob("prompt*.png"))
    assert len(drawn) == 6 * 4
    notes = image_notes(out / "step-4-strength-0.5" / "prompt01-seed1.png")
    assert (notes["prompt"], notes["seed"], notes["adapter_scale"]) == ("the <castle> in snow", "1", "0.5")
    one, other = (np.asarray(Image.open(out / f"step-4-strength-{s}" / "prompt00-seed0.png")) for s in ("0", "1"))
    assert (one != other).any()

    before = {path: path.stat().st_mtime_ns for path in out.rglob("prompt*.png")}
    assert main(command) == 0  # nothing is drawn again
    assert {path: path.stat().st_mtime_ns for path in out.rglob("prompt*.png")} == before
    assert main(words("sheet", run, "--steps", "4", "--strengths", "1", "--out", tmp_path / "few")) == 0
    assert "No scores" in capsys.readouterr().out
    assert len(list((tmp_path / "few").rglob("prompt*.png"))) == 6  # 3 templates of few_shot, 2 seeds


def test_what_is_picked_draws_what_the_cell_shows(run, tmp_path, capsys):
    (tmp_path / "one.txt").write_text("a {} at night\n")
    common = ["--prompts", tmp_path / "one.txt", "--seeds", "0", "--out"]
    assert main(words("sheet", run, "--steps", "2", "--strengths", "0.5", *common, tmp_path / "sheet")) == 0
    assert main(words("pick", run, "--step", "2", "--strength", "0.5")) == 0
    file = run / "picked" / "castle-step-2-strength-0.5.safetensors"
    assert str(file) in capsys.readouterr().out
    assert main(words("generate", "--adapter", file, *common, tmp_path / "generated")) == 0
    cell = np.asarray(Image.open(tmp_path / "sheet" / "step-2-strength-0.5" / "prompt00-seed0.png")).astype(int)
    again = np.asarray(Image.open(tmp_path / "generated" / "prompt00-seed0.png")).astype(int)
    assert np.abs(cell - again).max() <= 1
    content = file.read_bytes()
    assert main(words("pick", run, "--step", "2", "--strength", "0.5")) == 2
    assert "exists; pass --overwrite" in capsys.readouterr().err
    assert file.read_bytes() == content
    assert main(words("pick", run, "--step", "2", "--strength", "0.5", "--overwrite")) == 0


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        (["sheet", "{run}", "--steps", "3"], "steps: there is no checkpoint of step '3'; there are 2, 4"),
        (["sheet", "{run}", "--strengths", "a"], "strengths: 'a': numbers from -10 to 10"),
        (["sheet", "{run}", "--strengths", ","], "strengths: ',': numbers from -10 to 10"),
        (["sheet", "{run}", "--token", "<tower>"], "token: '<tower>' is no token of this run; there is <castle>"),
        (["sheet", "{run}", "--networks", "./nowhere"], "./nowhere"),
        (["sheet", "{tmp}"], "is no run folder, it holds no config.yaml"),
        (["pick", "{run}", "--step", "3"], "step: there is no checkpoint of step 3; there are 2, 4"),
        (["pick", "{run}"], "step is required"),
        (["pick", "{run}", "--step", "2", "--strength", "11"], "11.0 is out of range, -10.0 to 10.0 is allowed"),
        (["pick", "{run}", "--step", "2", "--out", "x.bin"], "the name of a .safetensors file is needed"),
        (["pick", "{tmp}", "--step", "2"], "is no run folder"),
    ],
)
def test_what_cannot_be_is_one_line_and_writes_nothing(run, tmp_path, command, problem, capsys):
    before = sorted(run.rglob("*"))
    assert main([word.format(run=run, tmp=tmp_path) for word in command]) == 2
    told = capsys.readouterr().err
    assert problem in told
    assert told.count("\n") == 1
    assert sorted(run.rglob("*")) == before


def test_methods_without_a_strength_have_one_column(tmp_path, capsys):
    oft = trained(tmp_path / "oft", method="oft", block_size=2)
    assert main(words("sheet", oft, "--steps", "4", "--seeds", "0")) == 0
    assert [path.name for path in (oft / "sheet").iterdir() if path.is_dir()] == ["step-4-strength-1"]
    capsys.readouterr()
    assert main(words("sheet", oft, "--strengths", "0,-0")) == 2
    assert "strengths: '0,-0': at 0 there is no adapter" in capsys.readouterr().err
    assert main(words("sheet", oft, "--strengths", "0.5")) == 2
    assert "OFT has no strength, only 1 is allowed" in capsys.readouterr().err


def test_a_training_ends_with_a_sheet_and_a_resumed_one_draws_it_anew(tmp_path, capsys):
    settings = dict(contact_sheet=True, clip_model_name_or_path="pocket:clip", max_train_steps=2)
    folder = trained(tmp_path / "run", **settings)
    assert "the scores would pick step 2" in capsys.readouterr().out
    assert len(json.loads((folder / "sheet" / "sheet.json").read_text())["cells"]) == 4
    trained(tmp_path / "run", **settings | dict(max_train_steps=4, resume_from_checkpoint="latest"))
    assert len(json.loads((folder / "sheet" / "sheet.json").read_text())["cells"]) == 8
    with Image.open(folder / "sheet" / "sheet.png") as sheet:
        assert sheet.width > sheet.height / 2
    trained(tmp_path / "run", **settings | dict(contact_sheet=False, overwrite=True))
    assert not (folder / "sheet").exists()
    assert read_artefact(folder / "castle.safetensors").tokens


# --- what the scores would pick --------------------------------------------------------------------------------------


def test_the_highest_harmonic_mean_is_picked_and_ties_go_to_the_gentlest():
    alike = Cell(100, 1.0, [0.9] * 4, [0.1] * 4)  # likeness alone does not win
    best, same_score = Cell(200, 0.8, [0.6] * 4, [0.6] * 4), Cell(200, 1.0, [0.6] * 4, [0.6] * 4)
    weak = Cell(100, 0.6, [0.3] * 4, [0.7] * 4)
    assert picked([alike, same_score, weak, best]) == (best, [same_score])
    assert picked([best, Cell(1, 1.0, [0.5], None)]) is None
    base = Cell(200, 0.0, [0.9] * 4, [0.9] * 4)  # without an adapter; `pick` could not write it
    assert picked([base, weak]) == (weak, [])
    assert "Without the adapter, at strength 0, it is higher: 0.900." in sheet_text([base, weak], (weak, []), "run")
    assert "Without" not in sheet_text([weak], (weak, []), "run")
    assert picked([base]) is None


def test_cells_that_few_pictures_do_not_tell_apart_are_said():
    draws = np.random.default_rng(0)
    base = draws.uniform(0.3, 0.8, 24)
    best = Cell(300, 1.0, base + 0.02, base + 0.02)
    steady = Cell(200, 1.0, base, base)  # lower in every picture
    shake = draws.normal(0, 0.2, 24)
    shake += 0.01 - shake.mean()  # between the two on the whole, but not picture by picture
    shaken = Cell(100, 1.0, base + shake, base + shake)
    found, others = picked([best, steady, shaken])
    assert found is best
    assert others == [shaken]
    text = sheet_text([best, steady, shaken], (found, others), "runs/my castle")
    assert "Of 3 cells the scores would pick step 300 at strength 1" in text
    assert "24 pictures a cell do not tell it from step 100 at strength 1" in text
    assert "sd-atoms pick 'runs/my castle' --step 300 --strength 1" in text

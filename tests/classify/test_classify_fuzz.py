"""Malformed classifier files, two hundred: each ends in one line and exit code 2, or says what it sees."""

import random
import shutil

import pytest
from small import coloured, write_classes, write_model
from spoiling import damaged, spoilt_metadata, spoilt_tensors

from sd_atoms.cli import main

CASES, USUAL = 200, 20


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of atoms on a ResNet, and an image."""
    folder = tmp_path_factory.mktemp("fuzz")
    write_model(folder / "model", "resnet")
    write_classes(folder / "set", 4)
    words = [f"--model={folder / 'model'}", f"--data={folder / 'set'}", f"--output_dir={folder / 'run'}"]
    words += ["--max_train_steps=1", "--train_batch_size=2", "--lr_warmup_steps=0", "--report_to=none"]
    assert main(["classify", "train", "--m=4", *words]) == 0
    coloured("red", 90).save(folder / "red.png")
    return folder


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "number", [pytest.param(n, marks=() if n < USUAL else pytest.mark.slow) for n in range(CASES)]
)
def test_a_malformed_file_ends_in_one_line_or_is_handled(trained, tmp_path, capsys, number):
    rng = random.Random(f"classifier/{number}")
    path = tmp_path / "classifier.safetensors"
    shutil.copy(trained / "run" / "classifier.safetensors", path)
    kind = rng.choice(["header", "header", "header", "tensors", "tensors", "cut", "bytes"])
    if kind == "header":
        content = spoilt_metadata(rng, path, "sd_atoms_classifier")
    elif kind == "tensors":
        content = spoilt_tensors(rng, path)
    elif kind == "cut":
        content = path.read_bytes()[: rng.randrange(path.stat().st_size)]
    else:
        content = damaged(rng, path.read_bytes(), 3000)
    path.write_bytes(content)
    words = ["classify", "predict", f"--classifier={path}", f"--out={tmp_path / 'said.json'}"]
    words += [f"--model={trained / 'model'}"] if rng.random() < 0.7 else []
    capsys.readouterr()
    code = main([*words, str(trained / "red.png")])
    message = capsys.readouterr().err
    print(kind, code, message)
    assert code in (0, 2)
    if code == 2:
        assert message.startswith("error: ")
        assert message.count("\n") == 1
        assert not (tmp_path / "said.json").exists()
    assert path.read_bytes() == content

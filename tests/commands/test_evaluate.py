"""`sd-atoms evaluate`: figures of folders of images, against sums made by hand."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from sklearn.datasets import load_sample_images
from torch.nn.functional import normalize
from transformers import CLIPModel, CLIPTokenizerFast

from sd_atoms.cli import main
from sd_atoms.data.images import fit
from sd_atoms.evaluation.efficientnet import SIDE_PX, load_efficientnet
from sd_atoms.evaluation.networks import open_network
from sd_atoms.generation import GRID_NOTE, save_image
from sd_atoms.pocket.world import render
from sd_atoms.pocket.world.scenes import sample
from sd_atoms.sources import packaged_path

PROMPTS = ["a {} by a lake", "a {} in the snow"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Folders made (8 pictures of two prompts) and real (12)."""
    import random

    folder = tmp_path_factory.mktemp("evaluate")
    for name, seeds in (("made", range(8)), ("real", range(100, 112))):
        (folder / name).mkdir()
        for seed in seeds:
            notes = PngInfo()
            notes.add_text("prompt", PROMPTS[seed % 2].format("<castle>"))
            render(sample(random.Random(seed))).save(folder / name / f"{seed:03d}.png", pnginfo=notes)
    save_image(folder / "made" / "grid.png", Image.new("RGB", (64, 64)), {GRID_NOTE: "all"})
    return folder


def evaluate(place, *more, folder="made", networks="pocket:clip"):
    file = place / "result.json"
    words = ["evaluate", place / folder, "--networks", networks, "--draws", "20", "--json", file, "--overwrite", *more]
    assert main([str(word) for word in words]) == 0
    return json.loads(file.read_text())


def clip_by_hand(folder):
    """Unit vectors of the pictures, by transformers alone."""
    model = CLIPModel.from_pretrained(packaged_path("pocket:clip")).eval()
    size = model.config.vision_config.image_size
    pixels = [
        np.asarray(Image.open(path).convert("RGB").resize((size, size)))
        for path in sorted(folder.glob("0*.png" if folder.name == "made" else "*.png"))
    ]
    mean, deviation = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    ready = (np.stack(pixels) / 255 - mean) / deviation
    with torch.no_grad():
        pooled = model.vision_model(pixel_values=torch.from_numpy(ready).permute(0, 3, 1, 2).float()).pooler_output
        return normalize(model.visual_projection(pooled), dim=1), model


def test_likeness_and_text_are_cosines_by_transformers(place):
    made, model = clip_by_hand(place / "made")
    real, _ = clip_by_hand(place / "real")
    figures = evaluate(place, "--reference", place / "real", "--replace", "<castle>=castle")["networks"]["pocket:clip"]
    figures = figures["figures"]
    assert figures["image"]["value"] == pytest.approx((made @ real.T).mean().item(), abs=1e-4)
    assert figures["image"]["n"] == 8  # the grid among them is none of them
    tokenizer = CLIPTokenizerFast.from_pretrained(packaged_path("pocket:clip"))
    with torch.no_grad():
        inputs = tokenizer([prompt.format("castle") for prompt in PROMPTS], padding=True, return_tensors="pt")
        texts = normalize(model.text_projection(model.text_model(**inputs).pooler_output), dim=1)
    own = [float(made[place] @ texts[place % 2]) for place in range(8)]
    assert figures["text"]["value"] == pytest.approx(sum(own) / 8, abs=1e-4)
    best = [int((made[place] @ texts.T).argmax()) == place % 2 for place in range(8)]
    assert figures["match"]["value"] == sum(best) / 8
    for figure in figures.values():
        assert figure["low"] is None or figure["low"] - 1e-9 <= figure["value"] <= figure["high"] + 1e-9


def test_a_reference_against_itself_is_copied_and_near(place):
    result = evaluate(place, "--reference", place / "real", folder="real")["networks"]["pocket:clip"]["figures"]
    assert result["fid"]["value"] == pytest.approx(0, abs=1e-6)
    assert result["cmmd_biased"]["value"] == pytest.approx(0, abs=1e-9)
    assert result["nearest"]["value"] == pytest.approx(1, abs=1e-6)
    assert result["copies"]["value"] == 1
    assert result["precision"]["value"] == result["recall"]["value"] == result["coverage"]["value"] == 1
    (place / "twice").mkdir()
    for number, path in enumerate([*sorted((place / "real").iterdir())[:6], sorted((place / "real").iterdir())[0]]):
        (place / "twice" / f"{number}.png").write_bytes(path.read_bytes())
    twice = evaluate(place, "--reference", place / "twice", "--pattern", "10[0-5].png", folder="real")
    assert twice["networks"]["pocket:clip"]["figures"]["copies"]["value"] == 1
    assert "2 of 7 reference images are there twice" in " ".join(twice["networks"]["pocket:clip"]["notes"])
    other = evaluate(place, "--reference", place / "real")["networks"]["pocket:clip"]["figures"]
    assert other["copies"]["value"] < 1
    assert other["fid"]["value"] > 1e-3  # and the two folders cannot be swapped unnoticed
    assert other["image"]["value"] < other["nearest"]["value"] < 1


def test_two_judges_and_few_images_are_said(place, capsys):
    two = "pocket:clip,efficientnet-lite0"
    result = evaluate(
        place, "--reference", place / "real", "--metrics", "text,diversity,fid,fd_infinity", networks=two
    )
    assert list(result["networks"]) == ["pocket:clip", "efficientnet-lite0"]
    assert "text" not in result["networks"]["efficientnet-lite0"]["figures"]
    notes = " ".join(result["networks"]["pocket:clip"]["notes"])
    assert "fid: 8 images are few" in notes
    assert "fd_infinity: 20 images are needed" in notes
    printed = capsys.readouterr().out
    assert "8 images of" in printed
    assert "note: fid: 8 images are few" in printed


def test_the_features_are_kept_by_content(place, tmp_path, monkeypatch):
    first = evaluate(place, "--reference", place / "real", "--cache_dir", tmp_path)
    monkeypatch.setattr("sd_atoms.evaluation.networks._rows", None)
    again = evaluate(place, "--reference", place / "real", "--cache_dir", tmp_path)
    assert first == again
    legacy = open_network("pocket:clip", resize="legacy")
    assert legacy.of_images([Image.new("RGB", (200, 150), "red")]).shape == (1, 128)


def test_the_network_with_imagenet_weights_knows_a_palace_and_a_daisy():
    squares = [
        fit(Image.fromarray(image), SIDE_PX, center_crop=True, resample="bicubic", rng=None)
        for image in load_sample_images().images
    ]
    pixels = torch.from_numpy(np.stack([np.array(square) for square in squares])).permute(0, 3, 1, 2).float()
    with torch.no_grad():
        assert load_efficientnet().classify(pixels).argmax(1).tolist() == [698, 985]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["none"], "none: no such folder"),
        (["{}/made", "--pattern", "x*"], "no images named x*"),
        (["{}/made", "--metrics", "fid,beauty"], "metrics: 'beauty': of subject"),
        (["{}/made", "--metrics", "fid,copying"], "reference is required for metrics: fid, copying"),
        (["{}/made", "--replace", "castle"], "replace: 'castle': NEW=KNOWN is allowed"),
        (["{}/made", "--networks", "nobody/nothing"], "nobody/nothing"),
        (["{}/made", "--networks", ","], "networks: one or more are needed"),
        (["{}/bad"], "c.png: holds no picture"),
    ],
)
def test_bad_input_is_one_line(place, words, message, capsys):
    (place / "bad").mkdir(exist_ok=True)
    (place / "bad" / "c.png").write_bytes(b"nothing")
    words = [word.format(place) for word in words]
    more = [] if "--networks" in words else ["--networks", "pocket:clip"]
    assert main(["evaluate", *words, *more]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_one_image_grey_ones_and_mixed_sizes_are_scored_as_far_as_they_go(place, tmp_path):
    (tmp_path / "one").mkdir()
    Image.new("L", (40, 90), 90).save(tmp_path / "one" / "a.png")
    result = evaluate(tmp_path, "--reference", place / "real", folder="one")["networks"]["pocket:clip"]
    assert set(result["figures"]) == {"image", "image_real", "nearest", "nearest_real", "copies"}
    assert result["figures"]["image"]["low"] is None
    assert any("images are needed" in note for note in result["notes"])


@pytest.mark.slow
def test_two_processes_find_the_same(place):
    alone = evaluate(place, "--reference", place / "real")["networks"]["pocket:clip"]["figures"]
    words = [place / "made", "--networks", "pocket:clip", "--draws", "20", "--reference", place / "real"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "sd_atoms"]
    done = subprocess.run(
        [str(word) for word in [*launch, "evaluate", *words, "--json", place / "two.json", "--overwrite"]],
        env=dict(os.environ, ACCELERATE_USE_CPU="true"), capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    both = json.loads((place / "two.json").read_text())["networks"]["pocket:clip"]["figures"]
    for name, figure in alone.items():
        assert both[name]["value"] == pytest.approx(figure["value"], rel=1e-5, abs=1e-6), name


FULL = """
import os, sys, time
from pathlib import Path
import sd_atoms.{module}
from sd_atoms.cli import main

def full(*args, **more):
    raise OSError(28, "No space left on device")

sd_atoms.{module}.save_file = full
code = main()
Path(__file__).with_name("code" + os.environ["RANK"]).write_text(str(code))
time.sleep(5 * (os.environ["RANK"] == "0"))  # the launcher ends the others when one is at its end
sys.exit(code)
"""


@pytest.mark.slow
@pytest.mark.parametrize("module", ["evaluation.networks", "data.checked"])
def test_a_full_disk_ends_both_processes_with_one_line(place, tmp_path, module):
    (tmp_path / "full.py").write_text(FULL.format(module=module))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    words = ["evaluate", place / "made", "--networks", "pocket:clip", "--cache_dir", tmp_path / "cache"]
    logs = ["--log-dir", tmp_path / "logs", "--redirects", "3"]
    done = subprocess.run(
        [str(word) for word in [*launch, *logs, tmp_path / "full.py", *words]],
        env=dict(os.environ, ACCELERATE_USE_CPU="true", PYTHONPATH=os.getcwd()), check=False, timeout=300,
        capture_output=True,
    )  # fmt: skip
    assert done.returncode != 0
    said = {path.parent.name: path.read_text() for path in (tmp_path / "logs").rglob("stderr.log")}
    assert len(said) == 2
    assert said["0"].count("no space left on the disk") == 1
    assert not any("Traceback" in text for text in said.values())
    assert [(tmp_path / name).read_text() for name in ("code0", "code1")] == ["2", "2"]
    assert not list((tmp_path / "cache").rglob(".*"))

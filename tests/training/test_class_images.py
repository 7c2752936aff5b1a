"""Class pictures: the user's own are kept, the rest is drawn, stopped and continued."""

import os
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
from accelerate import Accelerator
from PIL import Image

from sd_atoms.errors import UserError
from sd_atoms.generation import image_notes
from sd_atoms.pipeline.sampling import Sampling
from sd_atoms.training import class_images
from sd_atoms.training.class_images import FIRST_SEED, MOST_BLANK, MOST_PICTURES, SEEDS_PER_RUN, class_image_paths

QUICK = Sampling(guidance_scale=3.0, num_inference_steps=2)
PROMPT = "photo of a castle"


def paths(pipe, folder, count, prompt=PROMPT, sampling=QUICK, seed=0, base="pocket"):
    return class_image_paths(pipe, Accelerator(), folder, prompt, count, sampling, seed, base)


def contents(folder):
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}


def noise(path, seed=0, size=(48, 32)):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def name(number):
    return f"class-{FIRST_SEED + number}.png"


@pytest.fixture
def fake(monkeypatch):
    """A stand-in for `generate`: noise by seed, black for seeds in `fake.black`; `fake.asked` lists the seeds."""

    class Fake:
        black, asked = (), []

    def generate(pipe, requests, sampling, accelerator, batch_size):
        for request in requests:
            Fake.asked.append(request.seed - FIRST_SEED)
            pixels = np.random.default_rng(request.seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)
            yield request, Image.fromarray(pixels * (request.seed - FIRST_SEED not in Fake.black))

    Fake.asked = []
    monkeypatch.setattr(class_images, "generate", generate)
    return Fake


def test_missing_pictures_are_drawn_and_none_is_drawn_twice(pipe, tmp_path):
    folder = tmp_path / "new" / "class"
    first = paths(pipe, folder, 2)
    assert first == [folder / name(0), folder / name(1)]
    notes = image_notes(first[1])
    assert (notes["prompt"], notes["seed"], notes["base"]) == (PROMPT, str(FIRST_SEED + 1), "pocket")
    assert (notes["guidance_scale"], notes["num_inference_steps"]) == ("3.0", "2")
    before = contents(folder)
    assert paths(pipe, folder, 2) == first
    assert contents(folder) == before
    # more on top; then one lost: it comes back as it was, and nothing else is touched
    assert paths(pipe, folder, 4) == [folder / name(number) for number in range(4)]
    after = contents(folder)
    assert {key: after[key] for key in before} == before
    (folder / name(1)).unlink()
    assert len(paths(pipe, folder, 4)) == 4
    again = contents(folder)
    assert again[name(1)][1] == before[name(1)][1]
    assert {key for key in after if after[key] != again[key]} == {name(1)}


def test_the_users_own_pictures_come_first_and_stay_as_they_are(fake, tmp_path):
    noise(tmp_path / "img10.jpg", 1)
    noise(tmp_path / "img2.png", 2)
    noise(tmp_path / name(1), 3)  # of the user, for all its name: nothing in it says that it was drawn
    (tmp_path / "notes.txt").write_text("x")
    before = contents(tmp_path)
    found = paths(None, tmp_path, 5)
    assert [path.name for path in found] == [name(1), "img2.png", "img10.jpg", name(0), name(2)]
    after = contents(tmp_path)
    assert {key: after[key] for key in before} == before
    assert set(after) - set(before) == {name(0), name(2)}
    assert [path.name for path in paths(None, tmp_path, 2)] == [name(1), "img2.png"]
    assert contents(tmp_path) == after


def test_drawn_pictures_beyond_the_count_are_left_alone(fake, tmp_path):
    paths(None, tmp_path, 12)
    assert paths(None, tmp_path, 11) == [tmp_path / name(number) for number in range(11)]
    assert len(list(tmp_path.iterdir())) == 12


def test_every_run_has_seeds_of_its_own_but_uses_what_is_there(fake, tmp_path):
    paths(None, tmp_path, 2)
    assert paths(None, tmp_path, 3, seed=7)[2] == tmp_path / name(7 * SEEDS_PER_RUN)
    assert fake.asked == [0, 1, 7 * SEEDS_PER_RUN]
    starts = [FIRST_SEED + seed * SEEDS_PER_RUN for seed in (0, 1, 2**32 - 1)]
    assert all(2**32 <= start < 2**49 for start in starts)
    assert all(later - earlier >= 2 * MOST_PICTURES for earlier, later in pairwise(starts))


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        (dict(prompt="photo of a barn"), "drawn with prompt='photo of a castle', asked is 'photo of a barn'"),
        (dict(base="other"), "drawn with base='pocket', asked is 'other'"),
        (dict(sampling=Sampling(guidance_scale=4.0)), "drawn with guidance_scale='3.0', asked is '4.0'"),
    ],
)
def test_pictures_drawn_otherwise_are_never_mixed_in(fake, tmp_path, changed, problem):
    paths(None, tmp_path, 2)
    before = contents(tmp_path)
    for count in (2, 3):
        with pytest.raises(UserError) as error:
            paths(None, tmp_path, count, **changed)
        assert str(error.value).startswith(f"{tmp_path / name(0)}: {problem}")
        assert "\n" not in str(error.value)
    assert contents(tmp_path) == before


def test_blank_black_and_broken_pictures_are_all_named_before_anything_is_drawn(fake, tmp_path):
    for file, colour in (("black.png", "black"), ("red.png", "red")):
        Image.new("RGB", (64, 64), colour).save(tmp_path / file)
    almost = np.full((64, 64, 3), 100, dtype=np.uint8)
    almost[:, ::2] += 3  # deviation 1.5
    Image.fromarray(almost).save(tmp_path / "almost.png")
    noise(tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:500])
    noise(tmp_path / "good.png")
    almost[:, ::2] += 3  # deviation 3: faint, but a picture
    Image.fromarray(almost).save(tmp_path / "faint.png")
    before = contents(tmp_path)
    with pytest.raises(UserError) as error:
        paths(None, tmp_path, 10)
    heading, *lines = str(error.value).splitlines()
    assert heading == "4 of 6 class pictures cannot be used:"
    named = [line.split(":")[0].rpartition("/")[2] for line in lines]
    assert named == ["almost.png", "black.png", "cut.png", "red.png"]
    for file in ("cut.png", "almost.png", "black.png"):
        (tmp_path / file).unlink()
    with pytest.raises(UserError) as error:
        paths(None, tmp_path, 10)
    assert str(error.value) == f"{tmp_path / 'red.png'}: is blank (black or in one colour)"
    assert {path.name for path in tmp_path.iterdir()} == {"red.png", "good.png", "faint.png"} <= set(before)
    assert not fake.asked


def test_a_drawn_blank_gives_way_to_the_next_seed_and_resuming_ends_the_same(fake, tmp_path):
    fake.black = (1, 4, 5)
    found = paths(None, tmp_path / "whole", 5)
    assert [path.name for path in found] == [name(number) for number in (0, 2, 3, 6, 7)]
    assert fake.asked == list(range(8))
    paths(None, tmp_path / "parts", 2)
    paths(None, tmp_path / "parts", 5)
    (tmp_path / "parts" / name(3)).unlink()
    paths(None, tmp_path / "parts", 5)
    whole, parts = contents(tmp_path / "whole"), contents(tmp_path / "parts")
    assert {key: value[1] for key, value in whole.items()} == {key: value[1] for key, value in parts.items()}


def test_a_base_that_draws_only_black_is_given_up(fake, tmp_path):
    fake.black = range(SEEDS_PER_RUN)
    for count in (3, 30):
        fake.asked.clear()
        with pytest.raises(UserError, match=rf"came out black or in one colour, {count} are still missing") as error:
            paths(None, tmp_path / "class", count)
        assert "\n" not in str(error.value)
        assert len(fake.asked) < MOST_BLANK + count
    assert not (tmp_path / "class").exists()


def test_what_an_interrupted_write_leaves_is_no_picture(fake, tmp_path):
    (tmp_path / f".{name(0)}.abc.png").write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("x")
    assert paths(None, tmp_path, 1) == [tmp_path / name(0)]


def test_a_file_in_place_of_the_folder_and_too_many_are_one_line(tmp_path):
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(UserError, match="is a file; expected a folder of images"):
        paths(None, file, 1)
    with pytest.raises(UserError, match=f"num_class_images: {MOST_PICTURES + 1} is too many"):
        paths(None, tmp_path, MOST_PICTURES + 1)


SCRIPT = f"""
import sys
from pathlib import Path

import torch

from sd_atoms.pipeline.sampling import Sampling
from sd_atoms.pipeline import open_base
from sd_atoms.training.class_images import class_image_paths
from sd_atoms.machine import make_accelerator

accelerator = make_accelerator()
torch.set_num_threads(1)
found = class_image_paths(
    open_base("pocket"), accelerator, Path(sys.argv[1]), {PROMPT!r}, 3, {QUICK!r}, 0, "pocket"
)
assert len(found) == 3, found
(Path(sys.argv[2]) / f"rank{{accelerator.process_index}}").write_text(" ".join(path.name for path in found))
accelerator.end_training()
"""


@pytest.mark.slow
def test_two_processes_draw_the_files_of_one(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = dict(os.environ, ACCELERATE_USE_CPU="true", PYTHONPATH=os.getcwd())
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for where, command in (("one", [sys.executable]), ("two", two)):
        noise(tmp_path / where / "own.png")
        said = tmp_path / f"{where}-said"
        said.mkdir()
        run = subprocess.run(
            [*command, str(script), str(tmp_path / where), str(said)],
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
            env=environment,
        )
        assert run.returncode == 0, run.stderr
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert set(one) == {"own.png", name(0), name(1)}
    assert {key: value[1] for key, value in one.items()} == {key: value[1] for key, value in two.items()}
    said = {path.read_text() for path in tmp_path.glob("*-said/*")}
    assert said == {f"own.png {name(0)} {name(1)}"}
    assert len(list((tmp_path / "two-said").iterdir())) == 2

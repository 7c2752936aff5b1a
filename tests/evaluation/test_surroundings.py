"""Whether the surroundings of the photos come along."""

import json

import numpy as np
import pytest
from PIL import Image

from sd_atoms.cli import main
from sd_atoms.data.checked import usable, with_masks
from sd_atoms.data.records import folder_images, image_record
from sd_atoms.errors import UserError
from sd_atoms.evaluation import surroundings as module
from sd_atoms.evaluation.networks import open_network
from sd_atoms.evaluation.surroundings import subject_places, surroundings
from sd_atoms.pocket.world import Scene, render
from sd_atoms.sources import packaged_path

CASTLE = packaged_path("pocket:castle")


def photos(folder=CASTLE):
    return with_masks(usable(folder_images(folder, False, True)[0], "error")[0])


def saved(folder, images):
    folder.mkdir(exist_ok=True)
    for number, image in enumerate(images):
        image.save(folder / f"{number}.png")
    return usable([image_record(path) for path in sorted(folder.iterdir())], "error")[0]


def value(records):
    return surroundings(open_network("colours"), records, photos(), "antialiased")


def test_the_subject_counts_for_nothing_and_what_surrounds_it_for_all(tmp_path):
    own, places = [record.read() for record in photos()], subject_places(photos())
    copies, without = value(saved(tmp_path / "copies", own)), []
    for image in own:
        other = image.copy()
        other.paste((255, 0, 0), mask=places)  # another subject in the same place
        without.append(other)
    assert copies.tolist() == pytest.approx([1] * 5, abs=1e-5)
    assert value(saved(tmp_path / "without", without)).tolist() == copies.tolist()
    elsewhere = [
        render(Scene("castle", 0, None, setting, None, "none", seed=9, light=None, concept="castle"))
        for setting in ("otherworld", "lake", "forest")
    ]
    assert value(saved(tmp_path / "elsewhere", elsewhere)).max() < 0.97


def test_an_image_is_made_without_its_subject_once(monkeypatch):
    own, made = module._content, []
    monkeypatch.setattr(module, "_content", lambda record, places: made.append(record.name) or own(record, places))
    value(photos())
    assert len(made) == 10  # five images, and the five photos


def test_places_are_where_any_photo_has_its_subject():
    free = np.asarray(subject_places(photos())) == 0
    for record in photos():
        assert not np.asarray(record.mask.read())[free].any()
    assert free.mean() > 0.4


def test_what_cannot_be_compared_is_said(tmp_path):
    plain = usable(folder_images(CASTLE, False)[0], "error")[0]
    with pytest.raises(UserError, match=r"surroundings: .*1\.png has no mask"):
        subject_places(plain)
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    Image.new("L", (64, 64), 255).save(tmp_path / "a.mask.png")
    with pytest.raises(UserError, match="leave 0% of a square free"):
        subject_places(photos(tmp_path))


def test_evaluate_tells_it_where_it_is_asked_for(tmp_path, capsys):
    saved(tmp_path / "images", [record.read() for record in photos()])
    words = ["evaluate", str(tmp_path / "images"), "--networks", "colours", "--metrics", "surroundings,subject"]
    assert main(words) == 2
    assert "metrics: surroundings needs reference" in capsys.readouterr().err
    saved(tmp_path / "plain", [record.read() for record in photos()])
    assert main([*words, "--reference", str(tmp_path / "plain")]) == 2
    assert "has no mask, which says where the subject is; expected NAME.mask.png" in capsys.readouterr().err
    out = tmp_path / "scores.json"
    assert main([*words, "--reference", str(CASTLE), "--json", str(out)]) == 0
    figures = json.loads(out.read_text())["networks"]["colours"]["figures"]
    assert figures["surroundings"]["value"] == pytest.approx(1, abs=1e-5)
    assert figures["surroundings"]["n"] == 5

"""The judge of identity: which landmarks it learns from, what it is measured by, and how it is opened."""

import dataclasses
import json
import random

import numpy as np
import pytest
import torch
from accelerate import PartialState
from PIL import Image
from transformers import CLIPModel, ResNetModel

from sd_atoms import sources
from sd_atoms.cli import main
from sd_atoms.errors import UserError
from sd_atoms.evaluation.networks import open_network
from sd_atoms.pocket.pretrain import assemble, judge, views
from sd_atoms.pocket.pretrain.clip import normalise_pixels
from sd_atoms.pocket.pretrain.stages import STAGES, JudgeSettings
from sd_atoms.pocket.world import CONCEPTS, LANDMARKS
from sd_atoms.sources import packaged_path

TINY = JudgeSettings(
    max_steps=2,
    batch_size=4,
    landmark_count=24,
    rendered_views=3,
    views_per_landmark=2,
    held_out_groups=1,
    held_out_landmarks=4,
    held_out_of_class=2,
    widths=(8, 8, 8, 8),
)


@pytest.fixture(scope="module")
def work_dir(tmp_path_factory):
    """A folder in which the judge is trained for two steps, and assembled into pocket-judge."""
    folder = tmp_path_factory.mktemp("judge")
    CLIPModel.from_pretrained(packaged_path("pocket:clip")).save_pretrained(folder / "clip")
    figures = judge.run(folder, TINY, PartialState())
    (folder / "figures.json").write_text(json.dumps(figures))
    assemble.assemble_judge(folder, folder / "pocket-judge")
    assemble.store_as(folder / "pocket-judge" / "model.safetensors", torch.float16)
    return folder


@pytest.fixture
def packaged_judge(work_dir, monkeypatch):
    monkeypatch.setitem(sources._PACKAGED, "pocket:judge", work_dir / "pocket-judge")
    return work_dir / "pocket-judge"


def seeds_of_training_and_measuring(settings, monkeypatch):
    """What the stage draws its landmarks from, with nothing rendered."""
    trained = [seed for shard in views._shards(sources._PACKAGE, settings).values() for seed in shard]
    measured = []

    def remember(seed, count, name):
        measured.append((seed, name))
        return np.zeros((count, 1, 1, 3), np.uint8)

    monkeypatch.setattr(judge, "landmark_views", remember)
    judge.held_out_views(settings)
    return trained, measured


def test_landmarks_that_measure_are_never_among_those_that_train(monkeypatch):
    trained, measured = seeds_of_training_and_measuring(STAGES["judge"].settings, monkeypatch)
    assert len(trained) == STAGES["judge"].settings.landmark_count
    assert len({seed for seed, _ in measured}) == len(measured) == 4 * (100 + 9 * 20)
    assert {seed for seed, _ in measured}.isdisjoint(trained)
    some = {views.draw_landmark(random.Random(seed)) for seed in trained[:300]}
    assert some.isdisjoint(views.draw_landmark(random.Random(seed), name) for seed, name in measured[::4])


def test_measured_groups_of_one_class_hold_that_class_alone():
    for name in LANDMARKS:
        drawn, shape = views.draw_landmark(random.Random(3), name)
        assert drawn == name
        assert isinstance(shape, type(LANDMARKS[name].shape(random.Random(0), (0, 0, 0))))


@pytest.mark.parametrize("name", CONCEPTS)
def test_a_personal_landmark_and_what_is_like_it_are_never_drawn(name, monkeypatch):
    own, other = CONCEPTS[name], LANDMARKS[name].shape(random.Random(0), (120, 120, 120))
    changed = {"castle": {"banner": None, "has_keep": True}, "canal": {"bridge": None, "water": (70, 120, 150)}}[name]
    offered = iter([own, dataclasses.replace(own, **changed), other])
    monkeypatch.setitem(LANDMARKS, name, LANDMARKS[name]._replace(shape=lambda rng, wall: next(offered)))
    rng = random.Random(0)
    rng.random = lambda: 0.9  # no banner is added
    assert views.draw_landmark(rng, name) == (name, other)


def test_most_castles_with_the_walls_of_the_personal_one_are_still_drawn():
    rng = random.Random(0)
    shapes = [LANDMARKS["castle"].shape(rng, CONCEPTS["castle"].wall) for _ in range(100)]
    assert 0 < sum(views.is_near_concept("castle", shape) for shape in shapes) < 50


def test_the_views_of_a_landmark_are_different_pictures_of_it(work_dir):
    taken = views.take_views(views.load_views(work_dir, TINY), [0, 23], 2, np.random.default_rng(0))
    for number, pair in zip((0, 23), taken, strict=True):
        own = [picture.tobytes() for picture in views.landmark_views(number, 3)]
        found = [own.index(view.permute(1, 2, 0).numpy().tobytes()) for view in pair]
        assert found[0] != found[1]


def test_half_of_the_negatives_are_of_the_same_class():
    settings = JudgeSettings(landmark_count=600)
    members = views.class_members(settings)
    classes = {int(number): index for index, numbers in enumerate(members) for number in numbers}
    assert sorted(classes) == list(range(600))
    drawn = judge.draw_landmarks(members, 16, np.random.default_rng(0))
    assert len(set(drawn.tolist())) == 16
    counts = np.unique([classes[number] for number in drawn.tolist()], return_counts=True)[1]
    assert counts.tolist() == [8, 8]


def test_the_class_of_a_landmark_is_that_of_its_views():
    settings = JudgeSettings(landmark_count=40)
    drawn = [views.draw_landmark(random.Random(seed))[0] for seed in range(40)]
    members = views.class_members(settings)
    assert sorted(number for numbers in members for number in numbers) == list(range(40))
    assert all(len({drawn[number] for number in numbers}) == 1 for numbers in members)
    assert len(members) == len(set(drawn))


def test_softened_pictures_keep_their_level_and_half_of_them_lose_detail():
    settings = JudgeSettings(noise_deviation=0.0)
    pixels = torch.randint(0, 256, (6, 3, 128, 128), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    soft = judge.soften(pixels, settings, np.random.default_rng(0), torch.Generator())
    sharp = normalise_pixels(pixels)
    torch.testing.assert_close(soft.mean((2, 3)), sharp.mean((2, 3)), rtol=0, atol=0.05)
    ratio = soft.std((1, 2, 3)) / sharp.std((1, 2, 3))
    assert (ratio < 0.9).sum() == 3
    torch.testing.assert_close(soft[ratio > 0.9], sharp[ratio > 0.9])


def test_the_loss_is_the_mean_cross_entropy_of_the_other_views_of_a_landmark_among_all_views():
    rows = np.array([[1, 0], [0, 1], [0.6, 0.8], [0.8, 0.6], [-1, 0], [0, -1]])  # three views of two landmarks each
    features = torch.tensor(rows * np.array([[1], [2], [3], [1], [5], [1]]), dtype=torch.float32)
    cosines, losses = rows @ rows.T, []
    for view in range(6):
        others = [index for index in range(6) if index != view]
        own = [index for index in others if index // 3 == view // 3]
        everything = np.log(np.exp(cosines[view, others] / 0.5).sum())
        losses += [everything - cosines[view, other] / 0.5 for other in own]
    assert float(judge.contrastive_loss(features.reshape(2, 3, 2), 0.5)) == pytest.approx(np.mean(losses), abs=1e-6)


def test_the_right_view_rate_counts_both_directions():
    first = torch.tensor([[3.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    second = torch.tensor([[1.0, 0.1], [1.0, 0.0], [0.1, 0.2]])
    # cosines of first to second: [0.995, 1, 0.447], [0.0995, 0, 0.894], [0.774, 0.707, 0.949]
    # the nearest of first: 1 (wrong), 2 (wrong), 2; the nearest of second: 0, 0 (wrong), 2
    assert judge.right_view_rate(first, second) == pytest.approx(3 / 6)


def test_the_figures_are_rates_of_groups_and_stand_beside_those_of_clip(work_dir):
    figures = json.loads((work_dir / "figures.json").read_text())
    assert figures["steps"] == 2
    model = ResNetModel.from_pretrained(work_dir / "judge").eval()
    groups = judge.held_out_views(TINY)
    with torch.no_grad():
        encoded = [
            (kind, *(judge.pooled(model, normalise_pixels(pictures[:, view])) for view in (0, 1)))
            for kind, pictures in groups
        ]
    by_hand = {kind: judge.right_view_rate(first, second) for kind, first, second in encoded}
    found = figures["judge"]
    assert found["right_view_of_4"] == pytest.approx(by_hand.pop("any"), abs=1e-3)
    assert found["by_class"] == pytest.approx(by_hand, abs=1e-3)
    assert found["right_view_of_2_of_one_class"] == pytest.approx(np.mean(list(by_hand.values())), abs=1e-3)
    assert figures["clip"].keys() == found.keys()


def test_a_packaged_judge_opens_by_its_name_and_its_features_are_the_pooled_output(packaged_judge):
    network = open_network("pocket:judge")
    pictures = views.landmark_views(5, 2)
    found = network.of_images([Image.fromarray(picture) for picture in pictures])
    model = ResNetModel.from_pretrained(packaged_judge).eval()
    assert model.dtype == torch.float32
    with torch.no_grad():
        expected = judge.pooled(model, normalise_pixels(torch.from_numpy(pictures).permute(0, 3, 1, 2)))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert network.of_texts is None


@pytest.mark.slow  # the whole command; how the judge opens is tested above
def test_evaluate_scores_by_a_packaged_judge(packaged_judge, tmp_path):
    for number, picture in enumerate(views.landmark_views(7, 4)):
        folder = tmp_path / ("made" if number % 2 else "real")
        folder.mkdir(exist_ok=True)
        Image.fromarray(picture).save(folder / f"{number}.png")
    words = ["evaluate", tmp_path / "made", "--reference", tmp_path / "real", "--networks", "pocket:judge"]
    words += ["--metrics", "subject", "--draws", "2", "--json", tmp_path / "scores.json"]
    assert main([str(word) for word in words]) == 0
    scores = json.loads((tmp_path / "scores.json").read_text())["networks"]["pocket:judge"]["figures"]
    assert -1 <= scores["image"]["value"] <= 1


def test_a_judge_that_is_not_packaged_is_not_listed(tmp_path, monkeypatch):
    monkeypatch.setitem(sources._PACKAGED, "pocket:judge", tmp_path / "pocket-judge")
    with pytest.raises(UserError, match="'pocket:judge' is not packaged; there is pocket, pocket:clip, pocket:castle"):
        packaged_path("pocket:judge")


def test_the_judge_has_at_most_two_million_parameters():
    model = judge.build_judge(STAGES["judge"].settings)
    assert sum(parameter.numel() for parameter in model.parameters()) <= 2_000_000

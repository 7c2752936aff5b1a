"""Figures of a classifier, by hand."""

import numpy as np
import pytest
import torch
from small import coloured

from sd_atoms.classify.models import Preprocessing
from sd_atoms.classify.scores import calibration_error, scores_of
from sd_atoms.classify.training import centre_crop, random_box
from sd_atoms.report.classifier import scores_text


def test_accuracy_classes_and_confusion():
    logits = torch.tensor([[3.0, 0, 0], [0, 2, 1], [0, 1, 2], [5, 0, 0]])
    found = scores_of(logits, [0, 1, 1, 1], ("a", "b", "c"))
    assert found["accuracy"]["value"] == pytest.approx(0.5)
    assert found["by_class"] == {"a": 1.0, "b": pytest.approx(1 / 3), "c": None}
    assert found["confusion"] == [[1, 0, 0], [1, 1, 1], [0, 0, 0]]
    assert found["majority"] == 0.75
    expected = -np.mean(
        [row[label] - np.log(np.exp(row).sum()) for row, label in zip(logits.numpy(), [0, 1, 1, 1], strict=True)]
    )
    assert found["cross_entropy"]["value"] == pytest.approx(expected, rel=1e-6)


def test_the_calibration_error_is_that_of_its_bins():
    generator = torch.Generator().manual_seed(0)
    logits, truth = torch.randn(500, 4, generator=generator) * 2, torch.randint(4, (500,), generator=generator)
    confidence, said = logits.double().softmax(1).max(1)
    total = 0.0
    for low in range(15):
        inside = [i for i in range(500) if low / 15 < confidence[i] <= (low + 1) / 15]
        if inside:
            right = np.mean([float(said[i] == truth[i]) for i in inside])
            total += len(inside) / 500 * abs(right - np.mean([confidence[i].item() for i in inside]))
    assert calibration_error(logits, truth) == pytest.approx(total, rel=1e-9)


@pytest.mark.parametrize("share", [1.0, 0.875])
def test_a_test_image_is_the_middle(share):
    image = coloured("red", 0)  # 48 × 40
    found = centre_crop(image, Preprocessing(32, share))
    assert found.size == (32, 32)
    small = Preprocessing(40, 1.0)
    assert np.array_equal(np.asarray(centre_crop(image, small)), np.asarray(image)[:, 4:44])


def test_a_random_crop_has_at_least_its_share():
    import random

    rng = random.Random(0)
    for _ in range(200):
        left, top, right, bottom = random_box((100, 60), 0.3, rng)
        assert 0 <= left < right <= 100
        assert 0 <= top < bottom <= 60
        assert (right - left) * (bottom - top) >= 0.29 * 6000


def test_the_commonest_mistakes_are_told():
    logits = torch.eye(3)[[0, 1, 1, 1, 2]]
    said = scores_text(scores_of(logits, [0, 0, 0, 1, 1], ["cat", "dog", "hen"]))
    assert said.endswith("Most often mistaken: cat as dog (2); dog as hen (1).")

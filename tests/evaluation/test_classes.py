"""Coverage by class against a loop over images, and the linear classifier against its normal equations."""

import pytest
import torch

from sd_atoms.evaluation.classes import RIDGE, Probe, class_coverage
from sd_atoms.evaluation.sets import neighbours

GENERATOR = torch.Generator().manual_seed(0)
REAL, MADE = torch.randn(30, 4, generator=GENERATOR), torch.randn(12, 4, generator=GENERATOR) + 0.5
LABELS, OF_MADE = [n % 3 for n in range(30)], [n % 3 for n in range(12)]


def test_coverage_by_class_is_as_defined():
    found = class_coverage(REAL, LABELS, MADE, OF_MADE)
    apart = torch.cdist(REAL.double(), REAL.double())
    for label in range(3):
        covered = []
        for place in range(label, 30, 3):
            reach = apart[place].sort().values[5]  # the first is the image itself
            own = [n for n in range(12) if OF_MADE[n] == label]
            covered.append(any((REAL[place].double() - MADE[n].double()).norm() < reach for n in own))
        assert found[label] == pytest.approx(sum(covered) / 10)


def test_without_classes_it_is_the_coverage_of_the_set_in_parts():
    found = class_coverage(REAL, LABELS, MADE, None)
    assert sum(found.values()) / 3 == pytest.approx(neighbours(REAL, MADE).covered.mean().item())
    assert max(class_coverage(REAL, LABELS, MADE, [7] * 12).values()) == 0  # of no class that is there
    with pytest.raises(ValueError, match="more than 5 real images"):
        class_coverage(REAL[:5], LABELS[:5], MADE, None)


@pytest.mark.parametrize("count", [30, 3])
def test_the_classifier_solves_its_normal_equations_with_more_images_or_more_features(count):
    x, labels = REAL[:count].double(), LABELS[:count]
    probe = Probe(REAL[:count], labels, 3)
    standard = (x - x.mean(0)) / x.std(0)
    targets = torch.nn.functional.one_hot(torch.tensor(labels), 3).double()
    ridge = RIDGE * standard.square().sum() / count
    left = standard.T @ standard @ probe.weights + ridge * probe.weights
    torch.testing.assert_close(left, standard.T @ (targets - targets.mean(0)))


def test_the_classifier_knows_classes_that_lie_apart_and_none_that_do_not():
    centres = 5 * torch.eye(3, 8)
    features = torch.cat([centres[label] + torch.randn(1, 8, generator=GENERATOR) for label in LABELS])
    probe = Probe(features, LABELS, 3)
    assert probe.right(features, LABELS).mean() == 1
    assert probe.right(features, [(label + 1) % 3 for label in LABELS]).mean() == 0
    assert probe.right(centres, [0, 1, 2]).tolist() == [1, 1, 1]

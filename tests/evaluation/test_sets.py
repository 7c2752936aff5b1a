"""Metrics between sets of features, against closed forms and sums written out."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from torch.nn.functional import normalize
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.mifid import MemorizationInformedFrechetInceptionDistance

from sd_atoms.evaluation import intervals, sets
from sd_atoms.evaluation.intervals import counts, drawn_figure, figure, mean_figure, share_figure
from sd_atoms.evaluation.metrics import diversity, nearest, nearest_other, vendi, weighted_diversity
from sd_atoms.evaluation.sets import Frechet, cmmd, fd_infinity, fid, kid, mifid, neighbours


def normal(n, d=6, seed=0, shift=0.0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) * torch.linspace(0.5, 2, d) + shift


def by_torchmetrics(metric_class, real, made):
    metric = metric_class(sets._Given(real.shape[1])).set_dtype(torch.float64)
    metric.update(real.double(), real=True)
    metric.update(made.double(), real=False)
    return metric.compute().item()


REAL, MADE = normal(60), normal(50, seed=1, shift=0.7)


def test_fid_is_the_distance_of_two_normal_distributions():
    a, b = REAL.double().numpy(), MADE.double().numpy()
    one, other = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(one @ other).real
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(one + other - 2 * root)
    assert fid(REAL, MADE) == pytest.approx(expected, rel=1e-6)
    assert 0 <= fid(REAL, REAL) < 1e-9
    assert by_torchmetrics(FrechetInceptionDistance, REAL, MADE) == pytest.approx(expected, rel=1e-6)
    few, fewer = normal(5, 40, seed=4), normal(4, 40, seed=5)  # of fewer than 40 images, the Gram matrices tell
    x, y = (set_.double() - set_.double().mean(0) for set_ in (few, fewer))
    cross = np.linalg.svd((x @ y.T).numpy(), compute_uv=False).sum() / math.sqrt(4 * 3)
    traces = x.square().sum() / 4 + y.square().sum() / 3
    between = (few.double().mean(0) - fewer.double().mean(0)).square().sum()
    assert Frechet(few).distance(fewer) == pytest.approx((between + traces - 2 * cross).item(), rel=1e-9)


def test_kid_over_whole_sets_is_the_unbiased_mmd_of_a_cubic_kernel():
    def kernel(x, y):
        return (float(x @ y) / 6 + 1) ** 3

    a, b = REAL[:50].double(), MADE.double()
    within = sum(kernel(x, y) for s in (a, b) for i, x in enumerate(s) for j, y in enumerate(s) if i != j) / (50 * 49)
    across = sum(kernel(x, y) for x in a for y in b) / (50 * 50)
    mean, deviation = kid(a, b)
    assert mean == pytest.approx(within - 2 * across, rel=1e-6)
    assert deviation == pytest.approx(0, abs=1e-9)  # every subset is the whole set


def test_kid_of_draws_is_kid_of_the_images_that_were_drawn():
    def kernel(x, y):
        return (float(x @ y) / 6 + 1) ** 3

    a, b = REAL[:7].double(), MADE[:5].double()
    v = torch.tensor([[1, 2], [1, 0], [1, 3], [1, 1], [1, 0], [1, 1], [1, 0]]).double()
    w = torch.tensor([[1, 2], [1, 0], [1, 0], [1, 0], [1, 3]]).double()
    found = sets.kid_of_draws(a, b, (v, w))
    for draw in range(2):
        total = 0
        for images, times in ((a, v[:, draw].tolist()), (b, w[:, draw].tolist())):
            pairs = [(i, j) for i in range(len(images)) for j in range(len(images)) if i != j]
            weight = sum(times[i] * times[j] for i, j in pairs)
            total += sum(times[i] * times[j] * kernel(images[i], images[j]) for i, j in pairs) / weight
        across = sum(v[i, draw] * w[j, draw] * kernel(x, y) for i, x in enumerate(a) for j, y in enumerate(b))
        expected = total - 2 * across / (v[:, draw].sum() * w[:, draw].sum())
        assert found[draw].item() == pytest.approx(expected.item(), rel=1e-9)


def test_kid_is_seeded_and_leaves_the_global_numbers_alone(monkeypatch):
    monkeypatch.setattr(sets, "KID_SUBSET_SIZE", 20)
    before = torch.get_rng_state()
    first = kid(REAL, MADE, seed=3)
    assert first == kid(REAL, MADE, seed=3) != kid(REAL, MADE, seed=4)
    assert torch.equal(before, torch.get_rng_state())


def test_mifid_punishes_copies():
    made = torch.cat([REAL[:25], REAL[:25] + 1e-3])
    assert mifid(REAL, made) > 10 * fid(REAL, made) > 0
    for other in (MADE, REAL[:30] + 0.1 * MADE[:30]):
        # the paper asks of each generated image how near a real one is, torchmetrics of each real one
        expected = by_torchmetrics(MemorizationInformedFrechetInceptionDistance, other, REAL)
        assert mifid(REAL, other) == pytest.approx(expected, rel=1e-6)


def test_cmmd_is_the_mmd_of_a_gaussian_kernel():
    a, b = normalize(REAL, dim=1).double(), normalize(MADE, dim=1).double()

    def kernel(x, y):
        return math.exp(-float((x - y).square().sum()) / 200)

    def mean(s, t, skip):
        pairs = [kernel(x, y) for i, x in enumerate(s) for j, y in enumerate(t) if not (skip and i == j)]
        return sum(pairs) / len(pairs)

    biased, unbiased = (value.item() for value in cmmd(a, b))
    across = 2 * mean(a, b, skip=False)
    assert biased == pytest.approx(1000 * (mean(a, a, False) + mean(b, b, False) - across), rel=1e-6)
    assert unbiased == pytest.approx(1000 * (mean(a, a, True) + mean(b, b, True) - across), rel=1e-6)


def test_a_draw_of_cmmd_is_that_of_the_images_drawn(monkeypatch):
    monkeypatch.setattr(sets, "CHUNK", 7)
    a, b = normalize(REAL, dim=1), normalize(MADE, dim=1)
    v, w = counts(60, 3, 0), counts(50, 3, 1)
    biased, _ = cmmd(a, b, (v, w))
    for draw in range(3):
        drawn = a.repeat_interleave(v[:, draw].long(), 0), b.repeat_interleave(w[:, draw].long(), 0)
        assert biased[draw].item() == pytest.approx(cmmd(*drawn)[0].item(), rel=1e-6)


@pytest.mark.parametrize("chunk", [7, 2048])
def test_neighbours_are_those_found_one_by_one(monkeypatch, chunk):
    monkeypatch.setattr(sets, "CHUNK", chunk)
    a, b, k = REAL.double().numpy(), MADE.double().numpy(), 5

    def reach(s):
        return [sorted(np.linalg.norm(x - y) for y in s)[k] for x in s]

    reach_a, reach_b = reach(a), reach(b)
    apart = [[np.linalg.norm(x - y) for y in b] for x in a]
    found = neighbours(REAL, MADE, k)
    assert found.precise.tolist() == [float(any(apart[i][j] < reach_a[i] for i in range(60))) for j in range(50)]
    expected = [sum(apart[i][j] < reach_a[i] for i in range(60)) / k for j in range(50)]
    assert found.dense.tolist() == pytest.approx(expected)
    assert found.recalled.tolist() == [float(any(apart[i][j] < reach_b[j] for j in range(50))) for i in range(60)]
    assert found.covered.tolist() == [float(min(apart[i]) < reach_a[i]) for i in range(60)]


def test_the_distance_at_infinitely_many_images_is_nearer_to_none_for_equal_distributions():
    real, made = normal(4000, 24, seed=2), normal(400, 24, seed=3)
    at_hand, at_infinity = fid(real, made), fd_infinity(real, made)
    assert abs(at_infinity) < at_hand / 3
    assert fd_infinity(real, made) == pytest.approx(at_infinity, rel=1e-9)  # BLAS rounds by where its inputs lie


@pytest.mark.parametrize("metric", [fid, mifid, kid, cmmd, neighbours, fd_infinity])
def test_too_few_images_are_one_error(metric):
    with pytest.raises(ValueError, match="images are needed"):
        metric(REAL, MADE[:1])


def test_vendi_counts_what_differs():
    assert vendi(torch.eye(5)) == pytest.approx(5)
    assert vendi(torch.eye(5)[:1].repeat(9, 1)) == pytest.approx(1)
    unit = normalize(REAL, dim=1).double()
    eigenvalues = np.linalg.eigvalsh((unit @ unit.T).numpy() / 60)  # N > d goes the other way
    kept = eigenvalues[eigenvalues > 1e-12]
    assert vendi(unit) == pytest.approx(math.exp(-(kept * np.log(kept)).sum()), rel=1e-9)
    assert vendi(unit[:4]) == pytest.approx(vendi(unit[:4].flip(0)), rel=1e-9)


def test_nearest_images():
    unit = normalize(REAL, dim=1)
    others = normalize(MADE, dim=1)
    assert nearest(unit, others, 7).tolist() == pytest.approx([max(float(x @ y) for y in others) for x in unit])
    expected = [max(float(unit[i] @ unit[j]) for j in range(60) if j != i) for i in range(60)]
    assert nearest_other(unit, 7).tolist() == pytest.approx(expected)


def test_a_draw_of_the_diversity_leaves_out_an_image_beside_itself():
    unit = normalize(REAL, dim=1)
    assert weighted_diversity(unit, torch.ones(60, 1)).item() == pytest.approx(diversity(unit), rel=1e-5)
    drawn = counts(60, 2, 0)
    for draw, found in enumerate(weighted_diversity(unit, drawn).tolist()):
        numbers = torch.arange(60).repeat_interleave(drawn[:, draw].long()).tolist()
        pairs = [1 - float(unit[i] @ unit[j]) for i in numbers for j in numbers if i != j]
        assert found == pytest.approx(sum(pairs) / len(pairs), rel=1e-5)


def test_intervals_hold_the_mean_and_shrink_with_the_root_of_n():
    few, many = torch.randn(50, generator=torch.Generator().manual_seed(0)), torch.randn(5000)
    found, wide = mean_figure(many, 500, 0), mean_figure(few, 500, 0)
    assert found.value == pytest.approx(many.mean().item(), abs=1e-6)
    assert found.low < found.value < found.high
    assert 6 < (wide.high - wide.low) / (found.high - found.low) < 15  # √100
    deviation = many.std().item() / math.sqrt(5000)
    assert found.high - found.low == pytest.approx(2 * 1.96 * deviation, rel=0.15)
    assert mean_figure(few, 500, 0) == wide
    assert drawn_figure(lambda numbers: few[numbers].mean().item(), 50, 300, 0).low == pytest.approx(wide.low, abs=0.1)
    assert (mean_figure(few[:1], 500, 0).low, figure(1.0, 1, torch.zeros(0)).high) == (None, None)


def test_a_mean_is_drawn_in_parts_as_at_once(monkeypatch):
    values = torch.rand(300, generator=torch.Generator().manual_seed(0))
    whole = mean_figure(values, 200, 0)
    expected = values.double() @ counts(300, 200, 0) / 300
    assert (
        whole == figure(whole.value, 300, expected) or abs(whole.low - figure(whole.value, 300, expected).low) < 1e-12
    )
    monkeypatch.setattr(intervals, "DRAWN_AT_ONCE", 1000)
    parts = mean_figure(values, 200, 0)
    assert (parts.low, parts.high) == pytest.approx((whole.low, whole.high), abs=1e-12)


@pytest.mark.parametrize(("right", "n"), [(6, 6), (0, 6), (84, 100), (1, 1)])
def test_the_interval_of_a_share_is_where_its_score_test_turns(right, n):
    """Wilson's ends p solve |share − p| = z √(p (1 − p) / n)."""
    found = share_figure(torch.arange(n) < right)
    assert (found.value, found.n) == (right / n, n)
    for end in (found.low, found.high):
        inside = 0 < end < 1
        gap = abs(found.value - end) - 1.959964 * (end * (1 - end) / n) ** 0.5
        assert (abs(gap) < 1e-6) if inside else (end == found.value)
    assert found.high - found.low > 0

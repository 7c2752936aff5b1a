"""The sparse solver against the lasso's optimality conditions and against scikit-learn."""

import math
from itertools import pairwise

import pytest
import torch
from sklearn.decomposition import MiniBatchDictionaryLearning, sparse_encode

from sd_atoms.atoms.sparse import sparse_atoms, sparse_coefficients, sparse_objective

SIZES = [1, 6, 9, 18]
L1 = 1e-3


def uniform(n=2000, taps=9, seed=0, dtype=torch.float64):
    """Rows as torch's default convolution weights: 1280 channels."""
    generator = torch.Generator().manual_seed(seed)
    return torch.empty(n, taps, dtype=dtype).uniform_(-0.0093, 0.0093, generator=generator)


def planted(n=2000, taps=9, seed=0):
    """Rows that few of nine overlapping atoms make, and a little noise: correlated, unlike `uniform`."""
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)  # noqa: E731
    atoms = torch.nn.functional.normalize(normal(9, taps) + 1, dim=1)
    used = torch.rand(n, 9, generator=generator) < 0.25
    return (normal(n, 9) * used * 0.02) @ atoms + 1e-4 * normal(n, taps)


def by_sklearn(rows, atoms, l1=L1):
    # scikit-learn's alpha is λ of the same objective, not divided by the number of taps (lasso_cd divides it itself)
    codes = sparse_encode(
        rows.numpy(), atoms.numpy(), algorithm="lasso_cd", alpha=l1, max_iter=5000, check_input=False
    )
    return torch.from_numpy(codes)


@pytest.mark.parametrize("draw", [uniform, planted])
@pytest.mark.parametrize("m", SIZES)
def test_codes_are_as_good_as_scikit_learns(draw, m):
    rows = draw(500)
    atoms = sparse_atoms(rows, m).atoms
    ours = sparse_objective(rows, atoms, sparse_coefficients(rows, atoms), L1)
    theirs = sparse_objective(rows, atoms, by_sklearn(rows, atoms), L1)
    assert ours <= theirs * (1 + (1e-4 if m <= 9 else 1e-3))


@pytest.mark.parametrize("draw", [uniform, planted])
@pytest.mark.parametrize("m", [6, 9, 18])
def test_atoms_are_as_good_as_scikit_learns(draw, m):
    rows = draw(1000)
    # both are encoded by ours, so that atoms alone are compared
    learner = MiniBatchDictionaryLearning(
        m, alpha=L1, max_iter=10, batch_size=256, fit_algorithm="cd", transform_algorithm="lasso_cd", random_state=0
    )
    theirs = torch.from_numpy(learner.fit(rows.numpy()).components_)
    ours = sparse_atoms(rows, m).atoms
    objective = [sparse_objective(rows, atoms, sparse_coefficients(rows, atoms), L1) for atoms in (ours, theirs)]
    assert objective[0] <= objective[1]


@pytest.mark.parametrize("m", SIZES)
def test_codes_meet_the_conditions_of_the_lasso(m):
    rows = uniform()
    atoms = sparse_atoms(rows, m).atoms
    codes = sparse_coefficients(rows, atoms)
    slope = (rows - codes @ atoms) @ atoms.T
    # zero codes: |slope| <= λ; the others: slope = λ·sign. With more atoms than taps the steps end sooner.
    tolerance = L1 * (1e-6 if m <= 9 else 0.05)
    assert (codes == 0).any()
    assert slope.abs().max() <= L1 + tolerance
    used = codes != 0
    torch.testing.assert_close(slope[used], L1 * codes[used].sign(), rtol=0, atol=tolerance)


def test_codes_of_orthonormal_atoms_are_the_shrunk_projections():
    rows, atoms = uniform(), torch.linalg.qr(torch.randn(9, 9, dtype=torch.float64)).Q
    expected = torch.nn.functional.softshrink(rows @ atoms.T, L1)
    torch.testing.assert_close(sparse_coefficients(rows, atoms), expected, rtol=1e-9, atol=1e-12)


def test_codes_scale_with_atoms_of_any_norm():
    rows, atoms = uniform(), torch.linalg.qr(torch.randn(9, 9, dtype=torch.float64)).Q
    # c·(2d) with the penalty 2λ is (2c)·d with λ
    torch.testing.assert_close(2 * sparse_coefficients(rows, 2 * atoms, 2 * L1), sparse_coefficients(rows, atoms))


@pytest.mark.parametrize("m", [6, 18])
def test_codes_of_a_row_do_not_depend_on_the_other_rows(m):
    rows = uniform(16384 + 700)
    atoms = sparse_atoms(rows, m, rounds=5).atoms
    codes = sparse_coefficients(rows, atoms)
    for row in (0, 3, 16383, 16384, len(rows) - 1):
        alone = sparse_coefficients(rows[row : row + 1], atoms)
        torch.testing.assert_close(alone[0], codes[row], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("draw", [uniform, planted])
@pytest.mark.parametrize("m", SIZES)
@pytest.mark.parametrize("l1", [0.0, 1e-4, 1e-3, 5e-3])
def test_atoms_are_unit_signed_and_their_objective_never_rises(draw, m, l1):
    atoms, objective = sparse_atoms(draw(500), m, l1, rounds=30)
    assert atoms.shape == (m, 9)
    torch.testing.assert_close(atoms.norm(dim=1), torch.ones(m, dtype=torch.float64), rtol=1e-12, atol=0)
    assert (atoms.gather(1, atoms.abs().argmax(1, keepdim=True)) > 0).all()
    assert all(math.isfinite(value) for value in objective)
    assert all(later <= earlier * (1 + 1e-12) + 1e-18 for earlier, later in pairwise(objective))


def test_planted_atoms_are_found():
    rows = planted(4000)
    generator = torch.Generator().manual_seed(0)
    true = torch.nn.functional.normalize(torch.randn(9, 9, dtype=torch.float64, generator=generator) + 1, dim=1)
    likeness = (sparse_atoms(rows, 9).atoms @ true.T).abs()
    assert likeness.amax(0).min() > 0.99


def test_equal_seeds_give_equal_atoms_and_others_do_not():
    rows = uniform(3000)
    first, again, other = (sparse_atoms(rows, 12, seed=seed, rounds=5, sample=1000) for seed in (1, 1, 2))
    assert torch.equal(first.atoms, again.atoms)
    assert first.objective == again.objective
    assert not torch.equal(first.atoms, other.atoms)


def test_atoms_come_most_used_first():
    rows = planted()
    atoms = sparse_atoms(rows, 9).atoms
    energy = sparse_coefficients(rows, atoms).square().sum(0)
    assert (energy[1:] <= energy[:-1] * 1.05).all()


def test_the_objective_is_the_mean_over_rows_written_out():
    rows, atoms, codes = uniform(7), torch.randn(4, 9, dtype=torch.float64), torch.randn(7, 4, dtype=torch.float64)
    expected = sum(
        0.5 * sum((f - sum(c * d[t] for c, d in zip(code, atoms, strict=True))) ** 2 for t, f in enumerate(row))
        + L1 * sum(abs(c) for c in code)
        for row, code in zip(rows, codes, strict=True)
    )
    assert sparse_objective(rows, atoms, codes, L1) == pytest.approx(float(expected) / 7, rel=1e-12)


@pytest.mark.parametrize("l1", [0.0, L1])
@pytest.mark.parametrize(
    ("rows", "m"),
    [
        (torch.zeros(50, 9), 4),
        (torch.zeros(50, 9), 12),
        (uniform(3), 6),
        (uniform(3), 18),
        (uniform(1), 2),
        (uniform(50, taps=1), 1),
        (uniform(50, taps=1), 3),
        (uniform(50, taps=2), 5),
        (torch.cat([torch.zeros(40, 9), uniform(2, dtype=torch.float32)]), 15),
        (uniform(50) * 1e-3, 12),  # every row is below the penalty: no code, all atoms unused
    ],
)
def test_degenerate_rows(rows, m, l1):
    atoms, objective = sparse_atoms(rows, m, l1)
    codes = sparse_coefficients(rows, atoms, l1)
    assert codes.shape == (len(rows), m)
    assert codes.isfinite().all()
    torch.testing.assert_close(atoms.norm(dim=1), torch.ones(m, dtype=atoms.dtype))
    assert sparse_objective(rows, atoms, codes, l1) <= rows.square().sum(1).mean().item() / 2 + 1e-15
    assert all(later <= earlier * (1 + 1e-12) + 1e-18 for earlier, later in pairwise(objective))


def test_without_a_penalty_codes_are_those_of_least_squares():
    rows = planted(200)
    atoms = sparse_atoms(rows, 9, 0.0, rounds=3).atoms
    torch.testing.assert_close(sparse_coefficients(rows, atoms, 0.0) @ atoms, rows, rtol=0, atol=1e-12)


def test_an_unused_atom_moves_to_where_the_fit_is_worst():
    # two directions hold everything and svd's third atom starts where no row is
    rows = torch.zeros(300, 4, dtype=torch.float64)
    rows[:100, 0], rows[100:200, 1], rows[200:, :2] = 1.0, 1.0, 0.7
    atoms = sparse_atoms(rows, 3, 0.05).atoms
    codes = sparse_coefficients(rows, atoms, 0.05)
    assert (codes.abs().sum(0) > 0).all()
    # every row then has an atom of its own direction: ½λ² + λ(|f| − λ)
    lengths = rows.norm(dim=1)
    best = (0.05**2 / 2 + 0.05 * (lengths - 0.05)).mean().item()
    assert sparse_objective(rows, atoms, codes, 0.05) == pytest.approx(best, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rows_are_taken_in_float32(dtype):
    rows = uniform(300).to(dtype)
    atoms = sparse_atoms(rows, 6, rounds=5).atoms
    codes = sparse_coefficients(rows, atoms)
    assert atoms.dtype == codes.dtype == torch.float32
    torch.testing.assert_close(atoms, sparse_atoms(rows.float(), 6, rounds=5).atoms)
    torch.testing.assert_close(codes, sparse_coefficients(rows.float(), atoms))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_rows_that_are_not_finite_are_refused_by_number(bad):
    rows = uniform(20)
    rows[7, 2] = bad
    with pytest.raises(ValueError, match="row 7"):
        sparse_atoms(rows, 3)
    with pytest.raises(ValueError, match="row 7"):
        sparse_coefficients(rows, torch.eye(9))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(m=0), "m=0.*1 or more"),
        (dict(l1=-1.0), "l1=-1.0.*0 or more"),
        (dict(l1=math.nan), "l1=nan.*0 or more"),
        (dict(rounds=0), "rounds=0.*1 or more"),
        (dict(sample=0), "sample=0.*1 or more"),
        (dict(rows=torch.zeros(0, 9)), r"\(0, 9\)"),
        (dict(rows=torch.zeros(3, 3, 3)), r"\(3, 3, 3\)"),
    ],
)
def test_arguments_out_of_range_are_refused_in_one_line(change, words):
    with pytest.raises(ValueError, match=words) as caught:
        sparse_atoms(**dict(rows=uniform(5), m=2) | change)
    assert "\n" not in str(caught.value)


def test_atoms_of_another_width_are_refused():
    with pytest.raises(ValueError, match="4 taps cannot encode rows of 9"):
        sparse_coefficients(uniform(5), torch.eye(4))

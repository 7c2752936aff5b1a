"""Sparse atoms: filters as sparse combinations of unit-norm atoms, by dictionary learning (arXiv 2403.00269).

Rows F (N, T) ≈ codes C (N, m) times atoms D (m, T), with |d| = 1 for every atom, and the objective is the mean over
rows of ½·|f − c·D|² + λ·|c|₁. Unlike the svd solver's, m may exceed T.
"""

import math
from typing import NamedTuple

import torch

from sd_atoms.atoms.layout import mixing_dtype

# Rows the atoms are learnt on. There are only m·T numbers to learn: twice as many rows lower the objective over all
# rows of a 1280→1280 3×3 layer by 0.1 % with m = 9.
SAMPLE = 8192
# Rounds of codes, then atoms. The objective creeps (l1 is small against the rows, so codes and atoms hold each other
# in place), which is what the stretch below is for; a run ends early once a round gains less than this share.
ROUNDS = 100
LEAST_GAIN = 1e-6
# Sweeps of coordinate descent a round, from the last round's codes. Unlike FISTA it never raises the objective.
SWEEPS = 3
# The step between two rounds' atoms is stretched by up to LONGEST, more and more while that helps.
STRETCH, LONGEST = 1.3, 50.0

# FISTA steps of the encoding: a fixed number, so that the codes of a row depend on that row and the atoms alone. With
# m <= T the error falls by a factor exp(-1/κ) a step, κ the condition number of the atoms (1 to 2 on random weights),
# so 8 + 8·κ steps do. With κ large or m > T nothing bounds them: 96 end within 2e-6 of the optimum with m = T, κ = 15,
# within 5e-4 with m = 2T and l1 at 6 % of a row's norm, but only within 1e-2 with l1 at 0.6 %.
STEPS_PER_CONDITION, MOST_STEPS = 8, 96
# For the first half of the steps the penalty falls from 30·l1 to l1: far fewer codes have to be driven back to zero.
FIRST_PENALTY = 30.0
# Rows at a time: four buffers (m, rows) stay in the CPU's cache; a card wants few large calls, in bounded memory.
CPU_ROWS, CUDA_ROWS = 2**14, 2**20


class SparseAtoms(NamedTuple):
    """What `sparse_atoms` learns: `atoms` (m, T) of unit norm, and the mean `objective` of every round."""

    atoms: torch.Tensor
    objective: list[float]


@torch.no_grad()
def sparse_atoms(
    rows: torch.Tensor, m: int, l1: float = 1e-3, seed: int = 0, rounds: int = ROUNDS, sample: int = SAMPLE
) -> SparseAtoms:
    """Learns m atoms that encode `rows` sparsely, the most used (in the last round) first.

    Codes (coordinate descent) and atoms (block coordinate descent, Mairal et al. 2009, ICML, algorithm 2) take turns
    on a seeded sample of the rows, starting from the sample's svd atoms and, where m > T, some of its rows. The step
    from atoms to atoms is stretched while the objective falls; a stretch that raises it is taken back. An atom that no
    row uses is moved to where the fit is worst. The sample is learnt on the CPU in float64, so a card's rows give the
    CPU's atoms. The sign of each atom is fixed (its largest entry is positive).

    Args:
        rows: F, (N, T), any float dtype and device.
        m: number of atoms, from 1; it may exceed T, and N.
        l1: λ, at least 0.
        seed: of the sample and of the rows that atoms start from.
        rounds: most rounds.
        sample: most rows learnt on; all are where there are fewer.

    Returns:
        The atoms, (m, T), float32 (float64 for float64 rows), on the rows' device, and the mean objective over the
        sample after each round's codes, which never rises.

    Raises:
        ValueError: m, l1, rounds, sample or the shape of rows is out of range, or rows has a NaN or an infinity.
    """
    _check(rows, l1)
    for name, value in (("m", m), ("rounds", rounds), ("sample", sample)):
        if value < 1:
            raise ValueError(f"{name}={value}: the sparse solver takes 1 or more")
    generator = torch.Generator().manual_seed(seed)
    picked = rows
    if len(rows) > sample:
        picked = rows[torch.randperm(len(rows), generator=generator)[:sample].to(rows.device)]
    x = picked.to("cpu", torch.float64).T.contiguous()  # (T, n)
    # the rows' size is taken out, so that nothing under- or overflows below; l1 is in the same unit
    scale = x.abs().max().item() or 1.0
    x, l1 = x / scale, l1 / scale

    atoms = _first_atoms(x, m, generator)
    codes = x.new_zeros(m, x.shape[1])
    objective, stretch, safe = [], 1.0, atoms
    for _ in range(rounds):
        tried = _sweep(codes.clone(), x, atoms, l1)
        value = _mean_objective(x, atoms, tried, l1)
        if objective and value > objective[-1] and stretch > 1:
            atoms, stretch = safe, 1.0
            tried = _sweep(codes, x, atoms, l1)
            value = _mean_objective(x, atoms, tried, l1)
        else:
            stretch = min(stretch * STRETCH, LONGEST)
        codes = tried
        objective.append(value)
        safe, unused = _updated_atoms(x, atoms, codes)
        if len(objective) > 1 and objective[-2] - value <= LEAST_GAIN * objective[-2] and stretch > STRETCH:
            break
        atoms = _unit(atoms + stretch * (safe - atoms), safe)
        atoms[unused] = safe[unused]

    order = codes.square().sum(1).argsort(descending=True, stable=True)
    atoms = safe[order]
    peak = atoms.gather(1, atoms.abs().argmax(1, keepdim=True))
    atoms = (atoms * peak.sign()).to(rows.device, mixing_dtype(rows.dtype))
    return SparseAtoms(atoms, [value * scale**2 for value in objective])


@torch.no_grad()
def sparse_coefficients(rows: torch.Tensor, atoms: torch.Tensor, l1: float = 1e-3) -> torch.Tensor:
    """The codes of every row: argmin over c of ½·|f − c·D|² + λ·|c|₁, by FISTA (Beck & Teboulle 2009).

    The number of steps, the penalties and the momenta depend on the atoms alone, so a row gets the same codes whatever
    the other rows are, up to rounding. Momentum stops growing at the best constant for the atoms' condition number.

    Args:
        rows: F, (N, T), any float dtype.
        atoms: D, (m, T), of any norm.
        l1: λ, at least 0; at 0 the codes are those of least squares, of least norm where m > T.

    Returns:
        C, (N, m), float32 (float64 if rows or atoms are), on the rows' device.

    Raises:
        ValueError: l1 or a shape is out of range, or rows or atoms have a NaN or an infinity.
    """
    _check(rows, l1)
    _check(atoms, l1, "atoms")
    if atoms.shape[1] != rows.shape[1]:
        raise ValueError(f"atoms of {atoms.shape[1]} taps cannot encode rows of {rows.shape[1]}")
    dtype = mixing_dtype(torch.promote_types(rows.dtype, atoms.dtype))
    exact = atoms.to("cpu", torch.float64)
    n, (m, taps) = len(rows), atoms.shape
    if l1 == 0:
        return rows.to(dtype) @ torch.linalg.pinv(exact).to(rows.device, dtype)
    values = torch.linalg.eigvalsh(exact @ exact.T).clamp_(min=0)
    largest, smallest = values[-1].item(), values[0].item() if m <= taps else 0.0
    if largest == 0:
        return rows.new_zeros(n, m, dtype=dtype)
    # one step: softshrink(analysis·x + keep·y, λ/largest)
    analysis = (exact / largest).to(rows.device, dtype)
    keep = (torch.eye(m, dtype=torch.float64) - exact @ exact.T / largest).to(rows.device, dtype)
    schedule = _schedule(math.sqrt(smallest / largest), l1 / largest)

    codes = torch.empty(n, m, dtype=dtype, device=rows.device)
    chunk = min(n, CPU_ROWS if rows.device.type == "cpu" else CUDA_ROWS)
    # (m, rows) rather than (rows, m): rows is the long axis that matrix products and vector units want
    flat_x = codes.new_empty(taps * chunk)
    flat = codes.new_empty(4, m * chunk)
    for start in range(0, n, chunk):
        count = min(chunk, n - start)
        x = flat_x[: taps * count].view(taps, count)
        bias, y, previous, current = (buffer[: m * count].view(m, count) for buffer in flat)
        x.copy_(rows[start : start + count].T)
        torch.mm(analysis, x, out=bias)
        y.zero_()
        previous.zero_()
        for penalty, momentum in schedule:
            torch.addmm(bias, keep, y, out=current)
            torch.ops.aten.softshrink.out(current, penalty, out=current)
            # y = current + momentum·(current − previous), in one pass
            torch.lerp(previous, current, 1 + momentum, out=y)
            previous, current = current, previous
        codes[start : start + count] = previous.T
    return codes


@torch.no_grad()
def sparse_objective(rows: torch.Tensor, atoms: torch.Tensor, codes: torch.Tensor, l1: float) -> float:
    """The mean over rows of ½·|f − c·D|² + λ·|c|₁; rows (N, T), atoms (m, T), codes (N, m)."""
    residual = rows.to(codes.dtype) - codes @ atoms.to(codes.dtype)
    squares = residual.square().sum(dtype=torch.float64)
    return (squares / 2 + l1 * codes.abs().sum(dtype=torch.float64)).item() / len(rows)


def _check(matrix: torch.Tensor, l1: float, name: str = "rows") -> None:
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise ValueError(f"{name} of shape {tuple(matrix.shape)}: the sparse solver takes a matrix with entries")
    if not 0 <= l1 < math.inf:
        raise ValueError(f"l1={l1}: the sparse solver takes 0 or more")
    if not matrix.isfinite().all():
        bad = int((~matrix.isfinite()).any(1).nonzero()[0])
        raise ValueError(f"{name} has a NaN or an infinity, first in row {bad}; only finite numbers are allowed")


def _schedule(conditioning: float, penalty: float) -> list[tuple[float, float]]:
    """(penalty, momentum) of every FISTA step; `conditioning` is 1/κ of the atoms, 0 where m > T."""
    wanted = STEPS_PER_CONDITION * (1 + 1 / conditioning) if conditioning else math.inf
    steps = math.ceil(min(wanted, MOST_STEPS))
    falling = steps // 2
    schedule, t = [], 1.0
    for step in range(steps):
        t_next = (1 + math.sqrt(1 + 4 * t * t)) / 2
        momentum = min((t - 1) / t_next, (1 - conditioning) / (1 + conditioning))
        schedule.append((penalty * FIRST_PENALTY ** max(0.0, 1 - step / falling), momentum))
        t = t_next
    return schedule


def _first_atoms(x: torch.Tensor, m: int, generator: torch.Generator) -> torch.Tensor:
    """The svd atoms of x (T, n), then seeded rows, then (there are too few) seeded directions: (m, T), unit norm."""
    taps = len(x)
    _, vectors = torch.linalg.eigh(x @ x.T)
    svd = vectors.flip(1).T[:m]
    kept = x[:, (x != 0).any(0)]
    chosen = torch.randperm(kept.shape[1], generator=generator)[: max(0, m - taps)]
    missing = m - len(svd) - len(chosen)
    directions = torch.randn(missing, taps, generator=generator, dtype=x.dtype)
    return _unit(torch.cat([svd, kept[:, chosen].T, directions]))


def _sweep(codes: torch.Tensor, x: torch.Tensor, atoms: torch.Tensor, l1: float) -> torch.Tensor:
    """Coordinate descent over codes (m, n), in place, for atoms of unit norm."""
    bias, others = atoms @ x, -(atoms @ atoms.T)
    others.fill_diagonal_(0)
    best = torch.empty_like(bias[0])
    for _ in range(SWEEPS):
        for j in range(len(atoms)):
            torch.addmv(bias[j], codes.T, others[j], out=best)
            torch.ops.aten.softshrink.out(best, l1, out=codes[j])
    return codes


def _mean_objective(x: torch.Tensor, atoms: torch.Tensor, codes: torch.Tensor, l1: float) -> float:
    residual = torch.addmm(x, atoms.T, codes, alpha=-1)
    return (residual.square().sum() / 2 + l1 * codes.abs().sum()).item() / x.shape[1]


def _updated_atoms(x: torch.Tensor, atoms: torch.Tensor, codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Every atom in turn at its best for x (T, n) and codes (m, n), and which atoms no code uses, (m,) bool."""
    gram, cross = codes @ codes.T, codes @ x.T  # (m, m), (m, T)
    unused = gram.diagonal() == 0
    atoms = atoms.clone()
    for j in (~unused).nonzero().flatten().tolist():
        # what is left of the rows without atom j, weighted by its codes; its direction is the best unit atom
        left = cross[j] - gram[j] @ atoms + gram[j, j] * atoms[j]
        atoms[j] = _unit(left[None], atoms[j][None])[0]
    dead = unused.nonzero().flatten()
    if len(dead):
        residual = torch.addmm(x, atoms.T, codes, alpha=-1).T  # (n, T)
        worst = residual.square().sum(1).topk(min(len(dead), len(residual))).indices
        dead = dead[: len(worst)]
        atoms[dead] = _unit(residual[worst], atoms[dead])
    return atoms, unused


def _unit(vectors: torch.Tensor, otherwise: torch.Tensor | None = None) -> torch.Tensor:
    """Rows of unit norm; a row too short to have a direction is replaced by that of `otherwise`."""
    norm = vectors.norm(dim=1, keepdim=True)
    unit = vectors / norm
    return unit if otherwise is None else torch.where(norm > 1e-12, unit, otherwise)

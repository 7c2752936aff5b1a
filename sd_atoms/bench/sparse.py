"""`bench sparse`: the sparse solver against dictionary learning by coordinate descent, on one convolution."""

import math
import time

import torch
import torch.nn.functional as F
from tqdm import tqdm

from sd_atoms.atoms.sparse import sparse_atoms, sparse_coefficients, sparse_objective
from sd_atoms.bench.measuring import describe, machine_info, spread

KERNEL = 3
# What arXiv 2403.00269's public code asks of its solver: rounds of codes and atoms, and FISTA steps of the encoding
PUBLIC_ROUNDS, PUBLIC_STEPS = 10, 20
# and where its solvers stop: changes of one row's code in coordinate descent, and the mean change of a code in FISTA
MOST_CHANGES, LEAST_CHANGE, LEAST_MEAN_CHANGE = 1000, 1e-6, 1e-5


def bench_sparse(channels: int, m: int, l1: float, rounds: int, threads: int) -> dict:
    """Both solvers in turn on the same rows, round after round, on the CPU, dictionary and all codes each.

    The rows are those of a `channels`→`channels` 3×3 convolution with weights as torch draws them (seeded).
    """
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    bound = 1 / math.sqrt(channels * KERNEL**2)
    rows = torch.empty(channels**2, KERNEL**2).uniform_(-bound, bound, generator=generator)
    solvers = {"ours": _ours, "coordinate descent": by_coordinate_descent}
    seconds = {name: [] for name in solvers}
    results = {}
    with tqdm(total=rounds * len(solvers), unit="run", disable=None) as progress:
        for _ in range(rounds):
            for name, solver in solvers.items():
                torch.manual_seed(0)  # equal first atoms round after round
                start = time.perf_counter()
                atoms, codes = solver(rows, m, l1)
                seconds[name].append(time.perf_counter() - start)
                if name not in results:
                    # codes apart from atoms: what the same atoms reach with codes at their optimum
                    results[name] = {
                        "objective": sparse_objective(rows, atoms, codes, l1),
                        "objective_encoded_by_ours": sparse_objective(
                            rows, atoms, sparse_coefficients(rows, atoms, l1), l1
                        ),
                        "zero_share": (codes == 0).float().mean().item(),
                    }
                progress.update()
    for name, values in seconds.items():
        results[name] |= spread(values)
    ours, theirs = results["ours"], results["coordinate descent"]
    return {
        "benchmark": "sparse",
        "settings": {"channels": channels, "m": m, "l1": l1, "rounds": rounds, "threads": threads},
        "machine": machine_info("cpu", threads),
        "rows": len(rows),
        "solvers": results,
        "ratio": theirs["seconds_median"] / ours["seconds_median"],
    }


def by_coordinate_descent(rows: torch.Tensor, m: int, l1: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Atoms (m, T) and codes (N, m) by the algorithm of arXiv 2403.00269's public code, on all rows.

    Every round codes all rows from zero by greedy coordinate descent (Li & Osher 2009: a row's largest change at a
    time) and then refits the atoms one by one to the residual; at the end FISTA encodes all rows.
    """
    taps = rows.shape[1]
    atoms = F.normalize(torch.nn.init.orthogonal_(torch.empty(taps, m)), dim=0).T.contiguous()
    for _ in range(PUBLIC_ROUNDS):
        codes = _greedy_codes(rows, atoms, l1)
        residual = rows - codes @ atoms
        for j in range(m):
            residual.addr_(codes[:, j], atoms[j])
            direction = codes[:, j] @ residual
            if direction.norm() < 1e-10:
                atoms[j] = F.normalize(torch.randn(taps), dim=0)
                codes[:, j] = 0
            else:
                atoms[j] = F.normalize(direction, dim=0)
                residual.addr_(codes[:, j], atoms[j], alpha=-1)
    return atoms, _fista_codes(rows, atoms, l1)


def sparse_text(result: dict) -> str:
    """The result of `bench_sparse` in a few lines."""
    settings, solvers = result["settings"], result["solvers"]
    channels = settings["channels"]
    lines = [
        f"{channels}→{channels} {KERNEL}×{KERNEL} convolution, {result['rows']:,} rows, m={settings['m']}, "
        f"l1={settings['l1']:g}; {describe(result['machine'])}"
    ]
    for name, values in solvers.items():
        lines.append(
            f"{name}: {values['seconds_median']:.2f} s ({values['seconds_min']:.2f} – {values['seconds_max']:.2f}), "
            f"objective {values['objective']:.4e}, {values['zero_share']:.1%} of the codes are zero"
        )
    return "\n".join([*lines, f"coordinate descent takes {result['ratio']:.1f} times as long"])


def _ours(rows: torch.Tensor, m: int, l1: float) -> tuple[torch.Tensor, torch.Tensor]:
    atoms = sparse_atoms(rows, m, l1).atoms
    return atoms, sparse_coefficients(rows, atoms, l1)


def _greedy_codes(rows: torch.Tensor, atoms: torch.Tensor, l1: float) -> torch.Tensor:
    unlike = torch.eye(len(atoms)) - atoms @ atoms.T
    pull = rows @ atoms.T
    codes = torch.zeros_like(pull)
    running = torch.arange(len(rows))
    for _ in range(MOST_CHANGES):
        if not len(running):
            break
        old, force = codes[running], pull[running]
        wanted = F.softshrink(force, l1)
        change = wanted - old
        largest = change.abs().argmax(1, keepdim=True)
        step = change.gather(1, largest)
        pull[running] = force + unlike[largest[:, 0]] * step
        codes[running] = old.scatter(1, largest, wanted.gather(1, largest))
        running = running[step[:, 0].abs() > LEAST_CHANGE * len(atoms)]
    return F.softshrink(pull, l1)


def _fista_codes(rows: torch.Tensor, atoms: torch.Tensor, l1: float) -> torch.Tensor:
    largest = torch.linalg.eigvalsh(atoms @ atoms.T)[-1].item()
    codes = rows.new_zeros(len(rows), len(atoms))
    ahead, t = codes, 1.0
    for _ in range(PUBLIC_STEPS):
        gradient = (ahead @ atoms - rows) @ atoms.T
        new = F.softshrink(ahead - gradient / largest, l1 / largest)
        change = (new - codes).abs().mean()
        t_next = (1 + math.sqrt(1 + 4 * t * t)) / 2
        ahead = new + (t - 1) / t_next * (new - codes)
        codes, t = new, t_next
        if change <= LEAST_MEAN_CHANGE:
            break
    return codes

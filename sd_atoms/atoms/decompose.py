"""Orthonormal atoms of a layer's filters."""

import torch

from sd_atoms.atoms.layout import mixing_dtype

BLOCK_ROWS = 4096
BLOCKS = 64  # in float64 at once: 19 MB of 3×3 filters


@torch.no_grad()
def svd_atoms(rows: torch.Tensor, m: int) -> torch.Tensor:
    """The m orthonormal atoms that rebuild the filters best (Eckart-Young), strongest first.

    They are eigenvectors of the T×T Gram matrix of the filters, so the cost is one pass over them. The sign of each
    atom is fixed (its largest entry is positive), so equal filters give equal atoms. Exact when m = T.

    Args:
        rows: filters (N, T), any float dtype; the Gram matrix is taken and diagonalised in float64.
        m: number of atoms, 1 to T.

    Returns:
        D, (m, T), float32 (float64 for float64 filters), on their device.

    Raises:
        ValueError: m is out of range.
    """
    t = rows.shape[1]
    if not 1 <= m <= t:
        raise ValueError(f"m={m}: the svd solver takes 1 to {t} atoms for filters of {t} taps")
    dtype = mixing_dtype(rows.dtype)
    # T is 9 or so: the CPU's float64 solver is as quick as any, and the same on every machine
    _, vectors = torch.linalg.eigh(_gram(rows))
    atoms = vectors.flip(1).T[:m]
    # of entries that are largest but for rounding, as in filters that are odd, always the first
    largest = atoms.abs() >= 0.9999 * atoms.abs().amax(1, keepdim=True)
    peak = atoms.gather(1, largest.int().argmax(1, keepdim=True))
    return (atoms * peak.sign()).to(rows.device, dtype).contiguous()


def _gram(rows: torch.Tensor) -> torch.Tensor:
    """Σ row·rowᵀ of rows (N, T), (T, T) float64 on the CPU: the same bits on any number of threads.

    The threads of a matrix product share out its sum, and a sum in another order is another one; so blocks are summed
    by themselves, too small to be shared out, and added in their order.
    """
    t = rows.shape[1]
    gram = torch.zeros(t, t, dtype=torch.float64)
    for part in rows.split(BLOCKS * BLOCK_ROWS):
        part = part.to(torch.float64)
        whole = len(part) // BLOCK_ROWS * BLOCK_ROWS
        blocks = part[:whole].view(-1, BLOCK_ROWS, t)
        sums = torch.bmm(blocks.mT, blocks)  # (B, T, rows) @ (B, rows, T) -> (B, T, T)
        rest = part[whole:]
        for block in [*sums.cpu(), (rest.T @ rest).cpu()]:
            gram += block
    return gram


@torch.no_grad()
def relative_error(rows: torch.Tensor, atoms: torch.Tensor) -> float:
    """|F − F·Dᵀ·D| / |F| for filters (N, T) and orthonormal atoms D (m, T): 0 when m = T, up to rounding."""
    rows = rows.to(atoms.dtype)
    norm = rows.norm()
    return ((rows - (rows @ atoms.T) @ atoms).norm() / norm).item() if norm else 0.0

"""Orthonormal atoms of a layer's filters."""

import torch

from sd_atoms.atoms.layout import mixing_dtype


@torch.no_grad()
def svd_atoms(rows: torch.Tensor, m: int) -> torch.Tensor:
    """The m orthonormal atoms that rebuild the filters best (Eckart-Young), strongest first.

    They are eigenvectors of the T×T Gram matrix of the filters, so the cost is one pass over them. The sign of each
    atom is fixed (its largest entry is positive), so equal filters give equal atoms. Exact when m = T.

    Args:
        rows: filters (N, T), any float dtype; the Gram matrix is taken in float32 at least and diagonalised in
            float64.
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
    rows = rows.to(dtype)
    gram = rows.T @ rows  # (T, N) @ (N, T) -> (T, T)
    # T is 9 or so: the CPU's float64 solver is as quick as any, and the same on every machine
    _, vectors = torch.linalg.eigh(gram.to("cpu", torch.float64))
    atoms = vectors.flip(1).T[:m]
    peak = atoms.gather(1, atoms.abs().argmax(1, keepdim=True))
    return (atoms * peak.sign()).to(rows.device, dtype).contiguous()


@torch.no_grad()
def relative_error(rows: torch.Tensor, atoms: torch.Tensor) -> float:
    """|F − F·Dᵀ·D| / |F| for filters (N, T) and orthonormal atoms D (m, T): 0 when m = T, up to rounding."""
    rows = rows.to(atoms.dtype)
    norm = rows.norm()
    return ((rows - (rows @ atoms.T) @ atoms).norm() / norm).item() if norm else 0.0

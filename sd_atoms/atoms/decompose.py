"""Atoms of a convolution's filters."""

import torch

from sd_atoms.atoms.layout import filter_rows, mixing_dtype, taps


@torch.no_grad()
def svd_atoms(weight: torch.Tensor, m: int) -> torch.Tensor:
    """The m orthonormal atoms that rebuild the filters of `weight` best (Eckart-Young), strongest first.

    They are eigenvectors of the K×K Gram matrix of the filters, so the cost is one pass over the weight. The sign of
    each atom is fixed (its largest entry is positive), so equal weights give equal atoms. Exact when m = K.

    Args:
        weight: (o, i/groups, *k), any float dtype; the Gram matrix is taken in float32 at least and diagonalised in
            float64.
        m: number of atoms, 1 to K.

    Returns:
        D, (m, K), float32 (float64 for a float64 weight), on the weight's device.

    Raises:
        ValueError: m is out of range.
    """
    k = taps(weight)
    if not 1 <= m <= k:
        raise ValueError(f"m={m}: the svd solver takes 1 to {k} atoms for filters of {k} taps")
    dtype = mixing_dtype(weight.dtype)
    rows = filter_rows(weight).to(dtype)
    gram = rows.T @ rows  # (K, o*i) @ (o*i, K) -> (K, K)
    # K is 9 or so: the CPU's float64 solver is as quick as any, and the same on every machine
    _, vectors = torch.linalg.eigh(gram.to("cpu", torch.float64))
    atoms = vectors.flip(1).T[:m]
    peak = atoms.gather(1, atoms.abs().argmax(1, keepdim=True))
    return (atoms * peak.sign()).to(weight.device, dtype).contiguous()


@torch.no_grad()
def relative_error(weight: torch.Tensor, atoms: torch.Tensor) -> float:
    """|F − F·Dᵀ·D| / |F| for orthonormal atoms D (m, K): 0 when m = K, up to rounding."""
    rows = filter_rows(weight).to(atoms.dtype)
    norm = rows.norm()
    return ((rows - (rows @ atoms.T) @ atoms).norm() / norm).item() if norm else 0.0

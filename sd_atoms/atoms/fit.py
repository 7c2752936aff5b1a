"""The nearest atoms of a given change of filters, in the least-squares sense."""

import torch

SWEEPS, STILL = 100, 1e-6


@torch.no_grad()
def fit_atoms(rows: torch.Tensor, change: torch.Tensor, atoms: torch.Tensor) -> torch.Tensor:
    """ΔD (m, T) with the least ‖C·ΔD − ΔF‖, C = F·Dᵀ; where filters leave it open, the shortest.

    With as many orthonormal atoms as taps, Dᵀ·ΔD is any matrix, so this is the best F·B there is.

    Args:
        rows: filters F (N, T).
        change: ΔF (N, T).
        atoms: orthonormal D (m, T).
    """
    codes = rows.double() @ atoms.double().T  # (N, m)
    # (m, m) \ (m, T): the sums over N are taken once, and are small
    return (_inverse(codes.T @ codes) @ (codes.T @ change.double())).to(atoms.dtype)


@torch.no_grad()
def fit_overcomplete(
    filters: torch.Tensor, change: torch.Tensor, atoms: torch.Tensor, m1: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """β (i, m, m1) and ΔD1 (m, m1, K), whose Σ_j β[c, m, j]·ΔD1[m, j] change the atoms of input channel c.

    It starts from the best change of each channel's atoms by itself, of which it takes, atom by atom, the best m1 over
    all channels (Eckart and Young); then β and ΔD1 are each set to their optimum under the other in turn. A change
    that such atoms made is found at once where a layer has as many outputs as atoms. With fewer, as in conv_out, the
    channels leave their atoms open, and after a hundred turns up to a percent of it may be left.

    Args:
        filters: F (o, i, K) of a convolution without groups.
        change: ΔF (o, i, K).
        atoms: orthonormal D (m, K).
        m1: mixed atoms.
    """
    m, channels = len(atoms), filters.shape[1]
    codes = filters.double().transpose(0, 1) @ atoms.double().T  # (i, o, m)
    gram = codes.mT @ codes  # (i, m, m)
    wanted = codes.mT @ change.double().transpose(0, 1)  # (i, m, K)
    own = _inverse(gram) @ wanted  # (i, m, K)
    _, s, v = torch.linalg.svd(own.transpose(0, 1), full_matrices=False)  # (m, r), (m, r, K)
    delta = torch.zeros(m, m1, own.shape[2], dtype=torch.float64)
    kept = min(m1, s.shape[1])
    delta[:, :kept] = s[:, :kept, None] * v[:, :kept]
    fitted = torch.zeros_like(own)
    for _ in range(SWEEPS):
        # β of each channel: (i, m*m1, m*m1) \ (i, m*m1)
        inner = torch.einsum("mjk,nlk->mjnl", delta, delta)
        square = torch.einsum("imn,mjnl->imjnl", gram, inner).flatten(3).flatten(1, 2)
        right = torch.einsum("mjk,imk->imj", delta, wanted).flatten(1)
        beta = (_inverse(square) @ right[..., None]).view(channels, m, m1)
        # ΔD1 of all of them: (m*m1, m*m1) \ (m*m1, K)
        square = torch.einsum("imj,imn,inl->mjnl", beta, gram, beta).flatten(2).flatten(0, 1)
        right = torch.einsum("imj,imk->mjk", beta, wanted).flatten(0, 1)
        delta = (_inverse(square) @ right).view(m, m1, -1)
        before, fitted = fitted, torch.einsum("imj,mjk->imk", beta, delta)
        if (fitted - before).norm() <= STILL * fitted.norm():
            break
    # a β as large as at the start of a training, where its entries have a variance of 1/m1
    size = beta.square().mean().sqrt() * m1**0.5
    size = size if size > 0 else 1.0
    return (beta / size).to(atoms.dtype), (delta * size).to(atoms.dtype)


def _inverse(gram: torch.Tensor) -> torch.Tensor:
    return torch.linalg.pinv(gram, hermitian=True, rtol=1e-12)

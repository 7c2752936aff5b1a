"""Filter atoms as plain tensor maths: decomposition, the K×K mixing, and convolutions that apply it.

Words and symbols follow arXiv 2403.00269. A convolution's weight (o, i/groups, k, k) is read as rows (o·i/groups, K)
with K = k². Rows ≈ coefficients C (o·i, m) times atoms D (m, K); only the atoms move, ΔF = C·ΔD. With orthonormal
atoms C = F·Dᵀ, so F + ΔF = F·(I + Dᵀ·ΔD) = F·A: the whole adapter of a layer is one K×K mixing matrix A.
"""

from sd_atoms.atoms.counts import atom_count
from sd_atoms.atoms.decompose import relative_error, svd_atoms
from sd_atoms.atoms.forms import FORMS, ConvGeometry, atoms_conv2d, pick_form
from sd_atoms.atoms.layout import filter_rows, mix_filters, taps

__all__ = [
    "FORMS",
    "ConvGeometry",
    "atom_count",
    "atoms_conv2d",
    "filter_rows",
    "mix_filters",
    "pick_form",
    "relative_error",
    "svd_atoms",
    "taps",
]

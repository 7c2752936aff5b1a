"""Filter atoms as plain tensor maths: decomposition, mixing, and layers that apply it.

Words and symbols follow arXiv 2403.00269. A convolution's weight (o, i/groups, k, k) is read as rows (o·i/groups, K)
with K = k². Rows ≈ coefficients C (o·i, m) times atoms D (m, K); only the atoms move, ΔF = C·ΔD. With orthonormal
atoms C = F·Dᵀ, so F + ΔF = F·(I + Dᵀ·ΔD) = F·A: the whole adapter of a layer is one K×K mixing matrix A.
"""

from sd_atoms.atoms.decompose import relative_error, svd_atoms
from sd_atoms.atoms.forms import FORMS, atoms_layer, pick_form
from sd_atoms.atoms.layout import block_of, block_rows, filter_rows, filters_of, mixing_dtype, taps, unblock_rows
from sd_atoms.atoms.overcomplete import channel_change, initial_beta
from sd_atoms.atoms.patches import ConvGeometry
from sd_atoms.atoms.sparse import SparseAtoms, sparse_atoms, sparse_coefficients, sparse_objective
from sd_atoms.atoms.terms import PLAIN, Term, mixed_weight

__all__ = [
    "FORMS",
    "PLAIN",
    "ConvGeometry",
    "SparseAtoms",
    "Term",
    "atoms_layer",
    "block_of",
    "block_rows",
    "channel_change",
    "filter_rows",
    "filters_of",
    "initial_beta",
    "mixed_weight",
    "mixing_dtype",
    "pick_form",
    "relative_error",
    "sparse_atoms",
    "sparse_coefficients",
    "sparse_objective",
    "svd_atoms",
    "taps",
    "unblock_rows",
]

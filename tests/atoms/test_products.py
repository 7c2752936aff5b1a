import pytest
import torch

from sd_atoms.atoms import products
from sd_atoms.atoms.products import product, transposed_product

onednn = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
WITH_AND_WITHOUT = [None, pytest.param(onednn, marks=pytest.mark.skipif(onednn is None, reason="not built in"))]


def with_gaps(*shape):
    """Normal float32 numbers, rows that do not follow each other."""
    generator = torch.Generator().manual_seed(shape[0])
    return torch.randn(shape[0], shape[1] + 3, generator=generator)[:, 1:-2]


@pytest.mark.parametrize("library", WITH_AND_WITHOUT)
@pytest.mark.parametrize(("rows", "inner", "columns"), [(5, 70, 40), (40, 70, 5), (1, 9, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_products_are_those_of_float64(library, rows, inner, columns, dtype, monkeypatch):
    monkeypatch.setattr(products, "_by_onednn", library)
    monkeypatch.setattr(products, "LARGE", 1)
    left, right = with_gaps(rows, inner).to(dtype), with_gaps(inner, columns).to(dtype)
    exact = left.double() @ right.double()
    for got in (product(left, right), transposed_product(left.T.contiguous(), right)):
        assert got.dtype == dtype
        assert (got.double() - exact).norm() <= 2 * torch.finfo(dtype).eps * exact.norm()
    gapped = with_gaps(inner, rows).to(dtype)
    exact = gapped.double().T @ right.double()
    assert (transposed_product(gapped, right).double() - exact).norm() <= 2 * torch.finfo(dtype).eps * exact.norm()


def test_onednn_is_given_large_products_of_dense_numbers_alone(monkeypatch):
    seen = []

    def library(left, right, *options):
        seen.append(right.T.is_contiguous())
        return left @ right.T

    monkeypatch.setattr(products, "_by_onednn", library)
    monkeypatch.setattr(products, "LARGE", 1000)
    product(with_gaps(9, 10), with_gaps(10, 11))
    product(with_gaps(10, 10).double(), with_gaps(10, 11).double())
    assert seen == []
    product(with_gaps(10, 10), with_gaps(10, 11))
    transposed_product(with_gaps(10, 20), with_gaps(10, 5))
    transposed_product(with_gaps(10, 5), with_gaps(10, 20))
    assert seen == [True, True, True]

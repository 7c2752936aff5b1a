"""The maths of filter atoms, in float64 against formulas that share no code with it."""

import pytest
import torch
import torch.nn.functional as F

from sd_atoms.atoms import (
    FORMS,
    ConvGeometry,
    atom_count,
    atoms_conv2d,
    mix_filters,
    pick_form,
    relative_error,
    svd_atoms,
)

GEOMETRIES = {
    "plain": dict(),
    "padded": dict(padding=(1, 1)),
    "strided": dict(stride=(2, 2), padding=(1, 1)),
    "uneven stride and padding": dict(stride=(2, 1), padding=(0, 2)),
    "dilated": dict(dilation=(2, 2), padding=(2, 2)),
    "uneven dilation": dict(dilation=(1, 2), padding=(1, 2)),
    "grouped": dict(groups=2, padding=(1, 1)),
    "grouped, strided, dilated": dict(groups=2, stride=(2, 2), dilation=(2, 1), padding=(1, 1)),
}
KERNELS = [(3, 3), (1, 1), (2, 3), (5, 1), (4, 4)]


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def layer(kernel=(3, 3), groups=1, out_channels=6, in_channels=4):
    weight = random(out_channels, in_channels // groups, *kernel)
    k = kernel[0] * kernel[1]
    return weight, torch.eye(k, dtype=torch.float64) + 0.3 * random(k, k, seed=1), random(out_channels, seed=2)


def by_definition(x, weight, mixing, bias, geometry):
    """Every filter is the sum over its taps of what the mixing makes of them, written out."""
    effective = torch.einsum("oip,pq->oiq", weight.flatten(2), mixing).view_as(weight)
    return F.conv2d(x, effective, bias, *geometry)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("case", GEOMETRIES)
@pytest.mark.parametrize("batch", [1, 3])
def test_every_form_equals_the_definition_in_value_and_gradients(form, kernel, case, batch):
    geometry = ConvGeometry(**GEOMETRIES[case])
    weight, mixing, bias = layer(kernel, geometry.groups)
    x = random(batch, 4, 9, 10, seed=3)
    outcomes = []
    for function in (by_definition, lambda *a: atoms_conv2d(*a, form=form)):
        inputs = [x.clone().requires_grad_(), mixing.clone().requires_grad_()]
        y = function(inputs[0], weight, inputs[1], bias, geometry)
        y.backward(random(*y.shape, seed=4))
        outcomes.append((y.detach(), inputs[0].grad, inputs[1].grad))
    for expected, got in zip(*outcomes, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("form", FORMS[1:])
@pytest.mark.parametrize("case", GEOMETRIES)
def test_gradcheck(form, case):
    geometry = ConvGeometry(**GEOMETRIES[case])
    weight, mixing, bias = layer(groups=geometry.groups)
    x = random(2, 4, 5, 6, seed=3).requires_grad_()
    mixing.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, a: atoms_conv2d(x, weight, a, bias, geometry, form), (x, mixing))


@pytest.mark.parametrize("form", FORMS[1:])
def test_depthwise_and_no_bias(form):
    geometry = ConvGeometry(padding=(1, 1), groups=6)
    weight, mixing, _ = layer(groups=6, in_channels=6)
    x = random(2, 6, 7, 7, seed=3)
    got = atoms_conv2d(x, weight, mixing, None, geometry, form)
    torch.testing.assert_close(got, by_definition(x, weight, mixing, None, geometry), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", FORMS[1:])
def test_identity_mixing_gives_the_plain_convolution_bit_for_bit_and_still_a_gradient(form):
    weight, _, bias = (t.float() for t in layer())
    x = random(1, 4, 8, 8).float()
    mixing = torch.eye(9, requires_grad=True)
    geometry = ConvGeometry(padding=(1, 1))
    y = atoms_conv2d(x, weight, mixing, bias, geometry, form, mixing_is_identity=True)
    assert torch.equal(y, F.conv2d(x, weight, bias, padding=1))
    y.square().sum().backward()
    assert mixing.grad.abs().min() > 0


@pytest.mark.parametrize("form", FORMS[1:])
def test_only_the_input_the_weight_and_the_mixing_are_kept_for_backward(form):
    weight, mixing, bias = layer()
    x = random(1, 4, 8, 8).requires_grad_()
    mixing.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        atoms_conv2d(x, weight, mixing, bias, ConvGeometry(padding=(1, 1)), form)
    assert {t.data_ptr() for t in kept} == {x.data_ptr(), weight.data_ptr(), mixing.data_ptr()}


@pytest.mark.parametrize("form", FORMS[1:])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_within_its_rounding(form, dtype):
    weight, mixing, bias = layer(out_channels=32, in_channels=16)
    x = random(1, 16, 8, 8)
    exact = by_definition(x, weight, mixing, bias, ConvGeometry(padding=(1, 1)))
    low = [t.to(dtype) for t in (x, weight)]
    got = atoms_conv2d(*low, mixing.float(), bias.to(dtype), ConvGeometry(padding=(1, 1)), form)
    assert got.dtype == dtype
    # each of the 144 products of a sum is rounded a few times; the errors add up like a random walk
    assert (got.double() - exact).norm() / exact.norm() < 2 * torch.finfo(dtype).eps


def test_auto_prefers_activations_where_channels_outnumber_positions():
    assert pick_form(64, 1280, 1) == "activation"  # the bottom of SD's UNet at 512 px
    assert pick_form(4096, 320, 1) == "weight"  # its top
    assert pick_form(64, 1280, 1280) == "weight"  # depthwise: nothing to save


@pytest.mark.parametrize("m", [1, 4, 9])
def test_svd_atoms_are_orthonormal_and_optimal(m):
    weight = random(16, 8, 3, 3)
    atoms = svd_atoms(weight, m)
    torch.testing.assert_close(atoms @ atoms.T, torch.eye(m, dtype=torch.float64), atol=1e-12, rtol=0)
    singular = torch.linalg.svdvals(weight.reshape(-1, 9))
    best = (singular[m:].square().sum() / singular.square().sum()).sqrt().item()
    assert relative_error(weight, atoms) == pytest.approx(best, abs=1e-9)


def test_svd_atoms_are_exact_at_full_m_and_repeatable():
    weight = random(16, 8, 3, 3).float()
    assert relative_error(weight, svd_atoms(weight, 9)) < 1e-6
    assert torch.equal(svd_atoms(weight, 5), svd_atoms(weight.clone(), 5))
    assert (svd_atoms(weight, 9).amax(1) == svd_atoms(weight, 9).abs().amax(1)).all()  # the sign rule


@pytest.mark.parametrize("m", [0, -1, 10])
def test_svd_atoms_refuse_an_m_that_the_filters_cannot_have(m):
    with pytest.raises(ValueError, match=f"m={m}: the svd solver takes 1 to 9 atoms"):
        svd_atoms(random(4, 4, 3, 3), m)


def test_a_layer_of_zeros_decomposes():
    atoms = svd_atoms(torch.zeros(4, 4, 3, 3), 9)
    torch.testing.assert_close(atoms @ atoms.T, torch.eye(9))


def test_mixing_equals_coefficients_times_the_atom_change():
    """The identity everything rests on: F·Dᵀ·ΔD = C·ΔD with coefficients C fitted by least squares."""
    weight, change = random(6, 4, 3, 3), random(5, 9, seed=1)
    atoms = svd_atoms(weight, 5)
    coefficients = torch.linalg.lstsq(atoms.T, weight.reshape(-1, 9).T).solution.T  # (o*i, m)
    torch.testing.assert_close(mix_filters(weight, atoms.T @ change).reshape(-1, 9), coefficients @ change)


def test_atom_counts():
    assert atom_count(9, [9] * 52) == 4212
    assert atom_count(6, [9] * 52) == 2808

"""The maths of filter atoms, in float64 against formulas that share no code with it."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from sd_atoms.atoms import (
    FORMS,
    ConvGeometry,
    Term,
    atoms_layer,
    filter_rows,
    forms,
    mixed_weight,
    pick_form,
    relative_error,
    svd_atoms,
    terms,
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


def adapted(x, weight, mixing, bias, geometry, form="auto", delta_is_zero=False):
    return atoms_layer(x, weight, [Term(None, mixing)], bias, geometry, form, delta_is_zero)


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
    for function in (by_definition, lambda *a: adapted(*a, form=form)):
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
    assert torch.autograd.gradcheck(lambda x, a: adapted(x, weight, a, bias, geometry, form), (x, mixing))


@pytest.mark.parametrize("form", FORMS[1:])
def test_depthwise_and_no_bias(form):
    geometry = ConvGeometry(padding=(1, 1), groups=6)
    weight, mixing, _ = layer(groups=6, in_channels=6)
    x = random(2, 6, 7, 7, seed=3)
    got = adapted(x, weight, mixing, None, geometry, form)
    torch.testing.assert_close(got, by_definition(x, weight, mixing, None, geometry), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", FORMS[1:])
def test_identity_mixing_gives_the_plain_convolution_bit_for_bit_and_still_a_gradient(form):
    weight, _, bias = (t.float() for t in layer())
    x = random(1, 4, 8, 8).float()
    mixing = torch.eye(9, requires_grad=True)
    geometry = ConvGeometry(padding=(1, 1))
    y = adapted(x, weight, mixing, bias, geometry, form, delta_is_zero=True)
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
        adapted(x, weight, mixing, bias, ConvGeometry(padding=(1, 1)), form)
    assert {t.data_ptr() for t in kept} == {x.data_ptr(), weight.data_ptr(), mixing.data_ptr()}


@pytest.mark.parametrize(
    ("out_channels", "uncut"), [(12, 0), (400, 0), (400, 10**9)], ids=["more positions", "more channels", "uncut"]
)
@pytest.mark.parametrize("form", ["activation", "split"])
@pytest.mark.parametrize("groups", [1, 2])
def test_products_of_activations_in_float32(out_channels, uncut, form, groups, monkeypatch):
    monkeypatch.setattr(forms, "UNCUT_BYTES", uncut)
    monkeypatch.setattr(forms, "BLOCK_BYTES", 3 * 9 * 4 * 2 * 90)  # three channels a block
    geometry = ConvGeometry(padding=(1, 1), groups=groups)
    weight, mixing, bias = layer(groups=groups, out_channels=out_channels, in_channels=8)
    outcomes = []
    for function, dtype in ((by_definition, torch.float64), (lambda *a: adapted(*a, form=form), torch.float32)):
        inputs = [value.detach().to(dtype).requires_grad_() for value in (random(2, 8, 9, 10, seed=3), mixing)]
        y = function(inputs[0], weight.to(dtype), inputs[1], bias.to(dtype), geometry)
        y.backward(random(*y.shape, seed=4).to(dtype))
        outcomes.append([value.detach().double() for value in (y, inputs[0].grad, inputs[1].grad)])
    for expected, got in zip(*outcomes, strict=True):
        assert (got - expected).norm() < 1e-6 * expected.norm()


def silu_behind_a_view(h):
    """Its output is not known to be of silu's making."""
    return F.silu(h).view_as(h)


def silu_in_place(h):
    """Autograd keeps a copy of what it overwrites."""
    return F.silu(h * 1, inplace=True)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_after_silu_nothing_is_kept_that_silu_does_not_keep(form, memory_format):
    geometry = ConvGeometry(padding=(1, 1))
    weight, mixing, bias = layer()
    h = random(2, 4, 9, 10).contiguous(memory_format=memory_format)
    outcomes = []
    for silu in (F.silu, silu_behind_a_view, silu_in_place):
        inputs = [h.clone().requires_grad_(), mixing.clone().requires_grad_()]
        y = adapted(silu(inputs[0]), weight, inputs[1], bias, geometry, form)
        kept = y.grad_fn.saved_tensors[0].data_ptr()
        (y**2).sum().backward()
        outcomes.append((kept == inputs[0].data_ptr(), inputs[0].grad, inputs[1].grad))
    assert [outcome[0] for outcome in outcomes] == [True, False, False]
    for other in outcomes[1:]:
        assert all(map(torch.equal, outcomes[0][1:], other[1:]))


def test_a_change_in_place_before_backward_is_refused_also_after_silu():
    weight, mixing, bias = layer()
    h = random(1, 4, 5, 5).requires_grad_() + 0
    y = adapted(F.silu(h), weight, mixing.requires_grad_(), bias, ConvGeometry())
    h.detach().add_(1)
    with pytest.raises(RuntimeError, match="inplace"):
        y.sum().backward()


def test_an_input_that_has_been_through_backward_still_gives_a_value():
    weight, mixing, bias = layer()
    x = F.silu(random(1, 4, 5, 5).requires_grad_())
    x.sum().backward()  # silu lets go of what it kept
    y = adapted(x, weight, mixing.requires_grad_(), bias, ConvGeometry())
    assert torch.equal(y, adapted(x.detach(), weight, mixing, bias, ConvGeometry()))


def test_what_checkpointing_packs_is_left_alone():
    weight, mixing, bias = layer()
    mixing.requires_grad_()
    h = random(1, 4, 5, 5).requires_grad_()
    runs, grads = [], []

    def block(h):
        runs.append(1)
        return adapted(F.silu(h), weight, mixing, bias, ConvGeometry())

    for function in (block, lambda h: checkpoint(block, h, use_reentrant=False)):
        function(h).sum().backward()
        grads.append(mixing.grad)
        mixing.grad = None
    assert len(runs) == 3  # once plain; once forward and once backward with checkpointing
    assert torch.equal(*grads)


@pytest.mark.parametrize("form", FORMS[1:])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_within_its_rounding(form, dtype):
    weight, mixing, bias = layer(out_channels=32, in_channels=16)
    x = random(1, 16, 8, 8)
    exact = by_definition(x, weight, mixing, bias, ConvGeometry(padding=(1, 1)))
    low = [t.to(dtype) for t in (x, weight)]
    got = adapted(*low, mixing.float(), bias.to(dtype), ConvGeometry(padding=(1, 1)), form)
    assert got.dtype == dtype
    # each of the 144 products of a sum is rounded a few times; the errors add up like a random walk
    assert (got.double() - exact).norm() / exact.norm() < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("shape", [(8,), (5, 8), (2, 3, 8), (0, 8)])
def test_a_linear_layer_takes_inputs_of_any_shape(shape):
    x, weight = random(*shape).requires_grad_(), random(6, 8, seed=1)
    mixing = torch.eye(4, dtype=torch.float64) + random(4, 4, seed=2)
    mixing.requires_grad_()
    blocks = torch.einsum("OaIb,abcd->OcId", weight.view(3, 2, 4, 2), mixing.view(2, 2, 2, 2))
    expected = x @ blocks.reshape(6, 8).T
    got = atoms_layer(x, weight, [Term(None, mixing, (2, 2))], None, None)
    grad = random(*expected.shape, seed=3)
    assert torch.allclose(got, expected)
    for one, other in zip(*(torch.autograd.grad(y, (x, mixing), grad) for y in (got, expected)), strict=True):
        assert torch.allclose(one, other)


def test_auto_prefers_activations_where_channels_outnumber_positions(monkeypatch):
    monkeypatch.setattr(forms, "FEW_CHANNELS", 16)
    assert pick_form(64, 1280, 1) == "activation"  # the bottom of SD's UNet at 512 px
    assert pick_form(4096, 320, 1) == "split"  # its top
    assert pick_form(4096, 320, 1, cpu=False) == "weight"
    assert pick_form(1024, 640, per_channel=True) == "activation"
    assert pick_form(4096, 4) == "weight"  # the last one: less to multiply than to move
    assert pick_form(64, 1280, 1280) == "weight"  # depthwise: nothing to save
    monkeypatch.setattr(forms, "FEW_CHANNELS", 255)
    assert pick_form(64, 192, 1) == "activation"
    assert pick_form(256, 192, 1) == "weight"
    assert pick_form(256, 192, 1, per_channel=True) == "activation"
    assert pick_form(4096, 320, 1) == "split"


@pytest.mark.parametrize(("size", "contiguous"), [(1, False), (16, True)])
def test_the_effective_weight_takes_the_layout_of_a_larger_input(monkeypatch, size, contiguous):
    seen, convolution = [], forms.CONVOLUTIONS[2]

    def spy(x, weight, *rest):
        seen.append(weight.is_contiguous())
        return convolution(x, weight, *rest)

    monkeypatch.setitem(forms.CONVOLUTIONS, 2, spy)
    weight, mixing, bias = layer(out_channels=8, in_channels=8)
    x = random(1, 8, size, size)
    geometry = ConvGeometry(padding=(1, 1))
    got = adapted(x, weight, mixing, bias, geometry, "weight")
    assert seen == [contiguous]
    assert got.is_contiguous()
    assert torch.allclose(got, by_definition(x, weight, mixing, bias, geometry))


@pytest.mark.parametrize("m", [1, 4, 9])
def test_svd_atoms_are_orthonormal_and_optimal(m):
    weight = random(16, 8, 3, 3)
    atoms = svd_atoms(filter_rows(weight), m)
    torch.testing.assert_close(atoms @ atoms.T, torch.eye(m, dtype=torch.float64), atol=1e-12, rtol=0)
    singular = torch.linalg.svdvals(weight.reshape(-1, 9))
    best = (singular[m:].square().sum() / singular.square().sum()).sqrt().item()
    assert relative_error(filter_rows(weight), atoms) == pytest.approx(best, abs=1e-9)


def test_svd_atoms_are_exact_at_full_m_and_repeatable():
    weight = random(16, 8, 3, 3).float()
    assert relative_error(filter_rows(weight), svd_atoms(filter_rows(weight), 9)) < 1e-6
    assert torch.equal(svd_atoms(filter_rows(weight), 5), svd_atoms(filter_rows(weight.clone()), 5))
    assert (
        svd_atoms(filter_rows(weight), 9).amax(1) == svd_atoms(filter_rows(weight), 9).abs().amax(1)
    ).all()  # the sign rule


@pytest.mark.parametrize("m", [0, -1, 10])
def test_svd_atoms_refuse_an_m_that_the_filters_cannot_have(m):
    with pytest.raises(ValueError, match=f"m={m}: the svd solver takes 1 to 9 atoms"):
        svd_atoms(random(16, 9), m)


def test_a_layer_of_zeros_decomposes():
    atoms = svd_atoms(torch.zeros(16, 9), 9)
    torch.testing.assert_close(atoms @ atoms.T, torch.eye(9))


def test_mixing_equals_coefficients_times_the_atom_change():
    """The identity everything rests on: F·Dᵀ·ΔD = C·ΔD with coefficients C fitted by least squares."""
    weight, change = random(6, 4, 3, 3), random(5, 9, seed=1)
    atoms = svd_atoms(filter_rows(weight), 5)
    coefficients = torch.linalg.lstsq(atoms.T, weight.reshape(-1, 9).T).solution.T  # (o*i, m)
    torch.testing.assert_close(
        mixed_weight(weight, [Term(None, atoms.T @ change)]).reshape(-1, 9), coefficients @ change
    )


def codes(*shape):
    return random(*shape, seed=7)


TERMS = {  # of a weight (6, 4/g, 3, 3); each with its definition written out
    "shared": lambda g: Term(None, random(9, 9, seed=1)),
    "per channel": lambda g: Term(None, random(4, 9, 9, seed=1)),
    "codes": lambda g: Term(codes(6, 4 // g, 5), random(5, 9, seed=1)),
    "codes per channel": lambda g: Term(codes(6, 4 // g, 11), random(4, 11, 9, seed=1)),
    "blocks": lambda g: Term(None, random(27 * 2, 27 * 2, seed=1) / 7, (3, 2)),
    "block codes": lambda g: Term(codes(2, 2 // g, 10), random(10, 54, seed=1), (3, 2)),
    "plain": lambda g: Term(),
}


def term_by_definition(term, weight, groups):
    """Entry by entry, as the paper's index notation has it."""
    o, i = weight.shape[:2]
    filters = weight.flatten(2)
    if term.mixing is None:
        return filters
    total = torch.zeros(o, i, 9, dtype=torch.float64)
    if term.block:
        a, b = term.block
        for row in range(0, o, a):
            for column in range(0, i, b):
                block = filters[row : row + a, column : column + b].flatten()
                coefficients = block if term.codes is None else term.codes[row // a, column // b]
                total[row : row + a, column : column + b] = (coefficients @ term.mixing).view(a, b, 9)
        return total
    rows = filters if term.codes is None else term.codes
    for row in range(o):
        for column in range(i):
            channel = row // (o // groups) * i + column  # input channel of the whole layer
            mixing = term.mixing[channel] if term.mixing.dim() == 3 else term.mixing
            total[row, column] = rows[row, column] @ mixing
    return total


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    "names", [(name,) for name in TERMS] + [("shared", "codes", "blocks"), ("per channel", "codes")]
)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_effective_weight_is_the_sum_of_its_terms(groups, names, memory_format):
    weight = random(6, 4 // groups, 3, 3).contiguous(memory_format=memory_format)
    terms = [TERMS[name](groups) for name in names]
    expected = sum(term_by_definition(term, weight, groups) for term in terms).view_as(weight)
    got = mixed_weight(weight, terms, groups)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    assert got.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    "names", [("per channel",), ("shared", "codes"), ("plain", "codes per channel"), ("shared", "blocks")]
)
def test_every_term_gets_its_gradient_in_every_form(form, groups, names):
    weight, x = random(6, 4 // groups, 3, 3), random(2, 4, 5, 6, seed=3)
    terms = [TERMS[name](groups) for name in names]
    mixings = [term.mixing.clone().requires_grad_() for term in terms if term.mixing is not None]
    geometry = ConvGeometry(padding=(1, 1), stride=(1, 2), groups=groups)
    x.requires_grad_()

    def run(x, *mixings):
        left = list(mixings)
        moved = [term if term.mixing is None else term._replace(mixing=left.pop(0)) for term in terms]
        return atoms_layer(x, weight, moved, None, geometry, form)

    effective = sum(term_by_definition(term, weight, groups) for term in terms).view_as(weight)
    expected = F.conv2d(x, effective, None, *geometry)
    torch.testing.assert_close(run(x, *mixings), expected, rtol=1e-11, atol=1e-11)
    assert torch.autograd.gradcheck(run, (x, *mixings))


@pytest.mark.parametrize("form", FORMS[1:])
@pytest.mark.parametrize("axes", [1, 3])
def test_other_dimensions(form, axes):
    kernel = (3, 2, 2)[:axes]
    weight, x = random(6, 4, *kernel), random(2, 4, *(7, 5, 6)[:axes], seed=3).requires_grad_()
    k = math.prod(kernel)
    mixing = random(k, k, seed=1).requires_grad_()
    geometry = ConvGeometry((2, 1, 1)[:axes], (1, 0, 1)[:axes], (1, 2, 1)[:axes])
    convolution = {1: F.conv1d, 3: F.conv3d}[axes]

    def run(x, mixing):
        return atoms_layer(x, weight, [Term(None, mixing)], None, geometry, form)

    effective = (weight.flatten(2) @ mixing).view_as(weight)
    torch.testing.assert_close(run(x, mixing), convolution(x, effective, None, *geometry), rtol=1e-11, atol=1e-11)
    assert torch.autograd.gradcheck(run, (x, mixing))


def test_the_buffer_of_effective_weights_is_never_handed_out():
    weight, mixing = random(6, 4, 3, 3), random(9, 9, seed=1)
    merged = mixed_weight(weight, [Term(None, mixing)])
    kept = merged.clone()
    mixed_weight(weight, [Term(None, 2 * mixing)])
    assert torch.equal(merged, kept)


def test_training_goes_on_after_inference_mode():
    terms._buffers.__dict__.clear()
    weight, x = random(6, 4, 3, 3), random(1, 4, 5, 5)
    mixing = random(9, 9, seed=1).requires_grad_()
    with torch.inference_mode():
        adapted(x, weight, mixing, None, ConvGeometry(), "weight")
    adapted(x, weight, mixing, None, ConvGeometry(), "weight").sum().backward()
    assert mixing.grad.abs().max() > 0

"""A layer with mixed filters, y = conv(x, Σ Q·M), at the cost of the frozen layer.

Each pass has two ways to its numbers (see `terms` for Q and M):

- by weight: build the effective weight and convolve; backward takes the weight gradient and contracts it at once to
  the size of M. The price is mixing o·i filters, and in backward the weight gradient, as much work as the convolution
  itself.
- by activation: y = Q·(M applied to im2col(x)). No effective weight is ever built and no weight gradient is ever
  taken: the matrix products are exactly those of the frozen layer. The price is moving and mixing i·K·L patches.

The forms are their combinations: "weight" and "activation" use one way for both passes, "split" goes forward by
weight and backward by activation, which suits large pictures. All keep only x, Q and M for backward. Block atoms mix
output channels too, so they and Linear layers always go by weight.
"""

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F

from sd_atoms.atoms.layout import filters_of, mixing_dtype, taps
from sd_atoms.atoms.patches import ConvGeometry, fold, unfold
from sd_atoms.atoms.products import BY_ONEDNN, add_product, product, transposed_product
from sd_atoms.atoms.terms import PLAIN, Term, effective_weight, mixing_gradient

FORMS = ("auto", "weight", "activation", "split")

# Up to how many output positions per output channel the forward pass goes by activation, and up to how many output
# channels a weight gradient costs less than the patches that it would save; measured (`sd-atoms bench forms`) on an
# Intel Xeon with AMX, and on an AMD EPYC with AVX-512, which moves patches more slowly beside what it multiplies.
REACH = 1.0
FEW_CHANNELS = 255 if BY_ONEDNN else 16
# Atoms per channel mix weights more slowly than patches: so many times as far.
CHANNEL_REACH = 2.0

# A weight of up to so many times the numbers of its input is laid out as that; measured on layers of SD and ResNet50.
LIGHT_WEIGHT = 3

# Patches are made, used and dropped in blocks of channels that fit the processor's cache. Larger ones also cost time
# in the memory allocator, which asks the system for fresh pages each time.
BLOCK_BYTES = 2 * 2**20
# oneDNN copies what it is given a part of. With fewer positions than output channels a part of the weight is more to
# copy than patches of so many bytes cost outside of the cache.
UNCUT_BYTES = 12 * 2**20 if BY_ONEDNN else 0

# The hooks that checkpointing and offloading put around what autograd keeps; None where there are none.
_saved_tensors_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)

CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def pick_form(positions: int, out_channels: int, groups: int = 1, per_channel: bool = False, cpu: bool = True) -> str:
    """The fastest form for one call.

    Args:
        positions: output pixels times batch, N·H·W.
        out_channels: o.
        groups: groups of the convolution.
        per_channel: whether every input channel has a mixing matrix of its own.
        cpu: whether it is computed by a CPU.

    Forward, mixing o·i·K weights stands against mixing i·K·positions patches: o against positions. Backward, a weight
    gradient of o·i·K·positions multiply-adds stands against moving i·K·positions patches: what matters is o. Graphics
    cards multiply so much faster than they move that there the weight form is taken for large pictures (by reckoning:
    not measured).
    """
    if groups > 1:
        return "weight"
    if positions <= out_channels * REACH * (CHANNEL_REACH if per_channel else 1.0):
        return "activation"
    return "split" if cpu and out_channels > FEW_CHANNELS else "weight"


def atoms_layer(
    x: torch.Tensor,
    weight: torch.Tensor,
    terms: Sequence[Term],
    bias: torch.Tensor | None,
    geometry: ConvGeometry | None,
    form: str = "auto",
    delta_is_zero: bool = False,
) -> torch.Tensor:
    """conv(x, Σ Q·M) + bias, or linear(x, Σ Q·M) + bias, differentiable in x and in every M.

    Args:
        x: (N, i, *S) with one to three axes S, the dtype of `weight`; (…, i) for a Linear layer.
        weight: F, (o, i/groups, *k) or (o, i), frozen: it gets no gradient.
        terms: what the effective weight is the sum of; codes get no gradient.
        bias: (o,) or None, frozen.
        geometry: stride, zero padding, dilation, groups; None for a Linear layer.
        form: one of FORMS; "auto" and whatever a layer cannot take is decided here.
        delta_is_zero: the caller knows that Σ Q·M = F: the value is then that of the plain layer, bit for bit, and the
            gradients are those of the chosen form.

    Returns:
        (N, o, *S') or (…, o) in the dtype of x.
    """
    if geometry is None or any(term.block for term in terms):
        form = "weight"
    elif form == "auto":
        positions = x.shape[0] * math.prod(geometry.output_size(x.shape[2:], weight.shape[2:]))
        per_channel = any(term.per_channel for term in terms)
        form = pick_form(positions, weight.shape[0], geometry.groups, per_channel, x.device.type == "cpu")
    tensors = [tensor for term in terms for tensor in term[:2]]
    blocks = [term.block for term in terms]
    with torch.autocast(x.device.type, enabled=False):  # autocast would mix in half precision
        return _AtomsLayer.apply(x, _before_silu(x), weight, bias, geometry, form, delta_is_zero, blocks, *tensors)


def _before_silu(x: torch.Tensor) -> torch.Tensor | None:
    """h, detached, if x is silu(h) and autograd keeps h as it is; None otherwise."""
    # unpacking what a hook has packed could run a whole checkpointed block again
    if torch.compiler.is_compiling() or _saved_tensors_hooks is None or _saved_tensors_hooks(True) is not None:
        return None
    if x.grad_fn is None or x.grad_fn.name() != "SiluBackward0":
        return None
    try:
        return x.grad_fn._saved_self.detach()
    except RuntimeError:  # x has been through a backward pass already, which let h go
        return None


class _AtomsLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, before_silu, weight, bias, geometry, form, delta_is_zero, blocks, *tensors):
        ctx.save_for_backward(x if before_silu is None else before_silu, weight, *tensors)
        ctx.remake = before_silu is not None
        ctx.geometry, ctx.form, ctx.blocks = geometry, form, blocks
        terms = [PLAIN] if delta_is_zero else _terms(tensors, blocks)
        if form == "activation" and not delta_is_zero:
            return _forward_by_activation(x, weight, terms, bias, geometry)
        return _layer(x, _effective(weight, terms, geometry, x), bias, geometry)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight, *tensors = ctx.saved_tensors
        terms = _terms(tensors, ctx.blocks)
        wants_x, wanted = ctx.needs_input_grad[0], ctx.needs_input_grad[9::2]
        if ctx.remake and any(wanted):
            x = F.silu(x)
        backward = _backward_by_weight if ctx.form == "weight" else _backward_by_activation
        with torch.autocast(grad.device.type, enabled=False):
            grad_x, grad_mixings = backward(grad, x, weight, terms, ctx.geometry, wants_x, wanted)
        pairs = [gradient for mixing in grad_mixings for gradient in (None, mixing)]
        return grad_x, None, None, None, None, None, None, None, *pairs


def _terms(tensors, blocks) -> list[Term]:
    return [Term(*parts) for parts in zip(tensors[::2], tensors[1::2], blocks, strict=True)]


def _groups(geometry: ConvGeometry | None) -> int:
    return 1 if geometry is None else geometry.groups


def _effective(weight, terms, geometry, x):
    # an input that is not much smaller takes longer to move into a weight's layout than the weight into its own
    contiguous = x.is_contiguous() and weight.numel() < LIGHT_WEIGHT * x.numel()
    return effective_weight(weight, terms, _groups(geometry), contiguous)


def _layer(x, weight, bias, geometry):
    if geometry is None:
        return F.linear(x, weight, bias)
    y = CONVOLUTIONS[len(geometry.stride)](x, weight, bias, *geometry)
    # the layout of an effective weight must not become that of the activations
    return y.contiguous() if x.is_contiguous() else y


def _backward_by_weight(grad, x, weight, terms, geometry, wants_x, wanted):
    effective = _effective(weight, terms, geometry, x) if wants_x else weight
    grad_x, grad_weight = _layer_backward(grad, x, effective, geometry, wants_x, any(wanted))
    grad_mixings = [
        mixing_gradient(weight, term, grad_weight, _groups(geometry), term.mixing.dtype) if want else None
        for term, want in zip(terms, wanted, strict=True)
    ]
    return grad_x, grad_mixings


def _layer_backward(grad, x, weight, geometry, wants_x, wants_weight):
    if geometry is None:
        rows, inputs = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        grad_x = product(rows, weight).view(x.shape) if wants_x else None
        return grad_x, (transposed_product(rows, inputs) if wants_weight else None)
    stride, padding, dilation, groups = geometry
    grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad, x, weight, None, stride, padding, dilation, False, (0,) * len(stride), groups,
        (wants_x, wants_weight, False),
    )  # fmt: skip
    if wants_x and x.is_contiguous():
        grad_x = grad_x.contiguous()
    return grad_x, grad_weight


def _forward_by_activation(x, weight, terms, bias, geometry):
    kernel = weight.shape[2:]
    size = geometry.output_size(x.shape[2:], kernel)
    dtype = mixing_dtype(x.dtype)
    y = x.new_zeros(weight.shape[0], x.shape[0] * math.prod(size))  # (o, N*L), L output positions
    for inputs, outputs, filters in _blocks(x, weight, terms, y.shape[1], geometry.groups):
        patches = unfold(x[:, inputs], kernel, geometry, size, dtype)
        for term, part in zip(terms, filters, strict=True):
            # z_p = sum_q M[p, q] x_q: (T, K) @ (c, K, N*L) -> (c, T, N*L)
            mixed = patches if term.mixing is None else torch.bmm(_mixing(term, inputs, dtype), patches)
            mixed = mixed.to(x.dtype).flatten(0, 1)
            # (o/g, c*T) @ (c*T, N*L) -> (o/g, N*L)
            add_product(y[outputs], part, mixed)
    if bias is not None:
        y += bias.unsqueeze(1)
    return y.unflatten(1, (x.shape[0], *size)).transpose(0, 1).contiguous()


def _backward_by_activation(grad, x, weight, terms, geometry, wants_x, wanted):
    size, kernel = grad.shape[2:], weight.shape[2:]
    dtype = mixing_dtype(x.dtype)
    grad = grad.transpose(0, 1).flatten(1)  # (N, o, *S') -> (o, N*L)
    grad_x = torch.empty_like(x) if wants_x else None
    grad_mixings = [torch.zeros_like(term.mixing) if want else None for term, want in zip(terms, wanted, strict=True)]
    for inputs, outputs, filters in _blocks(x, weight, terms, grad.shape[1], geometry.groups):
        block = x[:, inputs]
        patches = unfold(block, kernel, geometry, size, dtype) if any(wanted) else None
        columns = None
        for term, part, grad_mixing in zip(terms, filters, grad_mixings, strict=True):
            # (c*T, o/g) @ (o/g, N*L) -> (c, T, N*L)
            grad_mixed = transposed_product(part, grad[outputs])
            grad_mixed = grad_mixed.unflatten(0, (block.shape[1], -1)).to(dtype)
            if grad_mixing is not None:
                # M[p, q] <- sum over positions, and channels where they share M, of gz_p x_q
                products = torch.bmm(grad_mixed, patches.mT)
                if term.per_channel:
                    grad_mixing[inputs] = products
                else:
                    grad_mixing += products.sum(0, dtype=grad_mixing.dtype)
            if wants_x:
                if term.mixing is not None:
                    grad_mixed = torch.bmm(_mixing(term, inputs, dtype).mT, grad_mixed)
                columns = grad_mixed if columns is None else columns.add_(grad_mixed)
        if wants_x:
            grad_x[:, inputs] = fold(columns, block.shape, kernel, geometry, size)
    return grad_x, grad_mixings


def _mixing(term: Term, inputs: slice, dtype: torch.dtype) -> torch.Tensor:
    """(c, T, K) for a block of input channels; expanded where they share it: `matmul` would copy the patches."""
    mixing = term.mixing.to(dtype)
    return mixing[inputs] if term.per_channel else mixing.expand(inputs.stop - inputs.start, -1, -1)


def _blocks(x, weight, terms, positions, groups) -> Iterator[tuple[slice, slice, list[torch.Tensor]]]:
    """Blocks of c input channels, the output channels they reach, and each term's numbers between, (o/g, c*T)."""
    in_channels, out_channels = x.shape[1] // groups, weight.shape[0] // groups
    step = in_channels
    # where sums in half precision would be rounded at every block, or blocks are kernel launches, one block is better
    if x.device.type == "cpu" and x.dtype == mixing_dtype(x.dtype):
        size = x.element_size() * taps(weight) * positions
        if positions >= out_channels or in_channels * size > UNCUT_BYTES:
            step = max(1, BLOCK_BYTES // size)
    sources = [filters_of(weight) if term.codes is None else term.codes.to(weight.dtype) for term in terms]
    for group in range(groups):
        outputs = slice(group * out_channels, (group + 1) * out_channels)
        rows = [source[outputs].flatten(1) for source in sources]
        for start in range(0, in_channels, step):
            stop = min(start + step, in_channels)
            inputs = slice(group * in_channels + start, group * in_channels + stop)
            yield (
                inputs,
                outputs,
                [
                    row[:, start * source.shape[2] : stop * source.shape[2]]
                    for row, source in zip(rows, sources, strict=True)
                ],
            )

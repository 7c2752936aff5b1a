"""A convolution with mixed filters, y = conv(x, F·A), at the cost of the frozen convolution.

Each pass has two ways to its numbers (A is K×K, close to the identity):

- by weight: build F·A and convolve; backward takes the weight gradient and contracts it at once to K×K. The price is
  mixing o·i filters, and in backward the weight gradient, as much work as the convolution itself.
- by activation: y = F·(A applied to im2col(x)). No effective weight is ever built and no weight gradient is ever
  taken: the matrix products are exactly those of the frozen layer. The price is moving and mixing i·K·L patches.

The forms are their combinations: "weight" and "activation" use one way for both passes, "split" goes forward by
weight and backward by activation, which suits large pictures. All keep only x, F and A for backward.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F

from sd_atoms.atoms.layout import filter_rows, mix_filters, mixing_dtype, taps

FORMS = ("auto", "weight", "activation", "split")

# Where the forms cost the same; measured (`sd-atoms bench forms`).
ACTIVATION_REACH = 0.5  # output positions per output channel
SPLIT_CHANNELS = 400  # output channels; with fewer, a weight gradient costs no more than moving patches

# Patches are made, used and dropped in blocks of channels that fit the processor's cache. Larger ones also cost time
# in the memory allocator, which asks the system for fresh pages each time.
BLOCK_BYTES = 4 * 2**20


class ConvGeometry(NamedTuple):
    """Stride, zero padding and dilation in pixels (height, width), and the number of groups."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    def output_size(self, height: int, width: int, kernel: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the output for an input of `height` × `width`."""
        return tuple(
            (size + 2 * pad - gap * (k - 1) - 1) // step + 1
            for size, pad, gap, k, step in zip(
                (height, width), self.padding, self.dilation, kernel, self.stride, strict=True
            )
        )


def pick_form(positions: int, out_channels: int, groups: int) -> str:
    """The fastest form for one call.

    Args:
        positions: output pixels times batch, N·H·W.
        out_channels: o.
        groups: groups of the convolution.

    Forward, mixing o·i·K weights stands against mixing i·K·positions patches: o against positions. Backward, the
    weight gradient's o·i·K·positions multiply-adds stand against moving i·K·positions patches: o against a constant.
    """
    if groups > 1:
        return "weight"
    if positions <= ACTIVATION_REACH * out_channels:
        return "activation"
    return "split" if out_channels >= SPLIT_CHANNELS else "weight"


def atoms_conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    mixing: torch.Tensor,
    bias: torch.Tensor | None,
    geometry: ConvGeometry,
    form: str = "auto",
    mixing_is_identity: bool = False,
) -> torch.Tensor:
    """conv2d(x, F·A) + bias, differentiable in x and A.

    Args:
        x: (N, i, H, W), the dtype of `weight`.
        weight: F, (o, i/groups, kh, kw), frozen: it gets no gradient.
        mixing: A, (K, K) with K = kh·kw, float32 or float64.
        bias: (o,) or None, frozen.
        geometry: stride, zero padding, dilation, groups.
        form: one of FORMS.
        mixing_is_identity: the caller knows that A = I: the value is then that of the plain convolution, bit for bit,
            and the gradients are those of the chosen form.

    Returns:
        (N, o, H', W') in the dtype of x.
    """
    if form == "auto":
        height, width = geometry.output_size(x.shape[2], x.shape[3], weight.shape[2:])
        form = pick_form(x.shape[0] * height * width, weight.shape[0], geometry.groups)
    with torch.autocast(x.device.type, enabled=False):  # autocast would mix in half precision
        return _AtomsConv2d.apply(x, weight, mixing, bias, geometry, form, mixing_is_identity)


class _AtomsConv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, mixing, bias, geometry, form, mixing_is_identity):
        ctx.save_for_backward(x, weight, mixing)
        ctx.geometry, ctx.form = geometry, form
        if form == "activation" and not mixing_is_identity:
            return _forward_by_activation(x, weight, mixing, bias, geometry)
        effective = weight if mixing_is_identity else mix_filters(weight, mixing)
        return F.conv2d(x, effective, bias, *geometry)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        wants_x, _, wants_mixing = ctx.needs_input_grad[:3]
        backward = _backward_by_weight if ctx.form == "weight" else _backward_by_activation
        with torch.autocast(grad.device.type, enabled=False):
            grad_x, grad_mixing = backward(grad, *ctx.saved_tensors, ctx.geometry, wants_x, wants_mixing)
        return grad_x, None, grad_mixing, None, None, None, None


def _backward_by_weight(grad, x, weight, mixing, geometry, wants_x, wants_mixing):
    stride, padding, dilation, groups = geometry
    effective = mix_filters(weight, mixing) if wants_x else weight
    wanted = (wants_x, wants_mixing, False)
    grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad, x, effective, None, stride, padding, dilation, False, (0, 0), groups, wanted
    )
    grad_mixing = None
    if wants_mixing:
        # (K, o*i) @ (o*i, K) -> (K, K)
        grad_mixing = filter_rows(weight).to(mixing.dtype).T @ filter_rows(grad_weight).to(mixing.dtype)
    return grad_x, grad_mixing


def _forward_by_activation(x, weight, mixing, bias, geometry):
    size = geometry.output_size(x.shape[2], x.shape[3], weight.shape[2:])
    dtype = mixing_dtype(x.dtype)
    y = x.new_zeros(weight.shape[0], x.shape[0] * size[0] * size[1])  # (o, N*L), L output positions
    for inputs, outputs, filters in _blocks(x, weight, y.shape[1], geometry.groups):
        patches = _patches(x[:, inputs], weight.shape[2:], geometry, size, dtype)
        # z_p = sum_q A[p, q] x_q: (K, K) @ (c, K, N*L) -> (c, K, N*L)
        mixed = (mixing.to(dtype) @ patches).to(x.dtype)
        y[outputs].addmm_(filters, mixed.flatten(0, 1))  # (o/g, c*K) @ (c*K, N*L) -> (o/g, N*L)
    if bias is not None:
        y += bias.unsqueeze(1)
    return y.unflatten(1, (x.shape[0], *size)).transpose(0, 1).contiguous()


def _backward_by_activation(grad, x, weight, mixing, geometry, wants_x, wants_mixing):
    size, kernel = grad.shape[2:], weight.shape[2:]
    dtype = mixing_dtype(x.dtype)
    grad = grad.transpose(0, 1).flatten(1)  # (N, o, H', W') -> (o, N*L)
    grad_x = torch.empty_like(x) if wants_x else None
    grad_mixing = torch.zeros_like(mixing) if wants_mixing else None
    for inputs, outputs, filters in _blocks(x, weight, grad.shape[1], geometry.groups):
        # (c*K, o/g) @ (o/g, N*L) -> (c, K, N*L)
        grad_mixed = (filters.T @ grad[outputs]).unflatten(0, (-1, taps(weight))).to(dtype)
        if wants_mixing:
            # A[p, q] <- sum over channels and positions of gz_p x_q
            patches = _patches(x[:, inputs], kernel, geometry, size, dtype)
            grad_mixing += (grad_mixed @ patches.mT).sum(0, dtype=mixing.dtype)
        if wants_x:
            columns = mixing.T.to(dtype) @ grad_mixed
            grad_x[:, inputs] = _fold(columns, x[:, inputs].shape, kernel, geometry, size)
    return grad_x, grad_mixing


def _blocks(x, weight, positions, groups) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    """Blocks of c input channels, with the output channels they reach and the filters between, (o/g, c*K)."""
    k, in_channels, out_channels = taps(weight), x.shape[1] // groups, weight.shape[0] // groups
    step = in_channels
    # where sums in half precision would be rounded at every block, or blocks are kernel launches, one block is better
    if x.device.type == "cpu" and x.dtype == mixing_dtype(x.dtype):
        step = max(1, BLOCK_BYTES // (x.element_size() * k * positions))
    for group in range(groups):
        outputs = slice(group * out_channels, (group + 1) * out_channels)
        filters = weight[outputs].reshape(out_channels, -1)
        for start in range(0, in_channels, step):
            stop = min(start + step, in_channels)
            inputs = slice(group * in_channels + start, group * in_channels + stop)
            yield inputs, outputs, filters[:, start * k : stop * k]


def _patches(x, kernel, geometry, size, dtype):
    """im2col: (N, c, H, W) -> (c, K, N*L). Copies whole rows, where `F.unfold` copies pixel by pixel."""
    height, width = geometry.padding
    padded = F.pad(x, (width, width, height, height)).transpose(0, 1)
    patches = x.new_empty(x.shape[1], kernel[0] * kernel[1], x.shape[0], *size, dtype=dtype)
    for tap, (rows, columns) in enumerate(_windows(kernel, geometry, size)):
        patches[:, tap] = padded[:, :, rows, columns]
    return patches.flatten(2)


def _fold(patches, shape, kernel, geometry, size):
    """The transpose of `_patches`: (c, K, N*L) -> (N, c, H, W), adding up where windows overlap."""
    batch, channels, height, width = shape
    top, left = geometry.padding
    patches = patches.unflatten(2, (batch, *size))
    padded = patches.new_zeros(channels, batch, height + 2 * top, width + 2 * left)
    for tap, (rows, columns) in enumerate(_windows(kernel, geometry, size)):
        padded[:, :, rows, columns] += patches[:, tap]
    return padded[:, :, top : top + height, left : left + width].transpose(0, 1)


def _windows(kernel, geometry, size) -> Iterator[tuple[slice, slice]]:
    """Per tap, the rows and columns of the padded picture that it meets."""
    step_down, step_right = geometry.stride
    for row in range(kernel[0]):
        top = row * geometry.dilation[0]
        for column in range(kernel[1]):
            left = column * geometry.dilation[1]
            yield (
                slice(top, top + step_down * (size[0] - 1) + 1, step_down),
                slice(left, left + step_right * (size[1] - 1) + 1, step_right),
            )

"""A convolution with mixed filters, y = conv(x, F·A), at the cost of the frozen convolution.

Two forms of one function (A is K×K, close to the identity):

- weight form: build F·A, convolve. Backward takes the weight gradient and contracts it at once to K×K. Good when
  the picture is large and the channels few.
- activation form: y = F·(A applied to im2col(x)). No effective weight is ever built and no weight gradient is ever
  taken: the two matrix products are exactly those of the frozen layer. Good when the channels outnumber the pixels,
  which is where the weights of Stable Diffusion's UNet are.

Both keep only x, F and A for backward, never F·A and never the im2col buffer.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from sd_atoms.atoms.layout import filter_rows, mix_filters, mixing_dtype, taps

FORMS = ("auto", "weight", "activation")


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
    """The faster form for one call.

    Args:
        positions: output pixels times batch, N·H·W.
        out_channels: o.
        groups: groups of the convolution.

    The weight form pays for a weight gradient, o·i·K·positions multiply-adds, and for mixing the o·i filters; the
    activation form for mixing and storing i·K·positions patches. Their ratio is o against positions; the constant is
    measured (`sd-atoms bench forms`).
    """
    return "activation" if groups == 1 and positions <= ACTIVATION_REACH * out_channels else "weight"


ACTIVATION_REACH = 1.0


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
    function = _ActivationForm if form == "activation" else _WeightForm
    with torch.autocast(x.device.type, enabled=False):  # autocast would mix in half precision
        return function.apply(x, weight, mixing, bias, geometry, mixing_is_identity)


def _plain_conv(x, weight, bias, geometry):
    return F.conv2d(x, weight, bias, geometry.stride, geometry.padding, geometry.dilation, geometry.groups)


class _WeightForm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, mixing, bias, geometry, mixing_is_identity):
        ctx.save_for_backward(x, weight, mixing)
        ctx.geometry = geometry
        effective = weight if mixing_is_identity else mix_filters(weight, mixing)
        return _plain_conv(x, effective, bias, geometry)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight, mixing = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.geometry
        wants_x, _, wants_mixing = ctx.needs_input_grad[:3]
        with torch.autocast(x.device.type, enabled=False):
            effective = mix_filters(weight, mixing) if wants_x else weight
            grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
                grad,
                x,
                effective,
                None,
                stride,
                padding,
                dilation,
                False,
                (0, 0),
                groups,
                (wants_x, wants_mixing, False),
            )
            grad_mixing = None
            if wants_mixing:
                # (K, o*i) @ (o*i, K) -> (K, K)
                grad_mixing = filter_rows(weight).to(mixing.dtype).T @ filter_rows(grad_weight).to(mixing.dtype)
        return grad_x, None, grad_mixing, None, None, None


class _ActivationForm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, mixing, bias, geometry, mixing_is_identity):
        ctx.save_for_backward(x, weight, mixing)
        ctx.geometry = geometry
        if mixing_is_identity:
            return _plain_conv(x, weight, bias, geometry)
        out_channels, _, kernel_height, kernel_width = weight.shape
        patches = _patches(x, weight, geometry)
        mixed = _mix_taps(mixing, patches)  # z_p = sum_q A[p, q] x_q: (N, i, K, L)
        # (g, o/g, i/g*K) @ (N, g, i/g*K, L) -> (N, g, o/g, L)
        y = _grouped_rows(weight, geometry) @ _grouped_columns(mixed, geometry)
        height, width = geometry.output_size(x.shape[2], x.shape[3], (kernel_height, kernel_width))
        y = y.reshape(x.shape[0], out_channels, height, width)
        return y if bias is None else y.add_(bias.view(1, -1, 1, 1))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight, mixing = ctx.saved_tensors
        geometry = ctx.geometry
        wants_x, _, wants_mixing = ctx.needs_input_grad[:3]
        batch, in_channels, height, width = x.shape
        k = taps(weight)
        grad_x = grad_mixing = None
        with torch.autocast(x.device.type, enabled=False):
            grad = grad.reshape(batch, geometry.groups, weight.shape[0] // geometry.groups, -1)
            # (g, i/g*K, o/g) @ (N, g, o/g, L) -> (N, i, K, L)
            grad_mixed = (_grouped_rows(weight, geometry).mT @ grad).view(batch, in_channels, k, -1)
            if wants_mixing:
                # A[p, q] <- sum over pictures, channels and positions of gz_p x_q
                patches = _patches(x, weight, geometry)
                grad_mixing = (grad_mixed @ patches.mT).sum((0, 1), dtype=mixing.dtype)
            if wants_x:
                columns = _mix_taps(mixing.T, grad_mixed).view(batch, in_channels * k, -1)
                grad_x = F.fold(
                    columns,
                    (height, width),
                    weight.shape[2:],
                    dilation=geometry.dilation,
                    padding=geometry.padding,
                    stride=geometry.stride,
                )
        return grad_x, None, grad_mixing, None, None, None


def _patches(x, weight, geometry):
    """im2col: (N, i, H, W) -> (N, i, K, L), L output positions."""
    columns = F.unfold(
        x, weight.shape[2:], dilation=geometry.dilation, padding=geometry.padding, stride=geometry.stride
    )
    return columns.view(x.shape[0], x.shape[1], taps(weight), -1)


def _mix_taps(mixing, patches):
    """(K, K) @ (N, i, K, L) -> (N, i, K, L), in float32 at least, rounded once."""
    dtype = mixing_dtype(patches.dtype)
    return (mixing.to(dtype) @ patches.to(dtype)).to(patches.dtype)


def _grouped_rows(weight, geometry):
    """(o, i/g, kh, kw) -> (g, o/g, i/g*K)."""
    return weight.reshape(geometry.groups, weight.shape[0] // geometry.groups, -1)


def _grouped_columns(patches, geometry):
    """(N, i, K, L) -> (N, g, i/g*K, L)."""
    return patches.reshape(patches.shape[0], geometry.groups, -1, patches.shape[3])

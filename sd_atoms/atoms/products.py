"""Large matrix products on the CPU, by whichever of PyTorch's two libraries is the faster.

PyTorch takes dense float32 products by MKL, which uses the widest vectors of Intel's processors alone: on an AMD
processor with AVX-512 it takes 2 to 2.5 times as long as oneDNN, which computes the convolutions.
"""

import torch


def _maker() -> str:
    """vendor_id of this machine's CPU; "" where nobody can say."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next((line.partition(":")[2].strip() for line in file if line.startswith("vendor_id")), "")
    except OSError:
        return ""


# oneDNN's product as the compiler of PyTorch calls it, x (m, k) and weight (n, k) -> x·weightᵀ; None where it is not
# built in, or gains nothing.
_by_onednn = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
if _maker() != "AuthenticAMD" or torch.backends.cpu.get_cpu_capability() != "AVX512":
    _by_onednn = None
BY_ONEDNN = _by_onednn is not None

# oneDNN's call takes some 10 µs longer; from about so many multiplications on it is the faster all the same.
LARGE = 2_000_000


def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left (m, k) @ right (k, n)."""
    if _is_large(left, right):
        return _onednn(left, right)
    return left @ right


def add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """total (m, n) += left (m, k) @ right (k, n)."""
    if _is_large(left, right):
        total += _onednn(left, right)
    else:
        total.addmm_(left, right)


def transposed_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left (k, m) transposed @ right (k, n)."""
    if not _is_large(left.T, right):
        return left.T @ right
    if right.shape[1] < left.shape[0]:
        # fewer numbers to turn in the outcome than in `left`
        return _onednn(right.T, left).T.contiguous()
    return _onednn(left.T, right)


def _onednn(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    # oneDNN multiplies a `right` with gaps between its rows by its reference loops, a thousand times more slowly
    return _by_onednn(left, right.contiguous().T, None, "none", [], "")


def _is_large(left: torch.Tensor, right: torch.Tensor) -> bool:
    return (
        _by_onednn is not None
        and left.device.type == "cpu"
        and left.dtype == right.dtype == torch.float32
        and left.numel() * right.shape[1] >= LARGE
        and not torch.compiler.is_compiling()
    )

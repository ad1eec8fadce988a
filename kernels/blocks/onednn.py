"""What a CPU runs fastest: oneDNN's products and convolutions with what follows them inside.

torch's own operators leave a pass to each: in float32 the residual, in bfloat16 the bias too, and
GELU after a convolution. In float32 torch takes MKL's products: with the shapes of B0 to B5, on one
core of an AMD EPYC with AVX512, oneDNN gave 95 to 108 GFLOP/s where MKL gave 74 to 99.

The operators are those that torch's own compiler emits. They know neither gradients nor autocast,
readers of graphs may not know them, and torch's counter of FLOPs does not: there aten's run.
"""

import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from .activations import ACTIVATIONS
from .row_counts import row_count, with_rows

_NAMES = ("_linear_pointwise", "_convolution_pointwise")
_CAPABILITY = torch.backends.cpu.get_cpu_capability()
_AVX512 = _CAPABILITY.startswith("AVX512")
_FAST = (
    torch.backends.mkldnn.is_available()
    and all(hasattr(torch.ops.mkldnn, name) for name in _NAMES)
    and _CAPABILITY.startswith("AVX")  # on other processors nothing was measured
)
# ONEDNN_MAX_CPU_ISA can leave it less than the CPU has: in bfloat16 it then raises.
_BFLOAT16 = _FAST and _AVX512 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
# Of a weight. With AVX2 alone MKL is as fast or faster (up to 1.2 times on one core of one EPYC,
# 0.8 to 1 on another); but it copies the weight at each call, and 67 million values are too many.
_FEWEST_VALUES = 0 if _AVX512 else 1 << 25
# Rows of `x`. A call of oneDNN takes 17 us before it computes anything; on one core of a Xeon with
# AVX512 MKL was 1.1 to 6 times as fast up to 256 rows, and from 512 on the two are even.
_FEWEST_ROWS = 512
# In bfloat16 oneDNN it is in any case, but for a row or so; without a pass for the bias products
# took 0.6 to 0.9 of the time on one core of a Xeon with AMX.
_FEWEST_ROWS_HALF = 16
# Others, fake tensors among them, have rules for aten's operators alone.
_PLAIN = (torch.Tensor, torch.nn.Parameter)


def add_residual(branch: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """`x + branch`, in the memory of `branch` where it can hold the sum.

    Under autocast a branch may be in half precision beside tokens in float32, which stay so.
    """
    return branch.add_(x) if branch.dtype == x.dtype else x + branch


def dense(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`F.linear`: (..., K) -> (..., N)."""
    if not _multiplies(x, weight, bias):
        return F.linear(x, weight, bias)
    multiply = torch.ops.mkldnn._linear_pointwise
    rows = x.numel() // weight.shape[1]
    count = row_count(rows, weight.shape, x.dtype)
    if count == rows:
        return multiply(x, weight, bias, "none", [], "")
    padded = with_rows(x.reshape(rows, -1), count)
    result = multiply(padded, weight, bias, "none", [], "")
    return result[:rows].view(*x.shape[:-1], len(weight))


def dense_residual(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor
) -> torch.Tensor:
    """`residual + F.linear(x, weight, bias)`, of the shape of `residual` (..., N)."""
    if not _multiplies(x, weight, bias, residual):
        return add_residual(F.linear(x, weight, bias), residual)
    multiply = torch.ops.mkldnn._linear_pointwise.binary
    rows = x.numel() // weight.shape[1]
    count = row_count(rows, weight.shape, x.dtype, "residual")
    if count == rows:
        return multiply(x, residual, weight, bias, "add")
    padded, sums = (with_rows(part.reshape(rows, -1), count) for part in (x, residual))
    result = multiply(padded, sums, weight, bias, "add")
    return result[:rows].view(residual.shape)


def relu_of_sum_(
    residual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """`relu(residual + F.linear(x, weight, bias))`, of (B, H, W, N), in the memory of `residual`.

    It is returned too, and is new where dtypes differ or rows are padded. As a convolution of
    1 x 1, which knows all three, it took 0.4 to 0.9 of the time of a product with the residual,
    then the maximum.
    """
    # With one channel, or in other layouts, it is not what torch takes to be channels-last memory.
    # Asked last: in a graph for any size answers would bind it.
    if (
        _multiplies(x, weight, bias, residual)
        and residual.is_contiguous()
        and residual.numel()
        and weight.shape[1] > 1
    ):
        rows = x.numel() // weight.shape[1]
        if row_count(rows, weight.shape, x.dtype, "residual") != rows:
            return dense_residual(x, weight, bias, residual).relu_()
        # A column of all rows: in bfloat16 0.76 to 1 of the time of a map of (H, W).
        sums, column = (part.reshape(1, rows, 1, -1).permute(0, 3, 1, 2) for part in (residual, x))
        in_place = torch.ops.mkldnn._convolution_pointwise_.binary
        filters = weight[:, :, None, None]
        padding, ones = [0, 0], [1, 1]
        in_place(*(sums, column, filters, bias, padding, ones, ones, 1, "add", 1.0, "relu", [], ""))
        return residual
    return add_residual(F.linear(x, weight, bias), residual).relu_()


def normalize(x: torch.Tensor, eps: float) -> torch.Tensor:
    """LayerNorm over the last dimension without an affine part."""
    shape = x.shape[-1:]
    if x.dtype == torch.float32 and plain_on_cpu(x):
        # torch's loop for an affine part is the one with vectors: 0.57 of the time.
        return F.layer_norm(x, shape, x.new_ones(shape), x.new_zeros(shape), eps)
    return F.layer_norm(x, shape, eps=eps)


def depthwise_activated(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    activation: str,
    rows: slice = slice(None),
) -> torch.Tensor:
    """Depthwise convolution of 3x3 with a padding of 1, then `ACTIVATIONS[activation]`.

    Args:
        hidden: (B, H, W, E).
        weight, bias: (E, 1, 3, 3), (E,).
        rows: of the result that are wanted.

    Returns:
        (B, rows, W, E).
    """
    feature_map, ones = hidden.permute(0, 3, 1, 2), [1, 1]
    if (
        activation == "gelu"
        and plain_on_cpu(hidden, weight, bias)
        and bias.is_contiguous()
        and hidden.numel()
    ):
        # Convolution and GELU took 0.55 to 0.65 of the time of the two, in either dtype.
        activated = torch.ops.mkldnn._convolution_pointwise(
            *(feature_map, weight, bias, ones, ones, ones, len(weight), "gelu", [], "none")
        )
        return activated[:, :, rows].permute(0, 2, 3, 1)
    convolved = F.conv2d(feature_map, weight, bias, padding=1, groups=len(weight))
    return ACTIVATIONS[activation](convolved[:, :, rows].permute(0, 2, 3, 1))


def _multiplies(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None = None,
) -> bool:
    """Return whether oneDNN's product of these may run here and now, and pays."""
    # First: what follows cannot be asked in a graph.
    if not _FAST or torch.compiler.is_compiling():
        return False
    is_float = x.dtype == torch.float32
    rows = _FEWEST_ROWS if is_float else _FEWEST_ROWS_HALF
    if x.numel() < rows * weight.shape[1]:
        return False
    if weight.numel() < _FEWEST_VALUES and is_float:
        return False
    # oneDNN is slow with a slice of a weight's columns, and wrong with a slice of a bias.
    if not weight.is_contiguous() or not (bias is None or bias.is_contiguous()):
        return False
    return plain_on_cpu(x, weight, bias, residual)


def plain_on_cpu(*tensors: torch.Tensor | None) -> bool:
    """Return whether these may go to operators that know nothing but values on a CPU.

    They are in float32 or, with AVX512, in bfloat16, and nobody asks for gradients, tangents, a
    transform, a graph, or a count of FLOPs.
    """
    # First: what follows cannot be asked in a graph.
    if not _FAST or torch.compiler.is_compiling():
        return False
    dtype, with_gradients = None, torch.is_grad_enabled()
    for tensor in tensors:
        if tensor is None:
            continue
        dtype = dtype or tensor.dtype
        if tensor.dtype != dtype or not tensor.is_cpu or type(tensor) not in _PLAIN:
            return False
        if with_gradients and tensor.requires_grad:
            return False
    return (
        (dtype == torch.float32 or (dtype == torch.bfloat16 and _BFLOAT16))
        and not torch.is_autocast_enabled("cpu")
        and forward_ad._current_level < 0
        and torch._C._functorch.maybe_current_level() is None
        and not (torch._C._len_torch_dispatch_stack() and _counts_flops())
        and not torch.jit.is_tracing()
        and bool(torch.backends.mkldnn.enabled)
    )


def _counts_flops() -> bool:
    modes = _get_current_dispatch_mode_stack()
    return any(type(mode).__module__ == "torch.utils.flop_counter" for mode in modes)

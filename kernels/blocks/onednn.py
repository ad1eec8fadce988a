"""Matrix products of a CPU in float32, by oneDNN and with the residual inside.

torch takes MKL's for them. With the shapes of B0 to B5, on one core of an AMD EPYC with AVX512,
oneDNN gave 95 to 108 GFLOP/s where MKL gave 74 to 99; and the residual costs no pass of its own.

The operators are those that torch's own compiler emits. They know neither gradients nor autocast,
readers of graphs may not know them, and torch's counter of FLOPs does not: there aten's run.
"""

import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from ..core.checks import autocasts

_FAST = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
# Of a weight. With AVX2 alone MKL is as fast or faster (up to 1.2 times on one core of one EPYC,
# 0.8 to 1 on another); but it copies the weight at each call, and 67 million values are too many.
_FEWEST_VALUES = 0 if torch.backends.cpu.get_cpu_capability().startswith("AVX512") else 1 << 25
# Rows of `x`. A call of oneDNN takes 17 us before it computes anything; on one core of a Xeon with
# AVX512 MKL was 1.1 to 6 times as fast up to 256 rows, and from 512 on the two are even.
_FEWEST_ROWS = 512
# Others, fake tensors among them, have rules for aten's operators alone.
_PLAIN = (torch.Tensor, torch.nn.Parameter)


def add_residual(branch: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """`x + branch`, in the memory of `branch` where it can hold the sum.

    Under autocast a branch may be in half precision beside tokens in float32, which stay so.
    """
    return branch.add_(x) if branch.dtype == x.dtype else x + branch


def dense(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`F.linear`: (..., K) -> (..., N)."""
    if _runs(x, weight, bias):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def dense_residual(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor
) -> torch.Tensor:
    """`residual + F.linear(x, weight, bias)`, of the shape of `residual` (..., N)."""
    if _runs(x, weight, bias, residual):
        binary = torch.ops.mkldnn._linear_pointwise.binary
        return binary(x, residual, weight, bias, "add")
    return add_residual(F.linear(x, weight, bias), residual)


def _runs(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None = None,
) -> bool:
    """Return whether oneDNN's operators may run on these here and now."""
    # First: what follows cannot be asked in a graph.
    if not _FAST or torch.compiler.is_compiling():
        return False
    if x.numel() < _FEWEST_ROWS * weight.shape[1] or weight.numel() < _FEWEST_VALUES:
        return False
    present = [tensor for tensor in (x, weight, bias, residual) if tensor is not None]
    for tensor in present:
        if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
            return False
        if type(tensor) not in _PLAIN:
            return False
    # oneDNN is slow with a slice of a weight's columns, and wrong with a slice of a bias.
    if not weight.is_contiguous() or not (bias is None or bias.is_contiguous()):
        return False
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in present):
        return False
    return not (
        autocasts(x.device)
        or forward_ad._current_level >= 0
        or torch._C._functorch.maybe_current_level() is not None
        or _counts_flops()
        or torch.jit.is_tracing()
        or not torch.backends.mkldnn.enabled
    )


def _counts_flops() -> bool:
    modes = _get_current_dispatch_mode_stack()
    return any(type(mode).__module__ == "torch.utils.flop_counter" for mode in modes)

"""LayerNorm over channels, with or without a residual addition before it.

    y = (s - mean(s)) / sqrt(var(s) + eps) * weight + bias,  s = x  or  s = x + residual

One program normalises `BLOCK_M` rows, whole in registers and in float32: mean first, then the
variance of what is left, so rows far from zero keep their precision. With a residual the sum is
written too, as pre-norm blocks need both.
"""

import torch
import torch.nn.functional as F

from ..core.checks import check_parameter, common_reason
from ..core.configurations import look_up
from ..core.dispatch import use_triton
from ..core.launch import ceil_div, launch
from ..core.optional_triton import tl, triton
from ..core.registry import register

MAX_CHANNELS = 4096  # what a row may be to stay in registers


def eager(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> torch.Tensor:
    """The eager twin without a residual."""
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def eager_residual(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The eager twin with a residual: LayerNorm of the sum, and the sum."""
    total = x + residual
    return F.layer_norm(total, x.shape[-1:], weight, bias, eps), total


@triton.jit
def layer_norm_kernel(
    x_pointer,  # (rows, CHANNELS)
    residual_pointer,  # (rows, CHANNELS) or None
    weight_pointer,  # (CHANNELS,) or None
    bias_pointer,  # (CHANNELS,) or None
    output_pointer,  # (rows, CHANNELS)
    sum_pointer,  # (rows, CHANNELS), with a residual
    rows,
    eps,
    CHANNELS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = tl.arange(0, BLOCK_C)
    in_row = channel < CHANNELS
    mask = (row < rows)[:, None] & in_row[None, :]
    offset = row.to(tl.int64)[:, None] * CHANNELS + channel[None, :]
    x = tl.load(x_pointer + offset, mask=mask, other=0.0).to(tl.float32)
    if residual_pointer is not None:
        x += tl.load(residual_pointer + offset, mask=mask, other=0.0).to(tl.float32)
        # The normalised values are those of the sum as it is stored.
        rounded = x.to(sum_pointer.dtype.element_ty)
        tl.store(sum_pointer + offset, rounded, mask=mask)
        x = rounded.to(tl.float32)
    mean = tl.sum(x, 1) / CHANNELS
    centred = tl.where(in_row[None, :], x - mean[:, None], 0.0)
    variance = tl.sum(centred * centred, 1) / CHANNELS
    y = centred * tl.rsqrt(variance + eps)[:, None]
    if weight_pointer is not None:
        y *= tl.load(weight_pointer + channel, mask=in_row, other=0.0).to(tl.float32)[None, :]
    if bias_pointer is not None:
        y += tl.load(bias_pointer + channel, mask=in_row, other=0.0).to(tl.float32)[None, :]
    tl.store(output_pointer + offset, y.to(output_pointer.dtype.element_ty), mask=mask)


def _launch(x, residual, weight, bias, eps, output, total) -> None:
    channels = x.shape[-1]
    rows = x.numel() // channels
    if rows == 0:
        return
    weight = None if weight is None else weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    config = look_up("layer_norm", x.device, x.dtype, {"channels": channels, "rows": rows})
    launch(
        layer_norm_kernel,
        (ceil_div(rows, config["BLOCK_M"]),),
        *(x, residual, weight, bias, output, total, rows, eps),
        CHANNELS=channels,
        BLOCK_C=triton.next_power_of_2(channels),
        **config,
    )


def fused(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> torch.Tensor:
    """The kernel, without a residual."""
    x = x.contiguous()
    output = torch.empty_like(x)
    _launch(x, None, weight, bias, eps, output, None)
    return output


def fused_residual(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The kernel, with a residual."""
    x, residual = x.contiguous(), residual.contiguous()
    output, total = torch.empty_like(x), torch.empty_like(x)
    _launch(x, residual, weight, bias, eps, output, total)
    return output, total


register(
    "layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps) -> Tensor",
    fused,
    eager,
    lambda x, weight, bias, eps: torch.empty(x.shape, dtype=x.dtype, device=x.device),
)
register(
    "add_layer_norm(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps)"
    " -> (Tensor, Tensor)",
    fused_residual,
    eager_residual,
    lambda x, residual, weight, bias, eps: (
        torch.empty(x.shape, dtype=x.dtype, device=x.device),
        torch.empty(x.shape, dtype=x.dtype, device=x.device),
    ),
)


def supports(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
) -> str | None:
    """Reason why the kernel cannot take these arguments; None where it can."""
    if x.shape[-1] > MAX_CHANNELS:
        return f"{x.shape[-1]} channels are more than {MAX_CHANNELS}"
    return common_reason(x, weight, bias, residual)


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """LayerNorm of `x`, or of `x + residual`, over its last dimension.

    Statistics are computed in float32 (float64 for float64 input).

    Args:
        x: (..., C), floating.
        weight, bias: (C,), or None for ones and zeros.
        residual: of the shape and dtype of `x`.

    Returns:
        the normalised values (..., C), contiguous; with a residual also the sum.

    Raises:
        TypeError: `x` is not a floating tensor, or dtypes differ.
        ValueError: shapes or devices do not match, or there are no channels.
    """
    if not isinstance(x, torch.Tensor) or not x.is_floating_point():
        got = getattr(x, "dtype", type(x).__name__)
        raise TypeError(f"x: expected a floating-point tensor, got {got}")
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"x: expected shape (..., channels), got {tuple(x.shape)}")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None:
            check_parameter(name, parameter, (x.shape[-1],), x)
    if residual is not None:
        check_parameter("residual", residual, tuple(x.shape), x)
    triton_runs = use_triton("layer_norm", x.device, supports(x, weight, bias, residual))
    if residual is None:
        if triton_runs:
            return torch.ops.fastseg.layer_norm(x, weight, bias, eps)
        return eager(x, weight, bias, eps)
    if triton_runs:
        return torch.ops.fastseg.add_layer_norm(x, residual, weight, bias, eps)
    return eager_residual(x, residual, weight, bias, eps)

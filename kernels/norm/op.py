"""LayerNorm over channels.

    y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias

One program normalises `BLOCK_M` rows, whole in registers and in float32: mean first, then the
variance of what is left, so rows far from zero keep their precision.
"""

from typing import Any

import torch
import torch.nn.functional as F

from ..core.checks import check_parameter, common_reason
from ..core.configurations import Config, look_up, product
from ..core.launch import ceil_div, launch
from ..core.optional_triton import tl, triton
from ..core.registry import Op, register

MAX_CHANNELS = 4096  # what a row may be to stay in registers


def eager(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> torch.Tensor:
    """The eager twin."""
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


@triton.jit(do_not_specialize=["rows"])
def layer_norm_kernel(
    x_pointer,  # (rows, CHANNELS)
    weight_pointer,  # (CHANNELS,) or None
    bias_pointer,  # (CHANNELS,) or None
    output_pointer,  # (rows, CHANNELS)
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
    mean = tl.sum(x, 1) / CHANNELS
    centred = tl.where(in_row[None, :], x - mean[:, None], 0.0)
    variance = tl.sum(centred * centred, 1) / CHANNELS
    y = centred * tl.rsqrt(variance + eps)[:, None]
    if weight_pointer is not None:
        y *= tl.load(weight_pointer + channel, mask=in_row, other=0.0).to(tl.float32)[None, :]
    if bias_pointer is not None:
        y += tl.load(bias_pointer + channel, mask=in_row, other=0.0).to(tl.float32)[None, :]
    tl.store(output_pointer + offset, y.to(output_pointer.dtype.element_ty), mask=mask)


def fused(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> torch.Tensor:
    """The kernel."""
    x = x.contiguous()
    output = torch.empty_like(x)
    channels = x.shape[-1]
    rows = x.numel() // channels
    if rows == 0:
        return output
    weight = None if weight is None else weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    config = look_up("layer_norm", x.device, x.dtype, {"channels": channels, "rows": rows})
    launch(
        layer_norm_kernel,
        (ceil_div(rows, config["BLOCK_M"]),),
        *(x, weight, bias, output, rows, eps),
        CHANNELS=channels,
        BLOCK_C=triton.next_power_of_2(channels),
        **config,
    )
    return output


def supports(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> str | None:
    """Reason why the kernel cannot take these arguments; None where it can."""
    if x.shape[-1] > MAX_CHANNELS:
        return f"{x.shape[-1]} channels are more than {MAX_CHANNELS}"
    return common_reason(x, weight, bias)


def candidates(half: bool, sizes: dict[str, int]) -> list[Config]:
    """What the tuner tries."""
    return product(BLOCK_M=(1, 4, 16, 64), num_warps=(2, 4, 8))


def example(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    """Rows of 40 channels."""
    x, weight, bias = (torch.randn(n, 40, device=device).to(dtype) for n in (7, 1, 1))
    return x, weight[0], bias[0], 1e-6


OP = register(
    Op(
        name="layer_norm",
        inputs="Tensor x, Tensor? weight, Tensor? bias, float eps",
        eager=eager,
        fused=fused,
        fake=lambda x, weight, bias, eps: torch.empty(x.shape, dtype=x.dtype, device=x.device),
        supports=supports,
        example=example,
        candidates={"layer_norm": candidates},
        multiplies=False,
        whole=False,
    )
)


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    """LayerNorm of `x` over its last dimension.

    Statistics are computed in float32 (float64 for float64 input).

    Args:
        x: (..., C), floating.
        weight, bias: (C,), or None for ones and zeros.

    Returns:
        the normalised values (..., C), contiguous.

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
    return OP(x.device, x, weight, bias, eps)

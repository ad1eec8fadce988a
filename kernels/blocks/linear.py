"""The matrix product that several ops are built of: optional LayerNorm before, residual after.

    out = N(x) W^T + bias + residual,   N(x) = x  or  (x - mean) * rstd   per row

LayerNorm's affine part is inside W and bias. In half precision the raw tile goes to the tensor
cores, and the statistics are gathered on the way:

    N(x) W^T = rstd * (x W^T - mean * sum_k W[:, k])

where the sums are those of the rounded W, so the mean cancels to float32 precision; no row has to
fit in registers, and widths such as 160 and 320 need no padding. In float32, where the product
itself would lose what a large mean takes, the mean is subtracted first, from statistics of a pass
of their own.
"""

import torch

from ..core.configurations import Config, look_up, product
from ..core.launch import ceil_div, launch
from ..core.optional_triton import tl, triton
from .primitives import matmul_precision, row_moments, update_moments


@triton.jit(do_not_specialize=["rows"])
def linear_kernel(
    x_pointer,  # (rows, IN_FEATURES)
    weight_pointer,  # (OUT_FEATURES, IN_FEATURES)
    bias_pointer,  # (OUT_FEATURES,) or None
    weight_sum_pointer,  # (OUT_FEATURES,) float32, with NORM in half precision
    residual_pointer,  # (rows, OUT_FEATURES) or None
    output_pointer,  # (rows, OUT_FEATURES)
    rows,
    eps,
    IN_FEATURES: tl.constexpr,
    OUT_FEATURES: tl.constexpr,
    NORM: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    row_mask = row < rows
    column_mask = column < OUT_FEATURES
    x_pointers = x_pointer + row.to(tl.int64)[:, None] * IN_FEATURES + k[None, :]
    weight_pointers = weight_pointer + column[None, :] * IN_FEATURES + k[:, None]
    EXACT: tl.constexpr = x_pointer.dtype.element_ty == tl.float32
    if NORM:
        if EXACT:
            mean, rstd = row_moments(x_pointers, row_mask, eps, IN_FEATURES, BLOCK_M, BLOCK_K)
        else:
            mean = tl.zeros((BLOCK_M,), tl.float32)
            square_sum = tl.zeros((BLOCK_M,), tl.float32)

    product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in range(0, IN_FEATURES, BLOCK_K):
        x = tl.load(x_pointers + k0, mask=row_mask[:, None], other=0.0)
        if OUT_FEATURES % BLOCK_N == 0:
            weight = tl.load(weight_pointers + k0)
        else:
            weight = tl.load(weight_pointers + k0, mask=column_mask[None, :], other=0.0)
        if NORM:
            if EXACT:
                x -= mean[:, None]
            else:
                mean, square_sum = update_moments(mean, square_sum, k0, x.to(tl.float32), BLOCK_K)
        product = tl.dot(x, weight, product, input_precision=PRECISION)

    if NORM:
        if EXACT:
            product *= rstd[:, None]
        else:
            rstd = tl.rsqrt(square_sum / IN_FEATURES + eps)
            weight_sum = tl.load(weight_sum_pointer + column, mask=column_mask, other=0.0)
            product = rstd[:, None] * (product - mean[:, None] * weight_sum[None, :])
    if bias_pointer is not None:
        bias = tl.load(bias_pointer + column, mask=column_mask, other=0.0)
        product += bias.to(tl.float32)[None, :]
    mask = row_mask[:, None] & column_mask[None, :]
    offset = row.to(tl.int64)[:, None] * OUT_FEATURES + column[None, :]
    if residual_pointer is not None:
        product += tl.load(residual_pointer + offset, mask=mask, other=0.0).to(tl.float32)
    tl.store(output_pointer + offset, product.to(output_pointer.dtype.element_ty), mask=mask)


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    eps: float | None = None,
    weight_sum: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Launch the kernel: (..., K) -> (..., N). A building block of the launchers, not an op.

    Args:
        x: (..., K), contiguous, K a multiple of 32.
        weight: (N, K), contiguous.
        eps: of a LayerNorm of the rows of `x`; None for none.
        weight_sum: (N,) float32, the row sums of `weight`; with `eps` in half precision.
        residual: (..., N), contiguous, added at the end.
    """
    out_features, in_features = weight.shape
    output = x.new_empty(*x.shape[:-1], out_features)
    rows = x.numel() // in_features
    config = look_up(
        "linear",
        x.device,
        x.dtype,
        {"rows": rows, "in_features": in_features, "out_features": out_features},
        divides={"BLOCK_K": in_features},
    )
    launch(
        linear_kernel,
        (ceil_div(rows, config["BLOCK_M"]), ceil_div(out_features, config["BLOCK_N"])),
        *(x, weight, bias, weight_sum, residual, output, rows, 0.0 if eps is None else eps),
        IN_FEATURES=in_features,
        OUT_FEATURES=out_features,
        NORM=eps is not None,
        PRECISION=matmul_precision(x.dtype),
        **config,
    )
    return output


def linear_candidates(half: bool, sizes: dict[str, int]) -> list[Config]:
    """What the tuner tries for a matrix product."""
    if not half:
        return product(
            BLOCK_M=(32, 64), BLOCK_N=(32, 64), BLOCK_K=(32,), num_warps=(4, 8), num_stages=(2, 3)
        )
    small = product(
        BLOCK_M=(64,), BLOCK_N=(32, 64, 128), BLOCK_K=(32, 64), num_warps=(4,), num_stages=(3, 4)
    )
    large = product(
        BLOCK_M=(128,), BLOCK_N=(64, 128), BLOCK_K=(32, 64), num_warps=(4, 8), num_stages=(3,)
    )
    return small + large

"""Device functions that several kernels share, and what launchers need to know of a dtype."""

import torch

from ..core.optional_triton import tl, triton

# For kernels alone. With triton 3.6 a kernel's key in the cache depends on whether the functions
# that it calls were used before it, if these have globals: so they have none.
LOG2_E = tl.constexpr(1.4426950408889634)


def matmul_precision(dtype: torch.dtype) -> str:
    """`input_precision` of `tl.dot`: IEEE float32 unless torch is told that less will do."""
    if dtype != torch.float32:
        return "ieee"
    # The one setting that torch's older ways of asking for TF32 set too; absent before torch 2.9.
    precision = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    return "tf32" if precision == "tf32" else "ieee"


@triton.jit
def update_moments(mean, square_sum, count, tile, WIDTH: tl.constexpr):
    """Take `WIDTH` further columns into the mean and the sum of squared deviations of rows.

    Chan's formula: unlike E[x^2] - E[x]^2 it keeps its precision where the mean is far from 0.

    Args:
        mean, square_sum: (BLOCK_M,) float32, of the first `count` columns.
        tile: (BLOCK_M, WIDTH) float32.
    """
    tile_mean = tl.sum(tile, 1) / WIDTH
    deviation = tile - tile_mean[:, None]
    delta = tile_mean - mean
    total = count + WIDTH
    square_sum += tl.sum(deviation * deviation, 1) + delta * delta * (count * (WIDTH / total))
    return mean + delta * (WIDTH / total), square_sum


@triton.jit
def row_moments(
    pointers, row_mask, eps, CHANNELS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Mean and 1 / std of rows, in a pass of their own.

    Args:
        pointers: (BLOCK_M, BLOCK_K), to the first `BLOCK_K` channels of each row.
        row_mask: (BLOCK_M,); rows outside it give mean 0.
    """
    mean = tl.zeros((BLOCK_M,), tl.float32)
    square_sum = tl.zeros((BLOCK_M,), tl.float32)
    for k0 in range(0, CHANNELS, BLOCK_K):
        tile = tl.load(pointers + k0, mask=row_mask[:, None], other=0.0).to(tl.float32)
        mean, square_sum = update_moments(mean, square_sum, k0, tile, BLOCK_K)
    return mean, tl.rsqrt(square_sum / CHANNELS + eps)


@triton.jit
def normalize_rows(rows, eps, CHANNELS: tl.constexpr):
    """Whole rows less their mean, over their standard deviation: (BLOCK_M, CHANNELS) float32."""
    centred = rows - (tl.sum(rows, 1) / CHANNELS)[:, None]
    return centred * tl.rsqrt(tl.sum(centred * centred, 1) / CHANNELS + eps)[:, None]

"""Keys and values of the reduced grid: LayerNorm, convolution, LayerNorm, linear.

    y_m = sum_t N(x[token(m, t)]) Wsr_t^T + b        t over the R * R taps of the convolution
    [K | V]_m = N(y_m) Wkv^T,   offset_m = log2(e) N(y_m) . w      the offset with one head only

N is LayerNorm without its affine part. The first product has few rows (256 for a picture of 512x512
pixels, in every stage) and a long sum, so programs share out the taps and write float32 partial
sums. There are two ways to add them up, both in the order of the taps, so with the same bits every
time:

- `sr_key_value_kernel`: the program that arrives last at its rows does it, and all that follows.
  One launch, for widths whose rows and weights of a tap are one tile.
- `sr_partials_kernel`, then the kernel of key_value.py, which shares out the columns of [K | V].
"""

from typing import Any

import torch

from ..blocks.primitives import (
    LOG2_E,
    matmul_precision,
    normalize_rows,
    row_moments,
    update_moments,
)
from ..core.configurations import look_up
from ..core.launch import ceil_div, launch
from ..core.optional_triton import tl, triton
from ..core.semaphores import semaphores
from .key_value import empty_key_value, project_key_value


@triton.jit
def first_tokens(
    row,
    tokens,
    width,
    reduced_tokens,
    reduced_width,
    CHANNELS: tl.constexpr,
    SR_RATIO: tl.constexpr,
):
    """Offsets in x of the upper left token of each reduced token's patch, int64.

    Args:
        row: (BLOCK_M,), index of the reduced token in the batch.
        tokens, reduced_tokens: of one image.
    """
    batch = row // reduced_tokens
    position = row % reduced_tokens
    y = position // reduced_width * SR_RATIO
    x = position % reduced_width * SR_RATIO
    return (batch.to(tl.int64) * tokens + y * width + x) * CHANNELS


@triton.jit
def convolve_rows(
    x_pointers,  # (BLOCK_M, CHANNELS), to the first token of each patch
    weight_pointers,  # (CHANNELS, BLOCK_N), to tap 0
    row_mask,  # (BLOCK_M,)
    first_tap,
    width,
    eps,
    CHANNELS: tl.constexpr,
    SR_RATIO: tl.constexpr,
    TAPS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Sum over `TAPS` taps; rows are whole tiles, normalised before the product."""
    product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for index in range(TAPS):
        tap = first_tap + index
        mask = row_mask
        if SR_RATIO * SR_RATIO % TAPS != 0:  # the last program has fewer: rows of zeros add nothing
            mask = tl.where(tap < SR_RATIO * SR_RATIO, row_mask, False)
            tap = tl.minimum(tap, SR_RATIO * SR_RATIO - 1)
        token = tap // SR_RATIO * width + tap % SR_RATIO
        x = tl.load(x_pointers + token * CHANNELS, mask=mask[:, None], other=0.0)
        weight = tl.load(weight_pointers + tap * CHANNELS)
        normalized = normalize_rows(x.to(tl.float32), eps, CHANNELS)
        if SR_RATIO * SR_RATIO % TAPS != 0:  # with eps 0 a row of zeros is NaN
            normalized = tl.where(mask[:, None], normalized, 0.0)
        product = tl.dot(normalized.to(x.dtype), weight, product, input_precision=PRECISION)
    return product


@triton.jit
def convolve_chunks(
    x_pointers,  # (BLOCK_M, BLOCK_K), to the first token of each patch
    weight_pointers,  # (BLOCK_K, BLOCK_N), to tap 0
    weight_sum_pointer,  # (SR_RATIO * SR_RATIO, CHANNELS) float32, in half precision
    column,  # (BLOCK_N,)
    row_mask,  # (BLOCK_M,)
    first_tap,
    width,
    eps,
    CHANNELS: tl.constexpr,
    SR_RATIO: tl.constexpr,
    TAPS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Sum over `TAPS` taps; rows come in chunks, and the mean is taken off as in linear.py."""
    EXACT: tl.constexpr = x_pointers.dtype.element_ty == tl.float32
    product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for index in range(TAPS):
        tap = first_tap + index
        mask = row_mask
        if SR_RATIO * SR_RATIO % TAPS != 0:
            mask = tl.where(tap < SR_RATIO * SR_RATIO, row_mask, False)
            tap = tl.minimum(tap, SR_RATIO * SR_RATIO - 1)
        token_pointers = x_pointers + (tap // SR_RATIO * width + tap % SR_RATIO) * CHANNELS
        tap_pointers = weight_pointers + tap * CHANNELS
        if EXACT:
            mean, rstd = row_moments(token_pointers, mask, eps, CHANNELS, BLOCK_M, BLOCK_K)
        else:
            mean = tl.zeros((BLOCK_M,), tl.float32)
            square_sum = tl.zeros((BLOCK_M,), tl.float32)
        of_tap = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k0 in range(0, CHANNELS, BLOCK_K):
            x = tl.load(token_pointers + k0, mask=mask[:, None], other=0.0)
            weight = tl.load(tap_pointers + k0)
            if EXACT:
                x -= mean[:, None]
            else:
                mean, square_sum = update_moments(mean, square_sum, k0, x.to(tl.float32), BLOCK_K)
            of_tap = tl.dot(x, weight, of_tap, input_precision=PRECISION)
        if not EXACT:
            rstd = tl.rsqrt(square_sum / CHANNELS + eps)
            weight_sum = tl.load(weight_sum_pointer + tap * CHANNELS + column)
            of_tap -= mean[:, None] * weight_sum[None, :]
        if SR_RATIO * SR_RATIO % TAPS != 0:  # with eps 0 this is infinite for rows of zeros
            rstd = tl.where(mask, rstd, 0.0)
        product += rstd[:, None] * of_tap
    return product


@triton.jit(do_not_specialize=["rows", "tokens", "width", "reduced_tokens", "reduced_width"])
def sr_key_value_kernel(
    x_pointer,  # (batch, tokens, CHANNELS)
    weight_pointer,  # (CHANNELS, SR_RATIO * SR_RATIO * CHANNELS)
    bias_pointer,  # (CHANNELS,)
    key_value_weight_pointer,  # (2 * CHANNELS, CHANNELS)
    key_offset_weight_pointer,  # (CHANNELS,) or None
    key_value_pointer,  # (rows, 2 * CHANNELS)
    key_offset_pointer,  # (rows,) float32 or None
    partials_pointer,  # (SPLITS, rows, CHANNELS) float32, or None for one split
    semaphore_pointer,  # (row tiles,) int32 zeros, left so; or None
    rows,  # batch * reduced_tokens
    tokens,
    width,
    reduced_tokens,
    reduced_width,
    eps,
    sr_eps,
    CHANNELS: tl.constexpr,
    SR_RATIO: tl.constexpr,
    SPLITS: tl.constexpr,
    TAPS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    row_tile = tl.program_id(0)
    split = tl.program_id(1)
    row = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = row < rows
    channel = tl.arange(0, CHANNELS)
    offset = first_tokens(row, tokens, width, reduced_tokens, reduced_width, CHANNELS, SR_RATIO)
    y = convolve_rows(
        x_pointer + offset[:, None] + channel[None, :],
        weight_pointer + channel[None, :] * (SR_RATIO * SR_RATIO * CHANNELS) + channel[:, None],
        row_mask,
        split * TAPS,
        width,
        eps,
        CHANNELS,
        SR_RATIO,
        TAPS,
        PRECISION,
        BLOCK_M,
        CHANNELS,
    )
    last = True
    if SPLITS > 1:
        offset = row.to(tl.int64)[:, None] * CHANNELS + channel[None, :]
        stride = tl.cast(rows, tl.int64) * CHANNELS
        tl.store(partials_pointer + split * stride + offset, y, mask=row_mask[:, None])
        # All threads' stores come before the release, all threads' loads after the acquire.
        tl.debug_barrier()
        arrived = tl.atomic_add(semaphore_pointer + row_tile, 1, sem="acq_rel")
        last = arrived == SPLITS - 1
    if last:
        if SPLITS > 1:
            y = tl.zeros((BLOCK_M, CHANNELS), tl.float32)
            for part in range(SPLITS):
                # From L2: this multiprocessor's L1 knows nothing of what others wrote.
                y += tl.load(
                    partials_pointer + part * stride + offset,
                    mask=row_mask[:, None],
                    other=0.0,
                    cache_modifier=".cg",
                )
            tl.store(semaphore_pointer + row_tile, 0)
        y = normalize_rows(y + tl.load(bias_pointer + channel).to(tl.float32), sr_eps, CHANNELS)
        if key_offset_pointer is not None:
            key_offset_weight = tl.load(key_offset_weight_pointer + channel).to(tl.float32)
            key_offset = tl.sum(y * key_offset_weight[None, :], 1) * LOG2_E
            tl.store(key_offset_pointer + row, key_offset, mask=row_mask)
        normalized = y.to(x_pointer.dtype.element_ty)
        for column0 in range(0, 2 * CHANNELS, CHANNELS):
            column = column0 + channel
            weight = tl.load(
                key_value_weight_pointer + column[None, :] * CHANNELS + channel[:, None]
            )
            product = tl.dot(normalized, weight, input_precision=PRECISION)
            tl.store(
                key_value_pointer + row.to(tl.int64)[:, None] * (2 * CHANNELS) + column[None, :],
                product.to(key_value_pointer.dtype.element_ty),
                mask=row_mask[:, None],
            )


@triton.jit(do_not_specialize=["rows", "tokens", "width", "reduced_tokens", "reduced_width"])
def sr_partials_kernel(
    x_pointer,  # (batch, tokens, CHANNELS)
    weight_pointer,  # (CHANNELS, SR_RATIO * SR_RATIO * CHANNELS)
    weight_sum_pointer,  # (SR_RATIO * SR_RATIO, CHANNELS) float32, or None with rows in one tile
    partials_pointer,  # (splits, rows, CHANNELS) float32
    rows,  # batch * reduced_tokens
    tokens,
    width,
    reduced_tokens,
    reduced_width,
    eps,
    CHANNELS: tl.constexpr,
    SR_RATIO: tl.constexpr,
    TAPS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(2)
    row_mask = row < rows
    k = tl.arange(0, BLOCK_K)
    offset = first_tokens(row, tokens, width, reduced_tokens, reduced_width, CHANNELS, SR_RATIO)
    x_pointers = x_pointer + offset[:, None] + k[None, :]
    weight_pointers = (
        weight_pointer + column[None, :] * (SR_RATIO * SR_RATIO * CHANNELS) + k[:, None]
    )
    if BLOCK_K == CHANNELS:
        product = convolve_rows(
            x_pointers,
            weight_pointers,
            row_mask,
            split * TAPS,
            width,
            eps,
            CHANNELS,
            SR_RATIO,
            TAPS,
            PRECISION,
            BLOCK_M,
            BLOCK_N,
        )
    else:
        product = convolve_chunks(
            x_pointers,
            weight_pointers,
            weight_sum_pointer,
            column,
            row_mask,
            split * TAPS,
            width,
            eps,
            CHANNELS,
            SR_RATIO,
            TAPS,
            PRECISION,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
        )
    offset = (split * rows + row).to(tl.int64)[:, None] * CHANNELS + column[None, :]
    tl.store(partials_pointer + offset, product, mask=row_mask[:, None])


def _shares(taps: int, splits: int) -> tuple[int, int]:
    """Taps of a program and how many programs that takes, where `splits` are wished for."""
    each = ceil_div(taps, splits)
    return each, ceil_div(taps, each)


def one_launch(
    x: torch.Tensor, height: int, width: int, weights: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Keys and values (B, M, 2 C) and, with its weight, the score offset (B, M) float32 of a key.

    C is a power of two, 128 at most; `sr_weight_sum` is not needed.

    Args:
        weights: `SrAttentionWeights`, contiguous, of an sr_ratio of more than 1.
    """
    batch, tokens, channels = x.shape
    sr_ratio, key_offset_weight = weights.sr_ratio, weights.key_offset_weight
    reduced_width = width // sr_ratio
    reduced_tokens = height // sr_ratio * reduced_width
    rows = batch * reduced_tokens
    config = look_up("sr_key_value", x.device, x.dtype, {"channels": channels, "rows": rows})
    taps, splits = _shares(sr_ratio * sr_ratio, config.pop("SPLITS"))
    row_tiles = ceil_div(rows, config["BLOCK_M"])
    key_value, key_offset = empty_key_value(x, reduced_tokens, key_offset_weight)
    partials = semaphore = None
    if splits > 1:
        partials = x.new_empty(splits, rows, channels, dtype=torch.float32)
        semaphore = semaphores(row_tiles, x.device)
    launch(
        sr_key_value_kernel,
        (row_tiles, splits),
        *(x, weights.sr_weight, weights.sr_bias, weights.key_value_weight, key_offset_weight),
        *(key_value, key_offset, partials, semaphore),
        *(rows, tokens, width, reduced_tokens, reduced_width, weights.eps, weights.sr_eps),
        CHANNELS=channels,
        SR_RATIO=sr_ratio,
        SPLITS=splits,
        TAPS=taps,
        PRECISION=matmul_precision(x.dtype),
        **config,
    )
    return key_value, key_offset


def split(
    x: torch.Tensor, height: int, width: int, weights: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Reduce as `one_launch` does, in two launches and for any C that is a multiple of 32.

    `sr_weight_sum` is made here where it is needed and None.
    """
    batch, tokens, channels = x.shape
    sr_ratio, key_offset_weight = weights.sr_ratio, weights.key_offset_weight
    sr_weight_sum = weights.sr_weight_sum
    reduced_width = width // sr_ratio
    reduced_tokens = height // sr_ratio * reduced_width
    rows = batch * reduced_tokens
    config = look_up(
        "sr_partials",
        x.device,
        x.dtype,
        {"channels": channels, "rows": rows},
        divides={"BLOCK_N": channels, "BLOCK_K": channels},
    )
    taps, splits = _shares(sr_ratio * sr_ratio, config.pop("SPLITS"))
    if config["BLOCK_K"] < channels and x.dtype != torch.float32 and sr_weight_sum is None:
        by_tap = weights.sr_weight.unflatten(1, (sr_ratio * sr_ratio, -1))
        sr_weight_sum = by_tap.sum(2, dtype=torch.float32).t().contiguous()
    partials = x.new_empty(splits, rows, channels, dtype=torch.float32)
    launch(
        sr_partials_kernel,
        (ceil_div(rows, config["BLOCK_M"]), channels // config["BLOCK_N"], splits),
        *(x, weights.sr_weight, sr_weight_sum, partials),
        *(rows, tokens, width, reduced_tokens, reduced_width, weights.eps),
        CHANNELS=channels,
        SR_RATIO=sr_ratio,
        TAPS=taps,
        PRECISION=matmul_precision(x.dtype),
        **config,
    )
    key_value, key_offset = empty_key_value(x, reduced_tokens, key_offset_weight)
    matrices = (weights.key_value_weight, key_offset_weight)
    project_key_value(partials, weights.sr_bias, weights.sr_eps, *matrices, key_value, key_offset)
    return key_value, key_offset

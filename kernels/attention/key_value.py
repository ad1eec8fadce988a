"""LayerNorm and the linear map to keys and values, of rows that may come as partial sums.

    y = sum_s partials_s + b,   [K | V] = N(y) W^T,   offset = log2(e) N(y) . w    (one head only)

N is LayerNorm without its affine part. Every program adds up the rows it needs, in the order of the
parts, and makes some columns of [K | V]. Rows stay in registers as a tuple of chunks, since their
width need be no power of two: the mean is known before anything is rounded. Without a reduction
the tokens themselves are the one part.
"""

import torch

from ..blocks.primitives import LOG2_E, matmul_precision
from ..core.configurations import look_up
from ..core.launch import ceil_div, launch
from ..core.optional_triton import tl, triton


@triton.jit(do_not_specialize=["rows"])
def key_value_kernel(
    partials_pointer,  # (SPLITS, rows, CHANNELS)
    bias_pointer,  # (CHANNELS,) or None
    weight_pointer,  # (2 * CHANNELS, CHANNELS)
    key_offset_weight_pointer,  # (CHANNELS,) or None
    key_value_pointer,  # (rows, 2 * CHANNELS)
    key_offset_pointer,  # (rows,) float32 or None
    rows,
    eps,
    CHANNELS: tl.constexpr,
    SPLITS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
):
    CHUNKS: tl.constexpr = CHANNELS // CHUNK
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = row < rows
    k = tl.arange(0, CHUNK)
    pointers = partials_pointer + row.to(tl.int64)[:, None] * CHANNELS + k[None, :]
    stride = tl.cast(rows, tl.int64) * CHANNELS
    y = ()
    mean = tl.zeros((BLOCK_M,), tl.float32)
    for chunk in tl.static_range(CHUNKS):
        total = tl.zeros((BLOCK_M, CHUNK), tl.float32)
        for part in range(SPLITS):
            total += tl.load(
                pointers + part * stride + chunk * CHUNK, mask=row_mask[:, None], other=0.0
            ).to(tl.float32)
        if bias_pointer is not None:
            total += tl.load(bias_pointer + chunk * CHUNK + k).to(tl.float32)[None, :]
        mean += tl.sum(total, 1) / CHANNELS
        y = y + (total,)  # noqa: RUF005
    square_sum = tl.zeros((BLOCK_M,), tl.float32)
    for chunk in tl.static_range(CHUNKS):
        centred = y[chunk] - mean[:, None]
        square_sum += tl.sum(centred * centred, 1)
    rstd = tl.rsqrt(square_sum / CHANNELS + eps)

    product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    key_offset = tl.zeros((BLOCK_M,), tl.float32)
    for chunk in tl.static_range(CHUNKS):
        normalized = (y[chunk] - mean[:, None]) * rstd[:, None]
        if key_offset_pointer is not None:
            key_offset_weight = tl.load(key_offset_weight_pointer + chunk * CHUNK + k)
            key_offset += tl.sum(normalized * key_offset_weight.to(tl.float32)[None, :], 1)
        weight = tl.load(weight_pointer + column[None, :] * CHANNELS + chunk * CHUNK + k[:, None])
        product = tl.dot(normalized.to(weight.dtype), weight, product, input_precision=PRECISION)
    offset = row.to(tl.int64)[:, None] * (2 * CHANNELS) + column[None, :]
    product = product.to(key_value_pointer.dtype.element_ty)
    tl.store(key_value_pointer + offset, product, mask=row_mask[:, None])
    if key_offset_pointer is not None:  # noqa: SIM102 (known when it is compiled)
        if tl.program_id(1) == 0:
            tl.store(key_offset_pointer + row, key_offset * LOG2_E, mask=row_mask)


def empty_key_value(
    x: torch.Tensor, reduced_tokens: int, key_offset_weight: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Keys and values (B, M, 2 C), and for one head score offsets (B, M) float32: uninitialised."""
    batch, _, channels = x.shape
    key_value = x.new_empty(batch, reduced_tokens, 2 * channels)
    if key_offset_weight is None:
        return key_value, None
    return key_value, x.new_empty(batch, reduced_tokens, dtype=torch.float32)


def project_key_value(
    partials: torch.Tensor,  # (splits, rows, C), or tokens (B, M, C) as the one part
    bias: torch.Tensor | None,
    eps: float,
    weight: torch.Tensor,
    key_offset_weight: torch.Tensor | None,
    key_value: torch.Tensor,
    key_offset: torch.Tensor | None,
) -> None:
    """Launch the kernel: write `key_value` (B, M, 2 C) and, where it is given, `key_offset` (B, M).

    `weight` is (2 C, C), `bias` and `key_offset_weight` (C,).
    """
    channels = partials.shape[-1]
    rows = key_value.numel() // (2 * channels)
    config = look_up(
        "key_value",
        key_value.device,
        key_value.dtype,
        {"channels": channels, "rows": rows},
        divides={"BLOCK_N": 2 * channels, "CHUNK": channels},
    )
    launch(
        key_value_kernel,
        (ceil_div(rows, config["BLOCK_M"]), 2 * channels // config["BLOCK_N"]),
        *(partials, bias, weight, key_offset_weight, key_value, key_offset, rows, eps),
        CHANNELS=channels,
        SPLITS=partials.numel() // (rows * channels),
        PRECISION=matmul_precision(key_value.dtype),
        **config,
    )

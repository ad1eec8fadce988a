"""Attention of all tokens to the few reduced ones, with what comes before and after it.

    several heads:  x + softmax((N(x) Wq^T + bq) K^T) V Wo^T + bo
    one head:       x + softmax(N(x) K^T + offset) V + bo           K and V hold Wq and Wo

N is LayerNorm without its affine part. Scores never leave the registers: keys come in tiles, with
the online softmax in base 2 where they are more than one. Three kernels:

- `one_head_kernel`: all of the above, for C of 32, 64 or 128.
- `block_kernel`: all of the above for several heads, whose contexts go into the output projection
  one after the other; the C sums per token are a tuple of accumulators.
- `per_head_kernel`: one program per head up to the context; the output projection is `linear`'s.
  More programs, which small batches need, and fewer registers.
"""

from typing import Any

import torch

from ..blocks.linear import linear
from ..blocks.primitives import (
    LOG2_E,
    matmul_precision,
    normalize_rows,
    row_moments,
    update_moments,
)
from ..core.configurations import Config, look_up
from ..core.launch import ceil_div, launch
from ..core.optional_triton import tl, triton


@triton.jit
def attend_tile(scores, value, maximum, total, context, PRECISION: tl.constexpr):
    """Take a further tile of keys into the softmax.

    Args:
        scores: (BLOCK_M, BLOCK_N) float32, in base 2, -inf where there is no key.
        value: (BLOCK_N, HEAD_DIM).
        maximum, total, context: (BLOCK_M,), (BLOCK_M,), (BLOCK_M, HEAD_DIM) float32: the largest
            score so far, and the sums of the exponentials relative to it, alone and with values.
    """
    new_maximum = tl.maximum(maximum, tl.max(scores, 1))
    correction = tl.exp2(maximum - new_maximum)
    exponential = tl.exp2(scores - new_maximum[:, None])
    total = total * correction + tl.sum(exponential, 1)
    context = tl.dot(
        exponential.to(value.dtype),
        value,
        context * correction[:, None],
        input_precision=PRECISION,
    )
    return new_maximum, total, context


@triton.jit(do_not_specialize=["tokens", "keys"])
def one_head_kernel(
    x_pointer,  # (batch, tokens, CHANNELS)
    key_value_pointer,  # (batch, keys, 2 * CHANNELS)
    key_offset_pointer,  # (batch, keys) float32, times log2(e)
    output_bias_pointer,  # (CHANNELS,)
    output_pointer,  # (batch, tokens, CHANNELS)
    tokens,
    keys,
    eps,
    CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    tiles = tl.cdiv(tokens, BLOCK_M)
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    token = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    token_mask = (token < tokens)[:, None]
    channel = tl.arange(0, CHANNELS)
    x_offset = (batch * tokens + token)[:, None] * CHANNELS + channel[None, :]
    x = tl.load(x_pointer + x_offset, mask=token_mask, other=0.0)
    query = (normalize_rows(x.to(tl.float32), eps, CHANNELS) * LOG2_E).to(x.dtype)

    maximum = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    context = tl.zeros((BLOCK_M, CHANNELS), tl.float32)
    for key0 in range(0, keys, BLOCK_N):
        key = key0 + tl.arange(0, BLOCK_N)
        key_mask = key < keys
        pointers = key_value_pointer + (batch * keys + key)[:, None] * (2 * CHANNELS)
        pointers += channel[None, :]
        # The offset of no key is -inf, so that it takes no part.
        offset_pointers = key_offset_pointer + batch * keys + key
        offset = tl.load(offset_pointers, mask=key_mask, other=-float("inf"))
        tile = tl.load(pointers, mask=key_mask[:, None], other=0.0)
        scores = tl.dot(query, tile.T, input_precision=PRECISION) + offset[None, :]
        value = tl.load(pointers + CHANNELS, mask=key_mask[:, None], other=0.0)
        maximum, total, context = attend_tile(scores, value, maximum, total, context, PRECISION)

    output = context / total[:, None]
    output += tl.load(output_bias_pointer + channel).to(tl.float32)[None, :]
    output += tl.load(x_pointer + x_offset, mask=token_mask, other=0.0).to(tl.float32)
    tl.store(output_pointer + x_offset, output.to(x.dtype), mask=token_mask)


@triton.jit
def project_query(
    x_pointers,  # (BLOCK_M, BLOCK_K), to the first channels of each row
    weight_pointer,  # (CHANNELS, CHANNELS)
    bias_pointer,  # (CHANNELS,)
    weight_sum_pointer,  # (CHANNELS,) float32, in half precision
    first,  # output channel of the head
    row_mask,  # (BLOCK_M,)
    mean,  # (BLOCK_M,) float32, or None: gathered on the way
    rstd,  # likewise
    eps,
    CHANNELS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Queries of one head, times log2(e): LayerNorm and linear as in linear.py."""
    LOG2_E: tl.constexpr = 1.4426950408889634  # not a global: see primitives.py
    EXACT: tl.constexpr = x_pointers.dtype.element_ty == tl.float32
    GATHER: tl.constexpr = mean is None
    column = first + tl.arange(0, HEAD_DIM)
    k = tl.arange(0, BLOCK_K)
    weight_pointers = weight_pointer + column[None, :] * CHANNELS + k[:, None]
    if GATHER:
        if EXACT:
            mean, rstd = row_moments(x_pointers, row_mask, eps, CHANNELS, BLOCK_M, BLOCK_K)
        else:
            mean = tl.zeros((BLOCK_M,), tl.float32)
            square_sum = tl.zeros((BLOCK_M,), tl.float32)
    query = tl.zeros((BLOCK_M, HEAD_DIM), tl.float32)
    for k0 in range(0, CHANNELS, BLOCK_K):
        x = tl.load(x_pointers + k0, mask=row_mask[:, None], other=0.0)
        weight = tl.load(weight_pointers + k0)
        if EXACT:
            x -= mean[:, None]
        elif GATHER:
            mean, square_sum = update_moments(mean, square_sum, k0, x.to(tl.float32), BLOCK_K)
        query = tl.dot(x, weight, query, input_precision=PRECISION)
    if not EXACT:
        if GATHER:
            rstd = tl.rsqrt(square_sum / CHANNELS + eps)
        query -= mean[:, None] * tl.load(weight_sum_pointer + column)[None, :]
    bias = tl.load(bias_pointer + column).to(tl.float32)
    return (rstd[:, None] * query + bias[None, :]) * LOG2_E


@triton.jit(do_not_specialize=["tokens", "keys"])
def block_kernel(
    x_pointer,  # (batch, tokens, CHANNELS)
    key_value_pointer,  # (batch, keys, 2 * CHANNELS)
    query_weight_pointer,  # (CHANNELS, CHANNELS)
    query_bias_pointer,  # (CHANNELS,)
    query_weight_sum_pointer,  # (CHANNELS,) float32, in half precision
    output_weight_pointer,  # (CHANNELS, CHANNELS)
    output_bias_pointer,  # (CHANNELS,)
    output_pointer,  # (batch, tokens, CHANNELS)
    tokens,
    keys,
    eps,
    CHANNELS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    KEY_TAIL: tl.constexpr,  # whether keys are no multiple of BLOCK_N
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
):
    CHUNKS: tl.constexpr = CHANNELS // CHUNK
    tiles = tl.cdiv(tokens, BLOCK_M)
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    token = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    token_mask = token < tokens
    k = tl.arange(0, CHUNK)
    dim = tl.arange(0, HEAD_DIM)
    x_offset = (batch * tokens + token)[:, None] * CHANNELS + k[None, :]
    if CHUNK == CHANNELS:
        x = tl.load(x_pointer + x_offset, mask=token_mask[:, None], other=0.0)
        normalized = normalize_rows(x.to(tl.float32), eps, CHANNELS).to(x.dtype)
    else:
        mean, rstd = row_moments(x_pointer + x_offset, token_mask, eps, CHANNELS, BLOCK_M, CHUNK)
    sums = ()
    for _ in tl.static_range(CHUNKS):
        sums = sums + (tl.zeros((BLOCK_M, CHUNK), tl.float32),)  # noqa: RUF005

    for head in range(CHANNELS // HEAD_DIM):
        first = head * HEAD_DIM
        if CHUNK == CHANNELS:
            weight = tl.load(query_weight_pointer + (first + dim[None, :]) * CHANNELS + k[:, None])
            query = tl.dot(normalized, weight, input_precision=PRECISION)
            bias = tl.load(query_bias_pointer + first + dim).to(tl.float32)
            query = (query + bias[None, :]) * LOG2_E
        else:
            query = project_query(
                x_pointer + x_offset,
                query_weight_pointer,
                query_bias_pointer,
                query_weight_sum_pointer,
                first,
                token_mask,
                mean,
                rstd,
                eps,
                CHANNELS,
                HEAD_DIM,
                PRECISION,
                BLOCK_M,
                CHUNK,
            )
        query = query.to(x_pointer.dtype.element_ty)
        maximum = tl.full((BLOCK_M,), -float("inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        context = tl.zeros((BLOCK_M, HEAD_DIM), tl.float32)
        for key0 in range(0, keys, BLOCK_N):
            key = key0 + tl.arange(0, BLOCK_N)
            key_mask = key < keys
            pointers = key_value_pointer + (batch * keys + key)[:, None] * (2 * CHANNELS)
            pointers += first + dim[None, :]
            tile = tl.load(pointers, mask=key_mask[:, None], other=0.0)
            scores = tl.dot(query, tile.T, input_precision=PRECISION)
            if KEY_TAIL:
                scores = tl.where(key_mask[None, :], scores, -float("inf"))
            value = tl.load(pointers + CHANNELS, mask=key_mask[:, None], other=0.0)
            maximum, total, context = attend_tile(scores, value, maximum, total, context, PRECISION)
        context = (context / total[:, None]).to(x_pointer.dtype.element_ty)
        weight_pointers = output_weight_pointer + k[None, :] * CHANNELS + first + dim[:, None]
        new_sums = ()
        for chunk in tl.static_range(CHUNKS):
            weight = tl.load(weight_pointers + chunk * CHUNK * CHANNELS)
            product = tl.dot(context, weight, sums[chunk], input_precision=PRECISION)
            new_sums = new_sums + (product,)  # noqa: RUF005
        sums = new_sums

    for chunk in tl.static_range(CHUNKS):
        pointers = x_pointer + x_offset + chunk * CHUNK
        output = tl.load(pointers, mask=token_mask[:, None], other=0.0).to(tl.float32)
        output += tl.load(output_bias_pointer + chunk * CHUNK + k).to(tl.float32)[None, :]
        tl.store(
            output_pointer + x_offset + chunk * CHUNK,
            (sums[chunk] + output).to(output_pointer.dtype.element_ty),
            mask=token_mask[:, None],
        )


@triton.jit(do_not_specialize=["tokens", "keys"])
def per_head_kernel(
    x_pointer,  # (batch, tokens, CHANNELS)
    key_value_pointer,  # (batch, keys, 2 * CHANNELS)
    query_weight_pointer,  # (CHANNELS, CHANNELS)
    query_bias_pointer,  # (CHANNELS,)
    query_weight_sum_pointer,  # (CHANNELS,) float32, in half precision
    context_pointer,  # (batch, tokens, CHANNELS)
    tokens,
    keys,
    eps,
    CHANNELS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    KEY_TAIL: tl.constexpr,  # whether keys are no multiple of BLOCK_N
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles = tl.cdiv(tokens, BLOCK_M)
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    token = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    token_mask = token < tokens
    first = tl.program_id(1) * HEAD_DIM
    dim = tl.arange(0, HEAD_DIM)
    row_offset = (batch * tokens + token)[:, None] * CHANNELS
    query = project_query(
        x_pointer + row_offset + tl.arange(0, BLOCK_K)[None, :],
        query_weight_pointer,
        query_bias_pointer,
        query_weight_sum_pointer,
        first,
        token_mask,
        None,
        None,
        eps,
        CHANNELS,
        HEAD_DIM,
        PRECISION,
        BLOCK_M,
        BLOCK_K,
    ).to(x_pointer.dtype.element_ty)
    maximum = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    context = tl.zeros((BLOCK_M, HEAD_DIM), tl.float32)
    for key0 in range(0, keys, BLOCK_N):
        key = key0 + tl.arange(0, BLOCK_N)
        key_mask = key < keys
        pointers = key_value_pointer + (batch * keys + key)[:, None] * (2 * CHANNELS)
        pointers += first + dim[None, :]
        tile = tl.load(pointers, mask=key_mask[:, None], other=0.0)
        scores = tl.dot(query, tile.T, input_precision=PRECISION)
        if KEY_TAIL:
            scores = tl.where(key_mask[None, :], scores, -float("inf"))
        value = tl.load(pointers + CHANNELS, mask=key_mask[:, None], other=0.0)
        maximum, total, context = attend_tile(scores, value, maximum, total, context, PRECISION)
    context = context / total[:, None]
    tl.store(
        context_pointer + row_offset + first + dim[None, :],
        context.to(context_pointer.dtype.element_ty),
        mask=token_mask[:, None],
    )


def _config(kernel: str, x: torch.Tensor, key_value: torch.Tensor, block: str | None) -> Config:
    batch, tokens, channels = x.shape
    return look_up(
        kernel,
        x.device,
        x.dtype,
        {"channels": channels, "tokens": batch * tokens, "keys": key_value.shape[1]},
        divides=None if block is None else {block: channels},
    )


def _grid(x: torch.Tensor, config: Config) -> int:
    return x.shape[0] * ceil_div(x.shape[1], config["BLOCK_M"])


def one_head(
    x: torch.Tensor,
    key_value: torch.Tensor,
    key_offset: torch.Tensor,
    output_bias: torch.Tensor,
    eps: float,
) -> torch.Tensor:
    """(B, N, C) from keys and values (B, M, 2 C) and score offsets (B, M): one launch."""
    config = _config("one_head_attention", x, key_value, None)
    output = torch.empty_like(x)
    launch(
        one_head_kernel,
        (_grid(x, config),),
        *(x, key_value, key_offset, output_bias, output, x.shape[1], key_value.shape[1], eps),
        CHANNELS=x.shape[2],
        PRECISION=matmul_precision(x.dtype),
        **config,
    )
    return output


def block(x: torch.Tensor, key_value: torch.Tensor, weights: Any) -> torch.Tensor:
    """(B, N, C) from keys and values (B, M, 2 C): one launch.

    Args:
        weights: `SrAttentionWeights` of several heads, contiguous.
    """
    _, tokens, channels = x.shape
    keys = key_value.shape[1]
    config = _config("attention_block", x, key_value, "CHUNK")
    output = torch.empty_like(x)
    launch(
        block_kernel,
        (_grid(x, config),),
        *(x, key_value, weights.query_weight, weights.query_bias, weights.query_weight_sum),
        *(weights.output_weight, weights.output_bias, output, tokens, keys, weights.eps),
        CHANNELS=channels,
        HEAD_DIM=channels // weights.num_heads,
        KEY_TAIL=keys % config["BLOCK_N"] != 0,
        PRECISION=matmul_precision(x.dtype),
        **config,
    )
    return output


def per_head(x: torch.Tensor, key_value: torch.Tensor, weights: Any) -> torch.Tensor:
    """Run attention as `block` does, in two launches."""
    _, tokens, channels = x.shape
    keys = key_value.shape[1]
    config = _config("attention_per_head", x, key_value, "BLOCK_K")
    context = torch.empty_like(x)
    launch(
        per_head_kernel,
        (_grid(x, config), weights.num_heads),
        *(x, key_value, weights.query_weight, weights.query_bias, weights.query_weight_sum),
        *(context, tokens, keys, weights.eps),
        CHANNELS=channels,
        HEAD_DIM=channels // weights.num_heads,
        KEY_TAIL=keys % config["BLOCK_N"] != 0,
        PRECISION=matmul_precision(x.dtype),
        **config,
    )
    return linear(context, weights.output_weight, weights.output_bias, residual=x)

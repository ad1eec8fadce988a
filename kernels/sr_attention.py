"""Spatial-reduction attention with LayerNorm, output projection and residual, on folded weights.

With z = (x - mean) / std of the tokens and r the normalised tokens of the reduced grid, what is
left of attention after folding (weights made by `fastseg.folding`):

    several heads:  x + softmax((z Wq + bq) (r Wk)^T) (r Wv) Wo + bo
    one head:       x + softmax(z (r Wqk)^T + r wqb) (r Wvo) + bo

LayerNorm's affine parts and the softmax scale are inside the matrices. A key bias adds the same to
every score of a row, which softmax ignores; a value bias passes through rows that sum to one and
joins `bo`. With one head the query and output projections are absorbed by the few reduced tokens:
Wqk = Wk Wq^T, Wvo = Wv Wo, and the query bias becomes a score offset of each key.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .residual import add_residual


def reduce_tokens(
    normalized: torch.Tensor,
    height: int,
    width: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    sr_ratio: int,
) -> torch.Tensor:
    """Convolution of kernel and stride `sr_ratio` as one matrix product.

    Args:
        normalized: (B, H * W, C).
        weight: (C, sr_ratio * sr_ratio * C), input index ordered (row, column, channel).
        bias: (C,).

    Returns:
        (B, (H // sr_ratio) * (W // sr_ratio), C); rows and columns left over at the end take no
        part, as in a strided convolution without padding.
    """
    batch, _, channels = normalized.shape
    rows, columns = height // sr_ratio, width // sr_ratio
    grid = normalized.view(batch, height, width, channels)
    grid = grid[:, : rows * sr_ratio, : columns * sr_ratio]
    patches = grid.unflatten(1, (rows, sr_ratio)).unflatten(3, (columns, sr_ratio)).transpose(2, 3)
    return F.linear(patches.reshape(batch, rows * columns, -1), weight, bias)


def sr_attention(
    x: torch.Tensor,
    height: int,
    width: int,
    *,
    num_heads: int,
    sr_ratio: int,
    eps: float,
    key_value_weight: torch.Tensor,
    output_bias: torch.Tensor,
    query_weight: torch.Tensor | None = None,
    query_bias: torch.Tensor | None = None,
    output_weight: torch.Tensor | None = None,
    key_offset_weight: torch.Tensor | None = None,
    sr_weight: torch.Tensor | None = None,
    sr_bias: torch.Tensor | None = None,
    sr_eps: float = 1e-5,
) -> torch.Tensor:
    """`x` plus its attention to the reduced grid.

    Args:
        x: tokens (B, H * W, C), contiguous.
        num_heads: divides C.
        sr_ratio: 1 for attention to all tokens.
        eps: of the LayerNorm before attention.
        key_value_weight: (2 C, C), keys' rows first: [Wk | Wv] or, for one head, [Wqk | Wvo].
        output_bias: (C,), the value bias inside.
        query_weight, query_bias, output_weight: (C, C), (C,), (C, C); for several heads only.
        key_offset_weight: (C,), wqb; for one head only.
        sr_weight, sr_bias, sr_eps: of the reduction and its LayerNorm; for sr_ratio > 1 only.

    Returns:
        (B, H * W, C).
    """
    batch, tokens, channels = x.shape
    normalized = F.layer_norm(x, (channels,), eps=eps)
    reduced = normalized
    if sr_ratio > 1:
        assert sr_weight is not None
        assert sr_bias is not None
        reduced = reduce_tokens(normalized, height, width, sr_weight, sr_bias, sr_ratio)
        reduced = F.layer_norm(reduced, (channels,), eps=sr_eps)
    key, value = F.linear(reduced, key_value_weight).chunk(2, dim=-1)

    if num_heads == 1:
        assert key_offset_weight is not None
        offset = (reduced @ key_offset_weight).view(batch, 1, 1, -1)
        # Rows of probabilities sum to one, so the bias may join the few values instead of all
        # tokens: one pass less over them, and one rounding less in half precision.
        value = value + output_bias
        context = F.scaled_dot_product_attention(
            normalized.unsqueeze(1),
            key.unsqueeze(1),
            value.unsqueeze(1),
            attn_mask=offset,
            scale=1.0,
        )
        return add_residual(context.squeeze(1), x)

    assert query_weight is not None
    assert output_weight is not None
    query = F.linear(normalized, query_weight, query_bias)
    query, key, value = (
        part.unflatten(2, (num_heads, -1)).transpose(1, 2) for part in (query, key, value)
    )
    context = F.scaled_dot_product_attention(query, key, value, scale=1.0)
    context = context.transpose(1, 2).reshape(batch, tokens, channels)
    return add_residual(F.linear(context, output_weight, output_bias), x)

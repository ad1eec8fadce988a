"""Spatial-reduction attention with LayerNorm, output projection and residual, on folded weights.

With z = (x - mean) / std of the tokens and r the normalised tokens of the reduced grid, what is
left of attention after folding (weights made by `fastseg.models.segformer.fold`):

    several heads:  x + softmax((z Wq + bq) (r Wk)^T) (r Wv) Wo + bo
    one head:       x + softmax(z (r Wqk)^T + r wqb) (r Wvo) + bo

LayerNorm's affine parts and the softmax scale are inside the matrices. A key bias adds the same to
every score of a row, which softmax ignores; a value bias passes through rows that sum to one and
joins `bo`. With one head the query and output projections are absorbed by the few reduced tokens:
Wqk = Wk Wq^T, Wvo = Wv Wo, and the query bias becomes a score offset of each key.

Kernels: one launch or two for keys and values, in spatial_reduction.py and key_value.py, then one
or two for attention, in attention.py. `choose` says which.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ..blocks.linear import linear
from ..blocks.onednn import add_residual, dense, dense_residual
from ..core.checks import check_parameter, check_sums, check_tokens, common_reason, whole_in_graph
from ..core.configurations import look_up
from ..core.dispatch import use_triton
from ..core.registry import register
from . import kernels as attention
from . import spatial_reduction
from .key_value import empty_key_value, project_key_value

ONE_TILE = (32, 64, 128)  # widths whose rows, and weights of C x C, are one tile
HEAD_DIMS = (16, 32, 64, 128)
MAX_CHANNELS = 1024  # what a row may be to stay in registers


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
    grid = normalized.view(batch, height, width, channels)
    # (B, rows, columns, C, R, R), as views without slices: whether a slice has cut something off
    # would bind a graph of any size.
    patches = grid.unfold(1, sr_ratio, sr_ratio).unfold(2, sr_ratio, sr_ratio)
    patches = patches.permute(0, 1, 2, 4, 5, 3)
    # A copy in any case: `reshape` would bind graphs of any size to what it finds out.
    patches = patches.clone(memory_format=torch.contiguous_format)
    return dense(patches.flatten(3).flatten(1, 2), weight, bias)


def eager(
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
    query_weight_sum: torch.Tensor | None = None,
    key_value_weight_sum: torch.Tensor | None = None,
    sr_weight_sum: torch.Tensor | None = None,
) -> torch.Tensor:
    """The eager twin; it needs no sums."""
    batch, tokens, channels = x.shape
    normalized = F.layer_norm(x, (channels,), eps=eps)
    reduced = normalized
    if sr_ratio > 1:
        assert sr_weight is not None
        assert sr_bias is not None
        reduced = reduce_tokens(normalized, height, width, sr_weight, sr_bias, sr_ratio)
        reduced = F.layer_norm(reduced, (channels,), eps=sr_eps)
    key, value = dense(reduced, key_value_weight).chunk(2, dim=-1)

    if num_heads == 1:
        assert key_offset_weight is not None
        offset = (reduced @ key_offset_weight)[:, None, None, :]
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
    query = dense(normalized, query_weight, query_bias)
    query, key, value = (
        part.unflatten(2, (num_heads, -1)).transpose(1, 2) for part in (query, key, value)
    )
    context = F.scaled_dot_product_attention(query, key, value, scale=1.0)
    context = context.transpose(1, 2).reshape(batch, tokens, channels)
    return dense_residual(context, output_weight, output_bias, x)


class Forms(NamedTuple):
    """Names of the two forms that a call of the op takes."""

    key_value: str  # "one_launch", "split" (2 launches), or without a reduction "linear" (1)
    attention: str  # "one_head", "block" (1 launch each) or "per_head" (2)


def choose(x: torch.Tensor, num_heads: int, sr_ratio: int, reduced_tokens: int) -> Forms:
    """The forms that the configuration names, as far as the sizes allow them.

    Args:
        reduced_tokens: of an image.
    """
    batch, tokens, channels = x.shape
    sizes = {
        "channels": channels,
        "tokens": batch * tokens,
        "reduced_tokens": batch * reduced_tokens,
    }
    config = look_up("sr_attention", x.device, x.dtype, sizes)
    if sr_ratio == 1:
        key_value = "linear"
    elif channels in ONE_TILE and torch.version.hip is None:
        # On AMD the compiler lets a program count itself in before all its stores have landed.
        key_value = config["key_value"]
    else:
        key_value = "split"
    return Forms(key_value, "one_head" if num_heads == 1 else config["attention"])


def fused(
    x: torch.Tensor,
    height: int,
    width: int,
    *,
    num_heads: int,
    sr_ratio: int,
    eps: float,
    key_value_weight: torch.Tensor,
    output_bias: torch.Tensor,
    query_weight: Any = None,
    query_bias: Any = None,
    output_weight: Any = None,
    key_offset_weight: Any = None,
    sr_weight: Any = None,
    sr_bias: Any = None,
    sr_eps: float = 1e-5,
    query_weight_sum: Any = None,
    key_value_weight_sum: Any = None,
    sr_weight_sum: Any = None,
) -> torch.Tensor:
    """The kernels."""
    x = x.contiguous()
    if x.numel() == 0:
        return torch.empty_like(x)

    def contiguous(parameter: torch.Tensor | None) -> Any:
        return None if parameter is None else parameter.contiguous()

    key_value_weight = key_value_weight.contiguous()
    key_offset_weight = contiguous(key_offset_weight)
    output_bias = output_bias.contiguous()
    forms = choose(x, num_heads, sr_ratio, (height // sr_ratio) * (width // sr_ratio))

    key_offset = None
    if sr_ratio > 1:
        reduce = {"one_launch": spatial_reduction.one_launch, "split": spatial_reduction.split}
        key_value, key_offset = reduce[forms.key_value](
            x,
            height,
            width,
            sr_ratio=sr_ratio,
            eps=eps,
            sr_weight=sr_weight.contiguous(),
            sr_weight_sum=contiguous(sr_weight_sum),
            sr_bias=contiguous(sr_bias),
            sr_eps=sr_eps,
            key_value_weight=key_value_weight,
            key_offset_weight=key_offset_weight,
        )
    elif num_heads == 1:
        key_value, key_offset = empty_key_value(x, x.shape[1], key_offset_weight)
        project_key_value(x, None, eps, key_value_weight, key_offset_weight, key_value, key_offset)
    else:
        if key_value_weight_sum is None and x.dtype != torch.float32:
            key_value_weight_sum = key_value_weight.sum(1, dtype=torch.float32)
        sums = contiguous(key_value_weight_sum)
        key_value = linear(x, key_value_weight, eps=eps, weight_sum=sums)

    if key_offset is not None:
        return attention.one_head(x, key_value, key_offset, output_bias, eps)
    if query_weight_sum is None and x.dtype != torch.float32:
        query_weight_sum = query_weight.sum(1, dtype=torch.float32)
    attend = {"block": attention.block, "per_head": attention.per_head}[forms.attention]
    return attend(
        x,
        key_value,
        num_heads=num_heads,
        query_weight=query_weight.contiguous(),
        query_bias=query_bias.contiguous(),
        query_weight_sum=contiguous(query_weight_sum),
        output_weight=output_weight.contiguous(),
        output_bias=output_bias,
        eps=eps,
    )


register(
    "sr_attention(Tensor x, SymInt height, SymInt width, *, int num_heads, int sr_ratio, float eps,"
    " Tensor key_value_weight, Tensor output_bias, Tensor? query_weight=None,"
    " Tensor? query_bias=None, Tensor? output_weight=None, Tensor? key_offset_weight=None,"
    " Tensor? sr_weight=None, Tensor? sr_bias=None, float sr_eps=1e-5,"
    " Tensor? query_weight_sum=None, Tensor? key_value_weight_sum=None,"
    " Tensor? sr_weight_sum=None) -> Tensor",
    fused,
    eager,
    lambda x, height, width, **_: torch.empty(x.shape, dtype=x.dtype, device=x.device),
)


def supports(x: torch.Tensor, num_heads: int, *weights: torch.Tensor | None) -> str | None:
    """Reason why the kernels cannot take these arguments; None where they can."""
    channels = x.shape[2]
    if channels % 32 != 0:
        return f"{channels} channels are no multiple of 32"
    if channels > MAX_CHANNELS:
        return f"{channels} channels are more than {MAX_CHANNELS}"
    if channels // num_heads not in HEAD_DIMS:
        return f"a head of {channels // num_heads} channels is none of {HEAD_DIMS}"
    return common_reason(x, *weights)


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
    query_weight_sum: torch.Tensor | None = None,
    key_value_weight_sum: torch.Tensor | None = None,
    sr_weight_sum: torch.Tensor | None = None,
) -> torch.Tensor:
    """`x` plus its attention to the reduced grid.

    Args:
        x: tokens (B, H * W, C), floating.
        num_heads: divides C.
        sr_ratio: 1 for attention to all tokens; at most H and W.
        eps: of the LayerNorm before attention.
        key_value_weight: (2 C, C), keys' rows first: [Wk | Wv] or, for one head, [Wqk | Wvo].
        output_bias: (C,), the value bias inside.
        query_weight, query_bias, output_weight: (C, C), (C,), (C, C); for several heads only.
        key_offset_weight: (C,), wqb; for one head only.
        sr_weight, sr_bias, sr_eps: (C, R * R * C), input index ordered (row, column, channel),
            (C,), and eps of the LayerNorm after it; for an sr_ratio R > 1 only.
        query_weight_sum, key_value_weight_sum, sr_weight_sum: (C,), (2 C,), (R * R, C) float32,
            (float64 for float64), sums over the input channels of the weights as they are: what a
            row's mean adds to each output. Kernels need them in half precision, and make them at
            each call where they are not given.

    Returns:
        (B, H * W, C), contiguous.

    Raises:
        TypeError: `x` is not a floating tensor, or dtypes differ.
        ValueError: shapes or devices do not match, or a weight that is needed is None.
    """
    check_tokens("x", x, height, width)
    channels = x.shape[2]
    if num_heads < 1 or channels % num_heads != 0:
        raise ValueError(f"num_heads: expected a divisor of {channels} channels, got {num_heads}")
    if not 1 <= sr_ratio <= min(height, width):
        raise ValueError(
            f"sr_ratio: expected 1 to {min(height, width)} on a grid of {height} x {width}, "
            f"got {sr_ratio}"
        )
    check_parameter("key_value_weight", key_value_weight, (2 * channels, channels), x)
    check_parameter("output_bias", output_bias, (channels,), x)
    if num_heads == 1:
        check_parameter("key_offset_weight", key_offset_weight, (channels,), x)
    else:
        check_parameter("query_weight", query_weight, (channels, channels), x)
        check_parameter("query_bias", query_bias, (channels,), x)
        check_parameter("output_weight", output_weight, (channels, channels), x)
    taps = sr_ratio * sr_ratio
    if sr_ratio > 1:
        check_parameter("sr_weight", sr_weight, (channels, taps * channels), x)
        check_parameter("sr_bias", sr_bias, (channels,), x)
    for name, sums, shape in (
        ("query_weight_sum", query_weight_sum, (channels,)),
        ("key_value_weight_sum", key_value_weight_sum, (2 * channels,)),
        ("sr_weight_sum", sr_weight_sum, (taps, channels)),
    ):
        check_sums(name, sums, shape, x)
    weights = (
        key_value_weight,
        output_bias,
        query_weight,
        query_bias,
        output_weight,
        key_offset_weight,
        sr_weight,
        sr_bias,
    )
    registered = use_triton(
        "sr_attention", x.device, supports(x, num_heads, *weights)
    ) or whole_in_graph(x, *weights)
    run = torch.ops.fastseg.sr_attention if registered else eager
    return run(
        x,
        height,
        width,
        num_heads=num_heads,
        sr_ratio=sr_ratio,
        eps=eps,
        key_value_weight=key_value_weight,
        output_bias=output_bias,
        query_weight=query_weight,
        query_bias=query_bias,
        output_weight=output_weight,
        key_offset_weight=key_offset_weight,
        sr_weight=sr_weight,
        sr_bias=sr_bias,
        sr_eps=sr_eps,
        query_weight_sum=query_weight_sum,
        key_value_weight_sum=key_value_weight_sum,
        sr_weight_sum=sr_weight_sum,
    )

"""Spatial-reduction attention with LayerNorm, output projection and residual, on folded weights.

With z = (x - mean) / std of the tokens and r the normalised tokens of the reduced grid, what is
left of attention after folding (weights made by `fastseg.models.segformer.fold`):

    several heads:  x + softmax((z Wq + bq) (r Wk)^T) (r Wv) Wo + bo
    one head:       x + softmax(z (r Wqk)^T + r wqb) (r Wvo) + bo

LayerNorm's affine parts and the softmax scale are inside the matrices. A key bias adds the same to
every score of a row, which softmax ignores; a value bias passes through rows that sum to one and
joins `bo`. With one head the query and output projections are absorbed by the few reduced tokens:
Wqk = Wk Wq^T, Wvo = Wv Wo, and the query bias becomes a score offset of each key.

KerasCV's network mixes channels (`mix_channels`) of z gamma + beta before the convolution, and
unmixes them after it. There gamma and beta stay outside of its weights, as a tap meets other
channels at each place.

Kernels: one launch or two for keys and values, in spatial_reduction.py and key_value.py, then one
or two for attention, in attention.py. `choose` says which.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ..blocks.linear import linear
from ..blocks.onednn import add_residual, dense, dense_residual, normalize
from ..blocks.tokens import mix_channels, unmix_channels
from ..core.checks import check_matrix, check_parameter, check_wide, common_reason
from ..core.configurations import look_up
from ..core.registry import Op, register
from ..core.weights import Weights, check_tokens, check_weights
from . import kernels as attention
from . import spatial_reduction
from .candidates import CANDIDATES
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


@dataclass(frozen=True, eq=False)
class SrAttentionWeights(Weights):
    """Weights of `sr_attention` of C channels.

    Args:
        key_value_weight: (2 C, C), keys' rows first: [Wk | Wv] or, for one head, [Wqk | Wvo].
        output_bias: (C,), the value bias inside.
        num_heads: divides C.
        eps: of the LayerNorm before attention.
        sr_ratio: R, 1 for attention to all tokens.
        query_weight, query_bias, output_weight: (C, C), (C,), (C, C); for several heads only.
        key_offset_weight: (C,), wqb; for one head only.
        sr_weight, sr_bias, sr_eps: (C, R * R * C), input index ordered (row, column, channel),
            (C,), and eps of the LayerNorm after it; for an sr_ratio R > 1 only.
        query_weight_sum, key_value_weight_sum, sr_weight_sum: (C,), (2 C,), (R * R, C) float32,
            (float64 for float64), sums over the input channels of the weights as they are: what a
            row's mean adds to each output. Kernels need them in half precision, and make them at
            each call where they are not given.
        norm_weight, norm_bias: (C,), gain and shift of the LayerNorm before attention, where the
            reduction mixes channels. They are inside the other weights all the same.

    Raises:
        TypeError: dtypes differ.
        ValueError: shapes or devices do not match, or a weight that is needed is None.
    """

    key_value_weight: torch.Tensor
    output_bias: torch.Tensor
    num_heads: int
    eps: float
    sr_ratio: int = 1
    query_weight: torch.Tensor | None = None
    query_bias: torch.Tensor | None = None
    output_weight: torch.Tensor | None = None
    key_offset_weight: torch.Tensor | None = None
    sr_weight: torch.Tensor | None = None
    sr_bias: torch.Tensor | None = None
    sr_eps: float = 1e-5
    query_weight_sum: torch.Tensor | None = None
    key_value_weight_sum: torch.Tensor | None = None
    sr_weight_sum: torch.Tensor | None = None
    norm_weight: torch.Tensor | None = None
    norm_bias: torch.Tensor | None = None

    derived = ("query_weight_sum", "key_value_weight_sum", "sr_weight_sum")

    @property
    def like(self) -> torch.Tensor:
        return self.key_value_weight

    @property
    def channels(self) -> int:
        return self.key_value_weight.shape[1]

    def least_input(self) -> tuple[object, ...]:
        side = self.sr_ratio
        return (self.like.new_empty(1, side * side, self.channels), side, side)

    def check(self) -> None:
        like = check_matrix("key_value_weight", self.key_value_weight)
        channels = like.shape[1]
        if self.num_heads < 1 or channels % self.num_heads != 0:
            raise ValueError(
                f"num_heads: expected a divisor of {channels} channels, got {self.num_heads}"
            )
        if self.sr_ratio < 1:
            raise ValueError(f"sr_ratio: expected at least 1, got {self.sr_ratio}")
        taps = self.sr_ratio**2
        shapes: dict[str, tuple[int, ...]] = {
            "key_value_weight": (2 * channels, channels),
            "output_bias": (channels,),
        }
        if self.num_heads == 1:
            shapes["key_offset_weight"] = (channels,)
        else:
            shapes["query_weight"] = shapes["output_weight"] = (channels, channels)
            shapes["query_bias"] = (channels,)
        if self.sr_ratio > 1:
            shapes["sr_weight"], shapes["sr_bias"] = (channels, taps * channels), (channels,)
        if self.norm_weight is not None:
            shapes["norm_weight"] = shapes["norm_bias"] = (channels,)
        for name, shape in shapes.items():
            check_parameter(name, getattr(self, name), shape, like)
        check_wide("query_weight_sum", self.query_weight_sum, (channels,), like)
        check_wide("key_value_weight_sum", self.key_value_weight_sum, (2 * channels,), like)
        check_wide("sr_weight_sum", self.sr_weight_sum, (taps, channels), like)


def eager(x: torch.Tensor, height: int, width: int, weights: SrAttentionWeights) -> torch.Tensor:
    """The eager twin; it needs no sums."""
    batch, tokens, channels = x.shape
    normalized = normalize(x, weights.eps)
    reduced = normalized
    if weights.sr_ratio > 1:
        assert weights.sr_weight is not None
        assert weights.sr_bias is not None
        convolution = (weights.sr_weight, weights.sr_bias, weights.sr_ratio)
        if weights.norm_weight is None:
            reduced = reduce_tokens(normalized, height, width, *convolution)
        else:
            assert weights.norm_bias is not None
            affine = torch.addcmul(weights.norm_bias, normalized, weights.norm_weight)
            reduced = reduce_tokens(mix_channels(affine), height, width, *convolution)
            reduced = unmix_channels(reduced)
        reduced = normalize(reduced, weights.sr_eps)
    key, value = dense(reduced, weights.key_value_weight).chunk(2, dim=-1)

    if weights.num_heads == 1:
        assert weights.key_offset_weight is not None
        offset = (reduced @ weights.key_offset_weight)[:, None, None, :]
        # Rows of probabilities sum to one, so the bias may join the few values instead of all
        # tokens: one pass less over them, and one rounding less in half precision.
        value = value + weights.output_bias
        context = F.scaled_dot_product_attention(
            normalized.unsqueeze(1),
            key.unsqueeze(1),
            value.unsqueeze(1),
            attn_mask=offset,
            scale=1.0,
        )
        return add_residual(context.squeeze(1), x)

    assert weights.query_weight is not None
    assert weights.output_weight is not None
    query = dense(normalized, weights.query_weight, weights.query_bias)
    query, key, value = (
        part.unflatten(2, (weights.num_heads, -1)).transpose(1, 2) for part in (query, key, value)
    )
    context = F.scaled_dot_product_attention(query, key, value, scale=1.0)
    context = context.transpose(1, 2).reshape(batch, tokens, channels)
    return dense_residual(context, weights.output_weight, weights.output_bias, x)


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


def fused(x: torch.Tensor, height: int, width: int, weights: SrAttentionWeights) -> torch.Tensor:
    """The kernels."""
    x = x.contiguous()
    if x.numel() == 0:
        return torch.empty_like(x)
    weights = weights.map(torch.Tensor.contiguous)
    sr_ratio, num_heads, eps = weights.sr_ratio, weights.num_heads, weights.eps
    forms = choose(x, num_heads, sr_ratio, (height // sr_ratio) * (width // sr_ratio))

    key_offset = None
    if sr_ratio > 1:
        reduce = {"one_launch": spatial_reduction.one_launch, "split": spatial_reduction.split}
        key_value, key_offset = reduce[forms.key_value](x, height, width, weights)
    elif num_heads == 1:
        matrices = (weights.key_value_weight, weights.key_offset_weight)
        key_value, key_offset = empty_key_value(x, x.shape[1], weights.key_offset_weight)
        project_key_value(x, None, eps, *matrices, key_value, key_offset)
    else:
        sums = weights.key_value_weight_sum
        if sums is None and x.dtype != torch.float32:
            sums = weights.key_value_weight.sum(1, dtype=torch.float32)
        key_value = linear(x, weights.key_value_weight, eps=eps, weight_sum=sums)

    if key_offset is not None:
        return attention.one_head(x, key_value, key_offset, weights.output_bias, eps)
    if weights.query_weight_sum is None and x.dtype != torch.float32:
        assert weights.query_weight is not None
        query_weight_sum = weights.query_weight.sum(1, dtype=torch.float32)
        weights = weights.of(**{**weights.arguments(), "query_weight_sum": query_weight_sum})
    attend = {"block": attention.block, "per_head": attention.per_head}[forms.attention]
    return attend(x, key_value, weights)


def supports(x: torch.Tensor, height: int, width: int, weights: SrAttentionWeights) -> str | None:
    """Reason why the kernels cannot take these arguments; None where they can."""
    channels, num_heads = weights.channels, weights.num_heads
    if weights.norm_weight is not None:
        return "its reduction mixes channels, as KerasCV's does"
    if channels % 32 != 0:
        return f"{channels} channels are no multiple of 32"
    if channels > MAX_CHANNELS:
        return f"{channels} channels are more than {MAX_CHANNELS}"
    if channels // num_heads not in HEAD_DIMS:
        return f"a head of {channels // num_heads} channels is none of {HEAD_DIMS}"
    return common_reason(x, *weights.tensors())


def example(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    """A grid of 5 x 7 tokens, two heads of 32 channels, a reduction by 2."""

    def draw(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, device=device) * shape[-1] ** -0.5).to(dtype)

    weights = SrAttentionWeights(
        key_value_weight=draw(128, 64),
        output_bias=draw(64),
        num_heads=2,
        eps=1e-6,
        sr_ratio=2,
        query_weight=draw(64, 64),
        query_bias=draw(64),
        output_weight=draw(64, 64),
        sr_weight=draw(64, 256),
        sr_bias=draw(64),
    )
    return draw(2, 35, 64) * 8, 5, 7, weights


OP = register(
    Op(
        name="sr_attention",
        inputs="Tensor x, SymInt height, SymInt width",
        eager=eager,
        fused=fused,
        fake=lambda x, *_: torch.empty(x.shape, dtype=x.dtype, device=x.device),
        supports=supports,
        example=example,
        weights=SrAttentionWeights,
        candidates=CANDIDATES,
    )
)


def sr_attention(
    x: torch.Tensor, height: int, width: int, weights: SrAttentionWeights
) -> torch.Tensor:
    """`x` plus its attention to the reduced grid.

    Args:
        x: tokens (B, H * W, C), floating.
        weights: of an sr_ratio of at most H and W.

    Returns:
        (B, H * W, C), contiguous.

    Raises:
        TypeError: `x` is not a floating tensor of the dtype of `weights`, or these are no
            `SrAttentionWeights`.
        ValueError: shapes or devices do not match, or the grid is smaller than the sr_ratio.
    """
    check_weights(weights, SrAttentionWeights)
    check_tokens("x", x, height, width, weights)
    if weights.sr_ratio > min(height, width):
        raise ValueError(
            f"weights: expected an sr_ratio of 1 to {min(height, width)} on a grid of "
            f"{height} x {width}, got {weights.sr_ratio}; a model with it needs larger images"
        )
    return OP(x.device, x, height, width, weights)

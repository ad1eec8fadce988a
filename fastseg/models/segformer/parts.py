"""The ops of a SegFormer as parts of a host: by its names, and folded as fastseg's own layers."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from fastseg.folding.find import (
    Affine,
    Declined,
    activation_name,
    find,
    find_conv2d,
    find_layer_norm,
    find_linear,
)
from fastseg.folding.fold import Folded, Part

from .fold import fold_mix_ffn, fold_patch_embed, fold_sr_attention
from .hosts.names import EmbedNames, LayerNames


class Attention(NamedTuple):
    """The modules of LayerNorm and attention; linear ones may be an `Affine`."""

    norm: Any
    query: Any
    key: Any
    value: Any
    output: Any
    heads: int
    reduction: Any  # a strided convolution, or None
    reduction_norm: Any
    mixes_channels: bool  # KerasCV's reduction


class MixFfn(NamedTuple):
    """The modules of LayerNorm and Mix-FFN, and the name of its activation."""

    norm: Any
    fc1: Any
    dwconv: Any
    fc2: Any
    activation: str


def find_attention(layer: nn.Module, names: LayerNames) -> Attention:
    """The attention of a layer; raise `Declined` where it has another form."""
    norm = find_layer_norm(layer, names.attention_norm)
    heads = find(layer, names.num_heads)
    query, key, value = _query_key_value(layer, names)
    output = find_linear(layer, names.output)
    channels = norm.weight.shape[0]
    if not isinstance(heads, int) or heads < 1 or channels % heads:
        raise Declined(f"{names.num_heads} is {heads!r}, no divisor of {channels} channels")
    for path, projection in ((names.query, query), (names.key, key), (names.output, output)):
        if projection.weight.shape != (channels, channels):
            raise Declined(f"{path} is not {channels} to {channels} channels")
    reduction = reduction_norm = None
    if type(find(layer, names.reduction)) not in (type(None), nn.Identity):
        kernel = find_conv2d(layer, names.reduction).weight.shape[2]
        reduction = find_conv2d(layer, names.reduction, stride=kernel, padding=0)
        reduction_norm = find_layer_norm(layer, names.reduction_norm)
        if kernel == 1:
            raise Declined(f"{names.reduction} reduces nothing")
    mixes = bool(find(layer, names.mixes_channels))
    return Attention(norm, query, key, value, output, heads, reduction, reduction_norm, mixes)


def attention_part(layer: nn.Module, names: LayerNames, own: bool = False) -> Part:
    """LayerNorm, attention and residual: weights of `kernels.sr_attention`."""
    roots = [m for m in (find(layer, names.attention_norm), find(layer, names.attention)) if m]
    return Part(layer, roots, lambda: fold_sr_attention(*find_attention(layer, names)), own)


def _query_key_value(layer: nn.Module, names: LayerNames) -> tuple[Any, Any, Any]:
    if names.in_projection:
        attention = find(layer, names.in_projection)
        if not isinstance(attention, nn.MultiheadAttention) or attention.in_proj_weight is None:
            raise Declined(f"{names.in_projection} has no projection of queries, keys and values")
        query, key, value = _chunks(attention.in_proj_weight, attention.in_proj_bias, 3)
        return query, key, value
    query = find_linear(layer, names.query)
    if names.key_value:
        both = find_linear(layer, names.key_value)
        key, value = _chunks(both.weight, both.bias, 2)
        return query, key, value
    return query, find_linear(layer, names.key), find_linear(layer, names.value)


def _chunks(weight: torch.Tensor, bias: torch.Tensor | None, count: int) -> list[Affine]:
    biases = [None] * count if bias is None else bias.chunk(count)
    return [Affine(w, b) for w, b in zip(weight.chunk(count), biases, strict=True)]


def find_ffn(layer: nn.Module, names: LayerNames) -> MixFfn:
    """The Mix-FFN of a layer; raise `Declined` where it has another form."""
    norm = find_layer_norm(layer, names.ffn_norm)
    fc1, fc2 = find_linear(layer, names.fc1), find_linear(layer, names.fc2)
    dwconv = find_conv2d(layer, names.dwconv, kernel=3, stride=1, padding=1, depthwise=True)
    function = find(layer, names.activation)
    activation = "gelu" if function is None else activation_name(function)
    if activation is None:
        raise Declined(f"{names.activation} is {function}, unknown here")
    return MixFfn(norm, fc1, dwconv, fc2, activation)


def ffn_part(layer: nn.Module, names: LayerNames, own: bool = False) -> Part:
    """LayerNorm, Mix-FFN and residual: weights of `kernels.mix_ffn`."""
    roots = [m for m in (find(layer, names.ffn_norm), find(layer, names.ffn)) if m]
    return Part(layer, roots, lambda: fold_mix_ffn(*find_ffn(layer, names)), own)


def embed_part(embed: nn.Module, names: EmbedNames, own: bool = False) -> Part:
    """Convolution and LayerNorm: weights of `kernels.patch_embed`."""

    def fold() -> Folded:
        proj = find_conv2d(embed, names.proj)
        return fold_patch_embed(proj, find_layer_norm(embed, names.norm))

    return Part(embed, [embed], fold, own)

"""Attention, patch embedding and small Mix-FFNs with gradients, on tokens alone.

They compute what the modules do, by torch's operators: the strided convolution that reduces keys
and values is a matrix product over patches of tokens, keys and values are one product, and
scaled_dot_product_attention keeps no probabilities. No map is brought into NCHW order.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from fastseg.folding.find import find
from fastseg.kernels.blocks.tokens import map_to_tokens, tokens_to_map
from fastseg.training.mix_ffn import GELU_FORMS

from .hosts.names import EmbedNames
from .parts import Attention, MixFfn


def attention(modules: Attention, height: int, width: int, x: torch.Tensor) -> torch.Tensor:
    """The branch of an attention, with its LayerNorm: (B, H W, C) -> (B, H W, C)."""
    z = source = _normalized(x, modules.norm)
    if modules.reduction is not None:
        source = _normalized(_reduced(z, height, width, modules.reduction), modules.reduction_norm)
    query = F.linear(z, modules.query.weight, modules.query.bias)
    key, value = F.linear(source, *_joined(modules.key, modules.value)).chunk(2, dim=-1)

    def split(tokens: torch.Tensor) -> torch.Tensor:
        return tokens.unflatten(2, (modules.heads, -1)).transpose(1, 2)

    context = F.scaled_dot_product_attention(split(query), split(key), split(value))
    context = context.transpose(1, 2).flatten(2)
    return F.linear(context, modules.output.weight, modules.output.bias)


def _normalized(x: torch.Tensor, norm: Any) -> torch.Tensor:
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def _joined(key: Any, value: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias of one linear map to keys and values."""
    bias = None if key.bias is None else torch.cat([key.bias, value.bias])
    return torch.cat([key.weight, value.weight]), bias


def _reduced(z: torch.Tensor, height: int, width: int, convolution: Any) -> torch.Tensor:
    """Tokens of a convolution whose kernel is its stride; rows that fill no patch are left out."""
    side = convolution.stride[0]
    rows, columns = height // side, width // side
    if not rows or not columns:
        raise ValueError(
            f"pixel_values: expected an input that gives a grid of at least {side}, its spatial "
            f"reduction, on both sides, got one of {height}x{width}"
        )
    grid = z.unflatten(1, (height, width))[:, : rows * side, : columns * side]
    patches = grid.unflatten(1, (rows, side)).unflatten(3, (columns, side)).transpose(2, 3)
    # Each of (side, side, C); no size is left to be found, as a batch may be empty.
    patches = patches.reshape(len(z), rows * columns, side * side * z.shape[2])
    return F.linear(patches, convolution.weight.permute(0, 2, 3, 1).flatten(1), convolution.bias)


def mix_ffn_on_tokens(modules: MixFfn, height: int, width: int, x: torch.Tensor) -> torch.Tensor:
    """The branch of a Mix-FFN, with its LayerNorm: (B, H W, C) -> (B, H W, C)."""
    fc1, conv, fc2 = modules.fc1, modules.dwconv, modules.fc2
    hidden = F.linear(_normalized(x, modules.norm), fc1.weight, fc1.bias)
    feature_map = tokens_to_map(hidden, height, width)
    convolved = F.conv2d(feature_map, conv.weight, conv.bias, padding=1, groups=len(conv.weight))
    activated = F.gelu(map_to_tokens(convolved), approximate=GELU_FORMS[modules.activation])
    return F.linear(activated, fc2.weight, fc2.bias)


def patch_embedding(
    embed: Any, names: EmbedNames, feature_map: torch.Tensor
) -> tuple[torch.Tensor, int, int]:
    """Tokens (B, H W, C) of a map, H and W: rows of what the convolution gives are tokens."""
    channels_last = feature_map.contiguous(memory_format=torch.channels_last)
    embedded = find(embed, names.proj)(channels_last)
    height, width = embedded.shape[2:]
    return find(embed, names.norm)(map_to_tokens(embedded)), height, width

"""Tables of names: the parts of a host's Transformer layer and patch embedding.

Names are dotted paths from the layer. In eval mode a layer computes

    x = x + attention(attention_norm(x));  x = x + ffn(ffn_norm(x))

and in training mode stochastic depth drops what is added to x.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

Tokens = torch.Tensor  # (B, H * W, C)
HostCall = Callable[[Any, Tokens, int, int], Tokens]


@dataclass(frozen=True)
class LayerNames:
    """Names in one Transformer layer, and how the host calls it.

    Args:
        query, key, value: linear maps; or `key_value`, one map to keys and values, keys first; or
            `in_projection`, an `nn.MultiheadAttention`.
        reduction, reduction_norm: absent where a layer does not reduce its keys and values.
        fc1, fc2: linear maps or 1x1 convolutions.
        activation: the function between the depthwise convolution and fc2; GELU where there is
            nothing of that name.
        mixes_channels: whether the reduction is that of KerasCV; no other library has it.
        call: the whole layer on tokens (B, H * W, C).
        call_attention, call_ffn: one half of it, with norm and residual.
        drop_path: the module of stochastic depth, where `call_attention` and `call_ffn` are right
            in training mode too.
        attention_dropouts, ffn_dropouts: modules of dropout, or shares that are dropped.
    """

    attention_norm: str
    attention: str
    output: str
    reduction: str
    reduction_norm: str
    num_heads: str
    ffn_norm: str
    ffn: str
    fc1: str
    dwconv: str
    activation: str
    fc2: str
    call: HostCall
    call_attention: HostCall
    call_ffn: HostCall
    query: str = ""
    key: str = ""
    value: str = ""
    key_value: str = ""
    in_projection: str = ""
    mixes_channels: str = ""
    drop_path: str = ""
    attention_dropouts: tuple[str, ...] = ()
    ffn_dropouts: tuple[str, ...] = ()


@dataclass(frozen=True)
class EmbedNames:
    """Names in a patch embedding; `call` gives tokens (B, H * W, C), H and W."""

    proj: str
    norm: str
    call: Callable[[Any, torch.Tensor], tuple[Tokens, int, int]]


def tokens_of(feature_map: torch.Tensor) -> tuple[Tokens, int, int]:
    """(B, C, H, W) as tokens, H and W."""
    height, width = feature_map.shape[2:]
    return feature_map.flatten(2).transpose(1, 2), height, width


def _map_of(x: Tokens, height: int, width: int) -> torch.Tensor:
    return x.transpose(1, 2).unflatten(2, (height, width))


def _dropped(layer: Any, branch: Tokens) -> Tokens:
    dropout = getattr(layer, "hidden_dropout", None)
    return branch if dropout is None else dropout(branch)


# transformers 4.x and 5.0 to 5.8
TRANSFORMERS_OLD = LayerNames(
    attention_norm="layer_norm_1",
    attention="attention",
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    output="attention.output.dense",
    reduction="attention.self.sr",
    reduction_norm="attention.self.layer_norm",
    num_heads="attention.self.num_attention_heads",
    ffn_norm="layer_norm_2",
    ffn="mlp",
    fc1="mlp.dense1",
    dwconv="mlp.dwconv.dwconv",
    activation="mlp.intermediate_act_fn",
    fc2="mlp.dense2",
    call=lambda layer, x, h, w: layer(x, h, w)[0],
    call_attention=lambda layer, x, h, w: (
        layer.drop_path(layer.attention(layer.layer_norm_1(x), h, w)[0]) + x
    ),
    call_ffn=lambda layer, x, h, w: layer.drop_path(layer.mlp(layer.layer_norm_2(x), h, w)) + x,
    drop_path="drop_path",
    attention_dropouts=("attention.self.dropout", "attention.output.dropout"),
    ffn_dropouts=("mlp.dropout",),
)
# transformers from 5.9
TRANSFORMERS_NEW = LayerNames(
    attention_norm="layernorm_before",
    attention="attention",
    query="attention.q_proj",
    key="attention.k_proj",
    value="attention.v_proj",
    output="attention.o_proj",
    reduction="attention.sequence_reduction.sequence_reduction",
    reduction_norm="attention.sequence_reduction.layer_norm",
    num_heads="attention.num_attention_heads",
    ffn_norm="layernorm_after",
    ffn="mlp",
    fc1="mlp.fc1",
    dwconv="mlp.dwconv.dwconv",
    activation="mlp.activation_fn",
    fc2="mlp.fc2",
    call=lambda layer, x, h, w: layer(x, h, w),
    call_attention=lambda layer, x, h, w: (
        layer.drop_path(_dropped(layer, layer.attention(layer.layernorm_before(x), h, w)[0])) + x
    ),
    call_ffn=lambda layer, x, h, w: layer.drop_path(layer.mlp(layer.layernorm_after(x), h, w)) + x,
    drop_path="drop_path",
    attention_dropouts=("attention.attention_dropout", "hidden_dropout"),
    ffn_dropouts=("mlp.dropout",),
)
# transformers' PVT v2, whose layers are a SegFormer's
PVT_V2 = LayerNames(
    attention_norm="layer_norm_1",
    attention="attention",
    query="attention.query",
    key="attention.key",
    value="attention.value",
    output="attention.proj",
    reduction="attention.spatial_reduction",
    reduction_norm="attention.layer_norm",
    num_heads="attention.num_attention_heads",
    ffn_norm="layer_norm_2",
    ffn="mlp",
    fc1="mlp.dense1",
    dwconv="mlp.dwconv.dwconv",
    activation="mlp.intermediate_act_fn",
    fc2="mlp.dense2",
    call=lambda layer, x, h, w: layer(x, h, w)[0],
    call_attention=lambda layer, x, h, w: x + layer.attention(layer.layer_norm_1(x), h, w)[0],
    call_ffn=lambda layer, x, h, w: x + layer.mlp(layer.layer_norm_2(x), h, w),
)
_NVLABS: dict[str, Any] = {
    "attention_norm": "norm1",
    "attention": "attn",
    "query": "attn.q",
    "key_value": "attn.kv",
    "output": "attn.proj",
    "reduction": "attn.sr",
    "reduction_norm": "attn.norm",
    "num_heads": "attn.num_heads",
    "ffn_norm": "norm2",
    "ffn": "mlp",
    "fc1": "mlp.fc1",
    "dwconv": "mlp.dwconv.dwconv",
    "activation": "mlp.act",
    "fc2": "mlp.fc2",
    "call_attention": lambda layer, x, h, w: x + layer.attn(layer.norm1(x), h, w),
    "call_ffn": lambda layer, x, h, w: x + layer.mlp(layer.norm2(x), h, w),
}
NVLABS = LayerNames(call=lambda layer, x, h, w: layer(x, h, w), **_NVLABS)
NVLABS_HEAD = replace(NVLABS, num_heads="attn.head")  # as sithu31296's copy has them
# segmentation_models_pytorch: NVlabs' names, and layers that map maps to maps.
SMP = LayerNames(call=lambda layer, x, h, w: tokens_of(layer(_map_of(x, h, w)))[0], **_NVLABS)
# timm's PVT v2
TIMM = LayerNames(
    call=lambda layer, x, h, w: layer(x, (h, w)),
    **{
        **_NVLABS,
        "dwconv": "mlp.dwconv",
        "call_attention": lambda layer, x, h, w: x + layer.attn(layer.norm1(x), (h, w)),
        "call_ffn": lambda layer, x, h, w: x + layer.mlp(layer.norm2(x), (h, w)),
    },
)
# open-mmlab mmseg 1.x, whose attention and feed-forward add the residual themselves
MMSEG = LayerNames(
    attention_norm="norm1",
    attention="attn",
    in_projection="attn.attn",
    output="attn.attn.out_proj",
    reduction="attn.sr",
    reduction_norm="attn.norm",
    num_heads="attn.attn.num_heads",
    ffn_norm="norm2",
    ffn="ffn",
    fc1="ffn.layers.0",
    dwconv="ffn.layers.1",
    activation="ffn.layers.2",
    fc2="ffn.layers.4",
    call=lambda layer, x, h, w: layer(x, (h, w)),
    call_attention=lambda layer, x, h, w: layer.attn(layer.norm1(x), (h, w), identity=x),
    call_ffn=lambda layer, x, h, w: layer.ffn(layer.norm2(x), (h, w), identity=x),
)

TRANSFORMERS_EMBED = EmbedNames("proj", "layer_norm", lambda embed, x: embed(x))
NVLABS_EMBED = EmbedNames("proj", "norm", lambda embed, x: embed(x))
SMP_EMBED = EmbedNames("proj", "norm", lambda embed, x: tokens_of(embed(x)))
TIMM_EMBED = EmbedNames("proj", "norm", lambda embed, x: _of_grid(embed(x)))
MMSEG_EMBED = EmbedNames("projection", "norm", lambda embed, x: _flat(embed(x)))


def _of_grid(grid: torch.Tensor) -> tuple[Tokens, int, int]:
    return grid.flatten(1, 2), *grid.shape[1:3]


def _flat(output: Any) -> tuple[Tokens, int, int]:
    tokens, (height, width) = output
    return tokens, height, width

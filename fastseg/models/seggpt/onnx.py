"""A SegGPT as nodes of an ONNX graph.

Tokens are (B, H, W, C) throughout, the two streams one behind the other in the batch until they
merge. Attention is by longer vectors, as in `attention.py`: of the forms that need no loop it is
the one with the fewest passes over all scores, and so with the least memory.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from fastseg.exporting import onnx_forms as forms
from fastseg.exporting.onnx_graph import OnnxGraph, Size, Values

from .encoder_plan import LayerPlan

TO_NCHW, TO_NHWC = [0, 3, 1, 2], [0, 2, 3, 1]


def write(graph: OnnxGraph, folded: Any, batch: Size) -> Values:
    """Append the nodes of a `FoldedSegGpt`, and return its output."""
    with graph.scope("embeddings"):
        tokens = _embed(graph, folded)
    config = folded.model.config
    taken = config.intermediate_hidden_state_indices
    features = []
    for index, layer in enumerate(folded.encoder.layers[: max(taken) + 1]):
        with graph.scope(f"layer{index}"):
            tokens = _layer(graph, layer, tokens)
        if index == config.merge_index:
            shape = graph.integers([2, -1, *folded.grid, folded.projection.out_channels])
            streams = graph.op("Reshape", tokens, shape)
            tokens = forms.mean(graph, streams, [0], keepdims=0)
        if index in taken:
            features.append(_norm(graph, tokens, folded.model.model.encoder.layernorm))
    with graph.scope("decoder"):
        colours = _decode(graph, folded, graph.op("Concat", *features, axis=-1))
    graph.output(colours, folded.output)
    height, width = folded.image_size
    return {folded.output: (np.float32, (batch, 3, 2 * height, width))}


def _embed(graph: OnnxGraph, folded: Any) -> str:
    """Tokens of both streams, images first."""
    image, prompt, mask = map(graph.narrowed, folded.inputs)
    images = _patches(graph, graph.op("Concat", prompt, image, axis=2), folded.projection)
    masks = _patches(graph, mask, folded.projection)
    below = graph.integers([0, 0, 0, 0, 0, folded.grid[0] // 2, 0, 0])
    masks = graph.op("Pad", masks, below)
    of_images, of_masks = folded.added()
    images = graph.op("Add", images, graph.weight("images", of_images))
    masks = graph.op("Add", masks, graph.weight("masks", of_masks))
    return graph.op("Concat", images, masks, axis=0)


def _patches(graph: OnnxGraph, pixels: str, projection: nn.Conv2d) -> str:
    patch = list(projection.kernel_size)
    weights = _weights(graph, projection)
    patches = graph.op("Conv", pixels, *weights, kernel_shape=patch, strides=patch)
    return graph.op("Transpose", patches, perm=TO_NHWC)


def _layer(graph: OnnxGraph, plan: LayerPlan, tokens: str) -> str:
    layer, mlp = plan.layer, plan.layer.mlp
    with graph.scope("attention"):
        context = _attend(graph, plan, _norm(graph, tokens, layer.layernorm_before))
        attended = _linear(graph, "proj", context, layer.attention.proj)
        tokens = graph.op("Add", tokens, attended)
    with graph.scope("mlp"):
        hidden = _linear(graph, "lin1", _norm(graph, tokens, layer.layernorm_after), mlp.lin1)
        hidden = forms.activate(graph, hidden, plan.mlp.folded()["activation"])
        return graph.op("Add", tokens, _linear(graph, "lin2", hidden, mlp.lin2))


def _attend(graph: OnnxGraph, plan: LayerPlan, tokens: str) -> str:
    """Attention of normalised tokens between its linear maps, (B, H, W, C)."""
    folded, qkv = plan.attention.folded(), plan.layer.attention.qkv
    rows, columns, heads, scale = (folded[n] for n in ("rows", "columns", "heads", "scale"))
    height, d, _ = rows.shape
    width, keys = len(columns), len(rows) * len(columns)

    def by_head(name: str, index: int, perm: list[int], factor: float = 1.0) -> str:
        weight = qkv.weight.chunk(3)[index] * factor
        bias = None if qkv.bias is None else qkv.bias.chunk(3)[index] * factor
        projected = forms.linear(graph, name, tokens, weight, bias)
        split = graph.op("Reshape", projected, graph.integers([0, keys, heads, d]))
        return graph.op("Transpose", split, perm=perm)

    query = by_head("query", 0, [0, 2, 1, 3], scale)  # tables are over the scale in return
    query = graph.op("Reshape", query, graph.integers([0, 0, height, width, d]))
    by_row = graph.op("MatMul", query, graph.weight("rows", rows / scale))
    turned = graph.op("Transpose", query, perm=[0, 1, 3, 2, 4])
    by_column = graph.op("MatMul", turned, graph.weight("columns", columns / scale))
    by_column = graph.op("Transpose", by_column, perm=[0, 1, 3, 2, 4])
    longer = graph.op("Concat", query, by_row, by_column, axis=-1)
    longer = graph.op("Reshape", longer, graph.integers([0, 0, keys, d + height + width]))

    key = by_head("key", 1, [0, 2, 3, 1])
    key = graph.op("Pad", key, graph.integers([0, 0, 0, 0, 0, 0, height + width, 0]))
    units = [
        torch.zeros(keys, d),
        torch.eye(height).repeat_interleave(width, 0),
        torch.eye(width).repeat(height, 1),
    ]
    key = graph.op("Add", key, graph.weight("units", torch.cat(units, 1).t()))

    scores = graph.op("Softmax", graph.op("MatMul", longer, key), axis=-1)
    context = graph.op("MatMul", scores, by_head("value", 2, [0, 2, 1, 3]))
    context = graph.op("Transpose", context, perm=[0, 2, 1, 3])
    return graph.op("Reshape", context, graph.integers([0, height, width, heads * d]))


def _decode(graph: OnnxGraph, folded: Any, features: str) -> str:
    """Features (B, H, W, k C) to painted pixels (B, 3, H p, W p)."""
    decoder, plan = folded.model.decoder, folded.decoder.whole.folded()
    head = decoder.decoder_pred
    patch = plan["patch"]
    pixels = _linear(graph, "embed", features, decoder.decoder_embed)
    # Its channels are those of each pixel of a patch, row by row.
    pixels = graph.op("Transpose", pixels, perm=TO_NCHW)
    pixels = graph.op("DepthToSpace", pixels, blocksize=patch)
    weights = _weights(graph, head.conv)
    pixels = graph.op("Conv", pixels, *weights, kernel_shape=[3, 3], pads=[1] * 4)
    pixels = _norm(graph, graph.op("Transpose", pixels, perm=TO_NHWC), head.layernorm)
    pixels = forms.activate(graph, pixels, plan["activation"])
    weight, bias = head.head.weight.flatten(1), head.head.bias
    return graph.op("Transpose", forms.linear(graph, "head", pixels, weight, bias), perm=TO_NCHW)


def _norm(graph: OnnxGraph, x: str, norm: nn.LayerNorm) -> str:
    return forms.layer_norm(graph, x, norm.eps, len(norm.weight), norm.weight, norm.bias)


def _linear(graph: OnnxGraph, name: str, x: str, linear: nn.Linear) -> str:
    return forms.linear(graph, name, x, linear.weight, linear.bias)


def _weights(graph: OnnxGraph, conv: nn.Conv2d) -> list[str]:
    weights = [graph.weight("weight", conv.weight)]
    return weights if conv.bias is None else [*weights, graph.weight("bias", conv.bias)]

"""A model of stages as nodes of an ONNX graph.

By hand and not by tracing: the graph then has half the nodes of a traced one, and the forms that
runtimes are quick with. Tokens stay a grid (B, H, W, C), so shapes need no arithmetic: a reshape is
by 0 and -1, or to the shape of the grid. Linear maps around a depthwise convolution are 1x1
convolutions in NCHW, so that only the narrow tensor is transposed, never the hidden one: that is
5% (ONNX Runtime) and 15% (OpenVINO) quicker than matrix products on tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from fastseg.kernels import DecodeHeadWeights, PatchEmbedWeights

from . import onnx_forms as forms
from .folded import FoldedLayer, FoldedStage
from .onnx_graph import OnnxGraph

TO_NCHW, TO_NHWC = [0, 3, 1, 2], [0, 2, 3, 1]


class OnnxStages:
    """Writer of a model's parts into a graph; maps and tokens go by their names there.

    Args:
        image: the name of the input.
    """

    def __init__(self, graph: OnnxGraph, image: str) -> None:
        self.graph = graph
        self.image = image
        self.tokens = ""  # of the stage at hand, (B, H, W, C)

    def encode(self, stages: Sequence[FoldedStage]) -> list[str]:
        """The maps (B, C, H, W) of all stages."""
        graph, feature_map, maps = self.graph, self.graph.narrowed(self.image), []
        for index, stage in enumerate(stages):
            with graph.scope(f"stage{index + 1}"):
                with graph.scope("embed"):
                    self.tokens = self._embed(feature_map, stage.embed)
                shape = graph.op("Shape", self.tokens)
                for number, layer in enumerate(stage.layers):
                    with graph.scope(f"layer{number}"):
                        self._layer(layer, stage.channels, shape)
                with graph.scope("norm"):
                    norm = stage.norm
                    self.tokens = forms.layer_norm(
                        graph, self.tokens, norm.eps, stage.channels, norm.weight, norm.bias
                    )
                    feature_map = graph.op("Transpose", self.tokens, perm=TO_NCHW)
            maps.append(feature_map)
        return maps

    def decode(self, maps: Sequence[str], head: DecodeHeadWeights) -> str:
        """Logits (B, K, H_1, W_1) of the maps of all stages."""
        graph = self.graph
        with graph.scope("decode_head"):
            fused = forms.conv1x1(graph, "fuse1", maps[0], head.weights[0], head.bias)
            size = graph.op("Shape", fused)
            for index, weight in enumerate(head.weights[1:], start=1):
                projected = forms.conv1x1(graph, f"fuse{index + 1}", maps[index], weight)
                fused = graph.op("Add", fused, forms.resize(graph, projected, size))
            assert head.classifier_weight is not None
            bias = head.classifier_bias
            weight = head.classifier_weight
            return forms.conv1x1(graph, "classifier", graph.op("Relu", fused), weight, bias)

    def probabilities(self, logits: str) -> str:
        """The softmax of logits over the classes, which of old opsets takes the last axis alone."""
        graph = self.graph
        by_pixel = graph.op("Transpose", logits, perm=TO_NHWC)
        return graph.op("Transpose", graph.op("Softmax", by_pixel, axis=-1), perm=TO_NCHW)

    def labels(
        self, logits: str, size: tuple[int, int] | None, dtype: torch.dtype, classes: int
    ) -> None:
        """The highest class of each pixel, resized to `size`, or to the input's for None."""
        graph = self.graph
        with graph.scope("labels"):
            start = forms.sides(graph, logits, 0, 2)
            end = forms.sides(graph, self.image, 2, 4) if size is None else graph.integers(size)
            target = graph.op("Concat", start, end, axis=0)
            resized = forms.resize(graph, logits, target)
            if classes == 1:  # is it, or is it not
                label = graph.op("Greater", resized, graph.number(0.0, np.float32))
            else:
                label = graph.largest(resized, axis=1)
            if classes == 1 or dtype == torch.uint8:
                label = graph.cast(label, np.uint8 if dtype == torch.uint8 else np.int64)
            forms.squeeze(graph, label, 1, output="labels")

    def classify(self, classifier: nn.Linear) -> str:
        """Logits (B, K) of the mean over the tokens of the last stage."""
        graph = self.graph
        with graph.scope("classifier"):
            mean = forms.mean(graph, self.tokens, [1, 2], keepdims=0)
            weight = graph.weight("weight", classifier.weight)
            bias = graph.weight("bias", classifier.bias)
            return graph.op("Gemm", mean, weight, bias, transB=1)

    def _embed(self, feature_map: str, embed: PatchEmbedWeights) -> str:
        graph = self.graph
        channels, _, kernel, _ = embed.weight.shape
        embedded = graph.op(
            "Conv",
            feature_map,
            graph.weight("weight", embed.weight),
            graph.weight("bias", embed.bias),
            kernel_shape=[kernel, kernel],
            strides=[embed.stride] * 2,
            pads=[embed.padding] * 4,
        )
        tokens = graph.op("Transpose", embedded, perm=TO_NHWC)
        affine = embed.norm_weight, embed.norm_bias
        return forms.layer_norm(graph, tokens, embed.eps, channels, *affine)

    def _layer(self, layer: FoldedLayer, channels: int, shape: str) -> None:
        graph = self.graph
        attention = layer.attention
        with graph.scope("attention"):
            normalized = forms.layer_norm(graph, self.tokens, attention.eps, channels)
            reduced = self._reduce(normalized, attention, channels, shape)
            attend = self._one_head if attention.num_heads == 1 else self._heads
            attended = attend(normalized, reduced, attention, channels, shape)
            self.tokens = graph.op("Add", self.tokens, attended)
        ffn = layer.mix_ffn
        with graph.scope("mix_ffn"):
            normalized = forms.layer_norm(graph, self.tokens, ffn.eps, channels)
            hidden = graph.op("Transpose", normalized, perm=TO_NCHW)
            hidden = forms.conv1x1(graph, "fc1", hidden, ffn.fc1_weight, ffn.fc1_bias)
            hidden = graph.op(
                "Conv",
                hidden,
                graph.weight("dwconv.weight", ffn.dwconv_weight),
                graph.weight("dwconv.bias", ffn.dwconv_bias),
                kernel_shape=[3, 3],
                pads=[1] * 4,
                group=len(ffn.dwconv_bias),
            )
            hidden = forms.activate(graph, hidden, ffn.activation)
            mixed = forms.conv1x1(graph, "fc2", hidden, ffn.fc2_weight, ffn.fc2_bias)
            mixed = graph.op("Transpose", mixed, perm=TO_NHWC)
            self.tokens = graph.op("Add", self.tokens, mixed)

    def _reduce(self, normalized: str, attention: Any, channels: int, shape: str) -> str:
        """Normalised tokens of the reduced grid, (B, M, C)."""
        graph = self.graph
        ratio = attention.sr_ratio
        if ratio == 1:
            return graph.op("Reshape", normalized, graph.integers([0, -1, channels]))
        mixes = attention.norm_weight is not None
        if mixes:
            affine = attention.norm_weight, attention.norm_bias
            tokens = forms.layer_norm(graph, self.tokens, attention.eps, channels, *affine)
            normalized = graph.op("Reshape", graph.op("Transpose", tokens, perm=TO_NCHW), shape)
        weight = attention.sr_weight.unflatten(1, (ratio, ratio, channels)).permute(0, 3, 1, 2)
        reduced = graph.op(
            "Conv",
            graph.op("Transpose", normalized, perm=TO_NCHW),
            graph.weight("sr.weight", weight),
            graph.weight("sr.bias", attention.sr_bias),
            kernel_shape=[ratio, ratio],
            strides=[ratio, ratio],
        )
        if mixes:
            reduced = graph.op("Transpose", reduced, perm=TO_NHWC)
        reduced = graph.op("Reshape", reduced, graph.integers([0, channels, -1]))
        reduced = graph.op("Transpose", reduced, perm=[0, 2, 1])
        return forms.layer_norm(graph, reduced, attention.sr_eps, channels)

    def _one_head(
        self, normalized: str, reduced: str, attention: Any, channels: int, shape: str
    ) -> str:
        """Attention whose query and output projections the few keys and values have absorbed.

        The offset of each key's scores is one more channel of the keys, and of the queries one that
        is 1: as an addition it would pass over all scores.
        """
        graph = self.graph
        key_weight, value_weight = attention.key_value_weight.chunk(2)
        key_weight = torch.cat([key_weight, attention.key_offset_weight[None]])
        query = graph.op("Reshape", normalized, graph.integers([0, -1, channels]))
        query = graph.op("Pad", query, graph.integers([0, 0, 0, 0, 0, 1]), graph.number(1.0))
        # Weights are second in products: tools that quantise scale them by column.
        keys = forms.linear(graph, "key", reduced, key_weight)
        keys = graph.op("Transpose", keys, perm=[0, 2, 1])
        values = forms.linear(graph, "value", reduced, value_weight, attention.output_bias)
        scores = graph.op("MatMul", query, keys)
        context = graph.op("MatMul", graph.op("Softmax", scores, axis=-1), values)
        return graph.op("Reshape", context, shape)

    def _heads(
        self, normalized: str, reduced: str, attention: Any, channels: int, shape: str
    ) -> str:
        graph = self.graph
        heads = attention.num_heads
        split = graph.integers([0, -1, heads, channels // heads])

        def by_head(tokens: str, perm: list[int]) -> str:
            return graph.op("Transpose", graph.op("Reshape", tokens, split), perm=perm)

        key_weight, value_weight = attention.key_value_weight.chunk(2)
        query = forms.linear(
            graph, "query", normalized, attention.query_weight, attention.query_bias
        )
        query = by_head(query, [0, 2, 1, 3])
        keys = by_head(forms.linear(graph, "key", reduced, key_weight), [0, 2, 3, 1])
        values = by_head(forms.linear(graph, "value", reduced, value_weight), [0, 2, 1, 3])
        scores = graph.op("MatMul", query, keys)
        context = graph.op("MatMul", graph.op("Softmax", scores, axis=-1), values)
        context = graph.op("Transpose", context, perm=[0, 2, 1, 3])
        context = graph.op("Reshape", context, shape)
        return forms.linear(
            graph, "output", context, attention.output_weight, attention.output_bias
        )

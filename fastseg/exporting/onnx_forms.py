"""Forms of operators: linear maps, activations, and what older opsets have in other forms."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from .onnx_graph import OnnxGraph

BILINEAR = {"mode": "linear", "coordinate_transformation_mode": "half_pixel"}

# The first opset with a form of an operator, or with the operator at all.
_RESIZE_BY_SIZES_ALONE = 13
_SQUEEZE_BY_INPUT = 13
_PART_OF_SHAPE = 15
_LAYER_NORM = 17
_MISH = 18
_REDUCE_BY_INPUT = 18
_GELU = 20


def layer_norm(
    graph: OnnxGraph,
    x: str,
    eps: float,
    channels: int,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> str:
    """LayerNorm over the last axis, of `channels`."""
    shift = [] if bias is None else [graph.weight("shift", bias)]
    if graph.opset >= _LAYER_NORM:
        scale = graph.weight("scale", torch.ones(channels) if weight is None else weight)
        return graph.op("LayerNormalization", x, scale, *shift, axis=-1, epsilon=float(eps))
    # In float32, as the operator's own statistics are.
    x = graph.widened(x)
    centred = graph.op("Sub", x, mean(graph, x, [-1], keepdims=1))
    square = graph.op("Pow", centred, graph.number(2.0, np.float32))
    variance = mean(graph, square, [-1], keepdims=1)
    variance = graph.op("Add", variance, graph.number(float(eps), np.float32))
    normal = graph.narrowed(graph.op("Div", centred, graph.op("Sqrt", variance)))
    if weight is not None:
        normal = graph.op("Mul", normal, graph.weight("scale", weight))
    return graph.op("Add", normal, *shift) if shift else normal


def linear(
    graph: OnnxGraph, name: str, x: str, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> str:
    """A linear map of the last axis; `weight` is (out, in)."""
    product = graph.op("MatMul", x, graph.weight(f"{name}_weight", weight.t()))
    if bias is None:
        return product
    return graph.op("Add", product, graph.weight(f"{name}_bias", bias))


def conv1x1(
    graph: OnnxGraph,
    name: str,
    feature_map: str,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> str:
    """A linear map of the channels of an NCHW map; `weight` is (out, in)."""
    parameters = [graph.weight(f"{name}.weight", weight[:, :, None, None])]
    if bias is not None:
        parameters.append(graph.weight(f"{name}.bias", bias))
    return graph.op("Conv", feature_map, *parameters, kernel_shape=[1, 1])


def mean(graph: OnnxGraph, x: str, axes: Sequence[int], keepdims: int) -> str:
    """The mean over `axes`."""
    if graph.opset >= _REDUCE_BY_INPUT:
        return graph.op("ReduceMean", x, graph.integers(axes), keepdims=keepdims)
    return graph.op("ReduceMean", x, axes=list(axes), keepdims=keepdims)


def resize(graph: OnnxGraph, x: str, size: str) -> str:
    """An NCHW map resized to the shape `size`, bilinear."""
    left_out = "" if graph.opset >= _RESIZE_BY_SIZES_ALONE else graph.nothing()
    return graph.op("Resize", x, left_out, left_out, size, **BILINEAR)


def sides(graph: OnnxGraph, x: str, start: int, end: int) -> str:
    """The lengths of the axes from `start` to `end` of a value."""
    if graph.opset >= _PART_OF_SHAPE:
        return graph.op("Shape", x, start=start, end=end)
    return graph.op("Slice", graph.op("Shape", x), graph.integers([start]), graph.integers([end]))


def squeeze(graph: OnnxGraph, x: str, axis: int, output: str) -> str:
    """A value without an axis of length 1."""
    if graph.opset >= _SQUEEZE_BY_INPUT:
        return graph.op("Squeeze", x, graph.integers([axis]), output=output)
    return graph.op("Squeeze", x, output=output, axes=[axis])


def activate(graph: OnnxGraph, x: str, name: str) -> str:
    """The function of `kernels.blocks.activations.ACTIVATIONS` of that name."""
    return _ACTIVATIONS[name](graph, x)


def _gelu(graph: OnnxGraph, x: str) -> str:
    if graph.opset >= _GELU:
        return graph.op("Gelu", x)
    erf = graph.op("Erf", graph.op("Mul", x, graph.number(0.5**0.5)))
    half = graph.op("Mul", x, graph.number(0.5))
    return graph.op("Mul", half, graph.op("Add", erf, graph.number(1.0)))


def _gelu_tanh(graph: OnnxGraph, x: str) -> str:
    """Write GELU in its tanh form as x times the sigmoid of twice the tanh's argument."""
    if graph.opset >= _GELU:
        return graph.op("Gelu", x, approximate="tanh")
    square = graph.op("Mul", x, x)
    factor = graph.op("Mul", square, graph.number(2 * 0.044715 * (2 / np.pi) ** 0.5))
    factor = graph.op("Add", factor, graph.number(2 * (2 / np.pi) ** 0.5))
    return graph.op("Mul", x, graph.op("Sigmoid", graph.op("Mul", x, factor)))


def _mish(graph: OnnxGraph, x: str) -> str:
    if graph.opset >= _MISH:
        return graph.op("Mish", x)
    return graph.op("Mul", x, graph.op("Tanh", graph.op("Softplus", x)))


def _silu(graph: OnnxGraph, x: str, slope: float = 1.0) -> str:
    scaled = x if slope == 1.0 else graph.op("Mul", x, graph.number(slope))
    return graph.op("Mul", x, graph.op("Sigmoid", scaled))


_ACTIVATIONS: dict[str, Callable[[OnnxGraph, str], str]] = {
    "gelu": _gelu,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "mish": _mish,
    "quick_gelu": lambda graph, x: _silu(graph, x, 1.702),
    "relu": lambda graph, x: graph.op("Relu", x),
    "relu6": lambda graph, x: graph.op("Clip", x, graph.number(0.0), graph.number(6.0)),
    "selu": lambda graph, x: graph.op("Selu", x),
    "silu": _silu,
    "swish": _silu,
}

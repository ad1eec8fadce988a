"""A folded model as an ONNX graph, written node by node.

By hand and not by tracing: the graph then has half the nodes of a traced one, and the forms that
runtimes are quick with.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from .folded import FoldedModel
from .onnx_graph import OnnxGraph, Size

MIN_OPSET = 11  # before it Resize knows no half pixels


def build(
    folded: FoldedModel,
    *,
    batch: int | None,
    height: int | None,
    width: int | None,
    labels: bool | tuple[int, int],
    label_dtype: torch.dtype,
    opset: int,
    dtype: torch.dtype = torch.float32,
) -> Any:
    """The `onnx.ModelProto` of a float32 model; arguments as those of `fastseg.export`."""
    graph = OnnxGraph(opset, np.float16 if dtype == torch.float16 else np.float32)
    shape: list[Size] = [
        "batch" if batch is None else batch,
        folded.num_channels,
        "height" if height is None else height,
        "width" if width is None else width,
    ]
    outputs = folded.write(graph, shape, labels, label_dtype)
    inputs = {name: (np.float32, shape) for name in folded.inputs}
    return graph.model(inputs, outputs, folded.properties)

"""Forwards in PyTorch: by transformers' model, and by fastseg."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import fastseg
from fastseg.kernels.core.dispatch import requested_backend

from ..setting import Context

Forward = Callable[[torch.Tensor], torch.Tensor]  # pixel_values -> logits (B, K, h, w)


def eager(context: Context) -> Forward:
    model = context.transformers()
    return lambda pixel_values: model(pixel_values).logits


def compiled(context: Context, **options: Any) -> Forward:
    """`torch.compile`; other modes than the default replay CUDA graphs on a GPU."""
    model = context.transformers()
    model(context.pixel_values)  # sets hooks under a lock, which cannot be traced
    graph = torch.compile(model, **options)

    def forward(pixel_values: torch.Tensor) -> torch.Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return graph(pixel_values).logits

    return forward


def cuda_graph(context: Context) -> Forward:
    """The eager model captured in a CUDA graph. Logits are those of the last call."""
    model = context.transformers()
    pixels = context.pixel_values.clone()
    replay = capture(lambda: model(pixels).logits)

    def forward(pixel_values: torch.Tensor) -> torch.Tensor:
        pixels.copy_(pixel_values)
        return replay()

    return forward


def capture(function: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """`function` as a CUDA graph: a call replays it, and gives the tensor that it writes."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # libraries set themselves up
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()

    def replay() -> torch.Tensor:
        graph.replay()
        return result

    return replay


def tensorrt(context: Context) -> Forward:
    """transformers' model by torch-tensorrt, in the dtypes of the model."""
    import torch_tensorrt

    inputs = (context.pixel_values,)
    program = torch.export.export(_Logits(context.transformers()).eval(), inputs)
    return torch_tensorrt.dynamo.compile(program, inputs=[*inputs], use_explicit_typing=True)


class _Logits(torch.nn.Module):
    """A model that gives its logits alone."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values).logits


def onnx_file(context: Context) -> Path:
    """transformers' own ONNX export of the model, by `torch.onnx.export`, for the very shapes."""
    path = context.folder / "transformers.onnx"
    if not path.exists():  # by the other runtime
        model = _Logits(context.transformers()).eval()
        options: dict[str, Any] = {"input_names": ["pixel_values"], "output_names": ["logits"]}
        options |= {"dynamo": True, "verbose": False}
        torch.onnx.export(model, (context.pixel_values,), path, **options)
    return path


# By fastseg


def ours(context: Context, backend: str) -> Forward:
    """Folded weights: by "eager" PyTorch on any device, by "triton" kernels launched one by one."""
    with fastseg.backend(backend):
        model = _folded(context.fastseg())

    def forward(pixel_values: torch.Tensor) -> torch.Tensor:
        with fastseg.backend(backend), fastseg.graphs(False):
            return model(pixel_values).logits

    return forward


def ours_accelerate(context: Context) -> Forward:
    """transformers' model after `fastseg.accelerate`, on a GPU with the graphs that it brings."""
    model = _folded(fastseg.accelerate(context.transformers(), strict=True))
    return lambda pixel_values: model(pixel_values).logits


def ours_compiled(context: Context) -> Forward:
    """`torch.compile` as it is without options."""
    model = _folded(context.fastseg())
    model(context.pixel_values)  # folds, before a graph takes the folded weights
    graph = torch.compile(model)
    return lambda pixel_values: graph(pixel_values).logits


def ours_cuda_graph(context: Context, check_weights: bool = True) -> Forward:
    """The kernels, replayed by `fastseg.graphed`, with its check of the weights in each call."""
    options: Any = {"copy_outputs": False, "check_weights": check_weights}
    with fastseg.backend("triton"):  # declined ops are errors
        runner = fastseg.graphed(_folded(context.fastseg()), **options)
        with torch.inference_mode():
            for _ in range(3):  # a capture comes with the second call of a shape
                runner(context.pixel_values)
    if " 0 replays" in runner.report():
        raise RuntimeError(f"no graph was replayed: {runner.report()}".replace("\n", "; "))

    def forward(pixel_values: torch.Tensor) -> torch.Tensor:
        with fastseg.backend("triton"):
            return runner(pixel_values).logits

    return forward


def _folded(model: Any) -> Any:
    """`model`, which must run on folded weights in all its parts, on a GPU by the kernels.

    Else it is a RuntimeError: its logits would be right, and its times another path's.
    """
    # "eager" is what a CPU runs.
    on_gpu = next(model.parameters()).is_cuda and requested_backend() != "eager"
    slow = (": plain", "the host's own", *(("folded, eager", " runs eagerly") if on_gpu else ()))
    lines = fastseg.report(model).splitlines()
    if wrong := [line for line in lines if any(words in line for words in slow)]:
        raise RuntimeError("not on the fast path: " + "; ".join(wrong))
    return model


def ours_onnx_file(context: Context) -> Path:
    """fastseg's ONNX export of the model, for the very shapes."""
    path, (height, width) = context.folder / "fastseg.onnx", context.setting.size
    if not path.exists():
        shape: Any = {"batch": context.setting.batch, "height": height, "width": width}
        # The gate of the case checks what comes of it.
        fastseg.export(context.fastseg(), path, check=False, **shape)
    return path

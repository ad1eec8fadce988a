"""Forwards by fastseg."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import fastseg
from fastseg.kernels.core.dispatch import requested_backend

from .context import Context, SkippedCase

Forward = Callable[[torch.Tensor], torch.Tensor]


def version() -> str:
    return fastseg.__version__


def eager(context: Context) -> Forward:
    """Folded weights, eager PyTorch, on any device."""
    return _forward(context, "eager")


def triton(context: Context) -> Forward:
    """The kernels, launched one by one."""
    _need_gpu(context)
    return _forward(context, "triton")


def _forward(context: Context, backend: str) -> Forward:
    with fastseg.backend(backend):
        model = _folded(context.fastseg())

    def forward(pixel_values: torch.Tensor) -> torch.Tensor:
        with fastseg.backend(backend):
            return model(pixel_values).logits

    return forward


def accelerate(context: Context) -> Forward:
    """transformers' model after `fastseg.accelerate`."""
    model = _folded(fastseg.accelerate(context.transformers(), strict=True))
    return lambda pixel_values: model(pixel_values).logits


def compiled(context: Context) -> Forward:
    """`torch.compile` as it is without options."""
    model = _folded(context.fastseg())
    model(context.pixel_values)  # folds, before a graph takes the folded weights
    graph = torch.compile(model)
    return lambda pixel_values: graph(pixel_values).logits


def cuda_graph(context: Context) -> Forward:
    """The kernels, replayed by `fastseg.graphed`, with its check of the weights in each call."""
    _need_gpu(context)
    with fastseg.backend("triton"):  # declined ops are errors
        runner = fastseg.graphed(_folded(context.fastseg()), copy_outputs=False)
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

    Raises:
        RuntimeError: it does not. Its logits would be right, and its times another path's.
    """
    # "eager" is what a CPU runs.
    on_gpu = next(model.parameters()).is_cuda and requested_backend() != "eager"
    slow = (": plain", "the host's own", *(("folded, eager", " runs eagerly") if on_gpu else ()))
    lines = fastseg.report(model).splitlines()
    if wrong := [line for line in lines if any(words in line for words in slow)]:
        raise RuntimeError("not on the fast path: " + "; ".join(wrong))
    return model


def _need_gpu(context: Context) -> None:
    if context.device.type != "cuda":
        raise SkippedCase("the kernels need a GPU")


def onnx_file(context: Context) -> Path:
    """fastseg's ONNX export of the model, for the very shapes."""
    height, width = context.setting.size

    def write(path: Path) -> None:
        batch = context.setting.batch
        # The gate of the case checks what comes of it.
        fastseg.export(
            context.fastseg(), path, batch=batch, height=height, width=width, check=False
        )

    return context.file("fastseg.onnx", write)

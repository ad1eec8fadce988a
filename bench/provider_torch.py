"""Forwards by models of other libraries in PyTorch."""

from __future__ import annotations

import copy
import importlib.metadata
from collections.abc import Callable
from typing import Any

import torch

from . import pairs
from .context import Context, SkippedCase

Forward = Callable[[torch.Tensor], torch.Tensor]

_CLASSES = 150
_WARM_UP_CALLS = 3  # before a graph is captured


def transformers_version() -> str:
    return importlib.metadata.version("transformers")


def smp_version() -> str:
    return importlib.metadata.version("segmentation-models-pytorch")


def tensorrt_version() -> str:
    return importlib.metadata.version("torch-tensorrt")


def eager(context: Context) -> Forward:
    model = context.transformers()
    return lambda pixel_values: model(pixel_values).logits


def compiled(context: Context) -> Forward:
    """`torch.compile` as it is without options."""
    return _compiled(context)


def max_autotune(context: Context) -> Forward:
    """`torch.compile(mode="max-autotune")`, which on a GPU replays CUDA graphs."""
    return _compiled(context, mode="max-autotune")


def _compiled(context: Context, **options: Any) -> Forward:
    model = context.transformers()
    model(context.pixel_values)  # sets hooks under a lock, which cannot be traced
    graph = torch.compile(model, **options)

    def forward(pixel_values: torch.Tensor) -> torch.Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return graph(pixel_values).logits

    return forward


def cuda_graph(context: Context) -> Forward:
    """The eager model captured in a CUDA graph. Logits are those of the last call."""
    if context.device.type != "cuda":
        raise SkippedCase("CUDA graphs need a GPU")
    model = context.transformers()
    pixels = context.pixel_values.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP_CALLS):
            model(pixels)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = model(pixels).logits

    def forward(pixel_values: torch.Tensor) -> torch.Tensor:
        pixels.copy_(pixel_values)
        graph.replay()
        return logits

    return forward


def tensorrt(context: Context) -> Forward:
    """transformers' model by torch-tensorrt, in the dtypes of the model."""
    if context.device.type != "cuda":
        raise SkippedCase("TensorRT needs a GPU")
    try:
        import torch_tensorrt
    except ImportError as error:
        raise SkippedCase(f"torch_tensorrt is not installed ({error})") from error
    model = _Logits(context.transformers()).eval()
    program = torch.export.export(model, (context.pixel_values,))
    engine = torch_tensorrt.dynamo.compile(
        program, inputs=[context.pixel_values], use_explicit_typing=True
    )
    return lambda pixel_values: engine(pixel_values)


class _Logits(torch.nn.Module):
    """A model that gives its logits alone."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values).logits


class SmpForward:
    """segmentation_models_pytorch's Segformer, with weights of its own.

    Its head is another one (no bias in the projections), so weights cannot be shared, and results
    are compared with a float64 run of itself.
    """

    def __init__(self, context: Context) -> None:
        try:
            import segmentation_models_pytorch as smp
        except Exception as error:  # it also fails inside, where torchvision does not fit torch
            raise SkippedCase(
                f"segmentation_models_pytorch does not import here ({error}); "
                "`python -m bench.hosts --hosts smp` measures it in a process of its own"
            ) from error
        from fastseg.models.segformer.presets import preset_config

        variant = context.setting.variant
        width = preset_config(f"segformer_{variant}").decoder_hidden_size
        self._model = smp.Segformer(
            f"mit_{variant}",
            encoder_weights=None,
            decoder_segmentation_channels=width,
            classes=_CLASSES,
            upsampling=1,  # logits at a quarter of the size, as everyone else gives them
        )
        pairs.draw_weights(self._model)
        self._model.eval().requires_grad_(False).to(context.device, context.dtype)

    def __call__(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self._model(pixel_values)

    def reference(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Its own logits in float64."""
        return copy.deepcopy(self._model).double()(pixel_values.double())


def smp(context: Context) -> Forward:
    return SmpForward(context)


def onnx_file(context: Context) -> Any:
    """transformers' own ONNX export of the model, by `torch.onnx.export`, for the very shapes."""

    def write(path: Any) -> None:
        model = _Logits(context.transformers()).eval()
        torch.onnx.export(
            model,
            (context.pixel_values,),
            path,
            dynamo=True,
            input_names=["pixel_values"],
            output_names=["logits"],
            verbose=False,
        )

    return context.file("transformers.onnx", write)

"""`warmup`: fold weights and compile kernels before the first request comes."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from fastseg import kernels
from fastseg.kernels import select_backend
from fastseg.kernels.core.launch import record_launches
from fastseg.kernels.core.optional_triton import interpreting


def warmup(model: nn.Module, shapes: Iterable[Sequence[int]]) -> None:
    """Run `model` on zeros for each shape of its input, twice: the second captures a CUDA graph.

    Kernels compile in processes of their own, as many as there are cores, and stay in Triton's
    cache on disk, so a later process starts quickly too. Logits
    of a segmentation model are also turned into an int64 label map of the input's size; a map of
    another size or dtype may still compile a kernel at its first call.

    Args:
        model: on its device, in eval mode.
        shapes: of pixels, (batch, channels, height, width), as in `[(1, 3, 512, 512)]`. A model of
            several inputs, as a SegGPT's image, prompt and mask, gets all in that shape.

    Raises:
        ValueError: the model is in training mode, or a shape is not four positive integers.
    """
    if model.training:
        raise ValueError("model: expected a model in eval mode, got one in training mode")
    parameter = next(model.parameters())
    shapes = list(shapes)
    for shape in shapes:
        if not isinstance(shape, Sequence) or len(shape) != 4 or min(shape) < 1:
            raise ValueError(
                "shapes: expected a list of (batch, channels, height, width), all positive, as "
                f"[(1, 3, 512, 512)], got {shape} in {shapes}"
            )
    with torch.no_grad():
        if select_backend(parameter.device)[0] == "triton" and not interpreting():
            from fastseg.kernels.tune.precompile import compile_missing

            with record_launches(dry=True) as launches:
                for shape in shapes:
                    _run(model, parameter.new_zeros(shape))
            compile_missing(launches)
        for shape in shapes:
            for _ in range(2):  # the second captures a CUDA graph
                _run(model, parameter.new_zeros(shape))
    if parameter.device.type == "cuda":
        torch.cuda.synchronize(parameter.device)


def _run(model: nn.Module, pixels: torch.Tensor) -> None:
    needed = [
        one
        for one in inspect.signature(model.forward).parameters.values()
        if one.kind is one.POSITIONAL_OR_KEYWORD and one.default is one.empty
    ]
    output = model(*[pixels] * max(len(needed), 1))
    logits = getattr(output, "logits", output)
    if isinstance(logits, torch.Tensor) and logits.ndim == 4:
        kernels.upsample_argmax(logits, pixels.shape[2:])

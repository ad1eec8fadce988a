"""Who computes a forward: all providers by name, and whether each can run here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from . import provider_fastseg, provider_runtimes, provider_torch
from .context import Context

BASELINE = "transformers eager"

Forward = Callable[[torch.Tensor], torch.Tensor]  # pixel_values -> logits (B, K, h, w)


@dataclass(frozen=True)
class Provider:
    """How to get a forward.

    Attributes:
        build: loads, converts and compiles; raises a SkippedCase with the reason where it cannot.
        version: of the library that computes; raises a PackageNotFoundError without it.
    """

    build: Callable[[Context], Forward]
    version: Callable[[], str]


_TORCH = provider_torch
_OURS = provider_fastseg
_RUNTIMES = provider_runtimes

# In the order of tables and plots. The first is the baseline.
PROVIDERS = {
    BASELINE: Provider(_TORCH.eager, _TORCH.transformers_version),
    "transformers compiled": Provider(_TORCH.compiled, _TORCH.transformers_version),
    "transformers max-autotune": Provider(_TORCH.max_autotune, _TORCH.transformers_version),
    "transformers CUDA graph": Provider(_TORCH.cuda_graph, _TORCH.transformers_version),
    "smp": Provider(_TORCH.smp, _TORCH.smp_version),
    "torch-tensorrt": Provider(_TORCH.tensorrt, _TORCH.tensorrt_version),
    "ONNX Runtime": Provider(_RUNTIMES.onnxruntime_theirs, _RUNTIMES.onnxruntime_version),
    "OpenVINO fp32": Provider(_RUNTIMES.openvino_theirs, _RUNTIMES.openvino_version),
    "OpenVINO default": Provider(_RUNTIMES.openvino_default_theirs, _RUNTIMES.openvino_version),
    "fastseg eager": Provider(_OURS.eager, _OURS.version),
    "fastseg accelerate": Provider(_OURS.accelerate, _OURS.version),
    "fastseg compiled": Provider(_OURS.compiled, _OURS.version),
    "fastseg Triton": Provider(_OURS.triton, _OURS.version),
    "fastseg CUDA graph": Provider(_OURS.cuda_graph, _OURS.version),
    "fastseg ONNX Runtime": Provider(_RUNTIMES.onnxruntime_ours, _RUNTIMES.onnxruntime_version),
    "fastseg OpenVINO fp32": Provider(_RUNTIMES.openvino_ours, _RUNTIMES.openvino_version),
    "fastseg OpenVINO default": Provider(
        _RUNTIMES.openvino_default_ours, _RUNTIMES.openvino_version
    ),
}
GRAPHS = ("transformers max-autotune", "transformers CUDA graph", "fastseg CUDA graph")
# A graph's memory is in a pool that is counted once, at the capture; TensorRT has its own.
UNCOUNTED_MEMORY = (*GRAPHS, "torch-tensorrt")
# Take many minutes of compiling for a model on a CPU, and only run where they are asked for.
SLOW_TO_BUILD_ON_A_CPU = ("transformers max-autotune",)

"""Who computes a forward: all providers by name, in the order of tables and pictures.

A new one is an entry here and a function that builds its forward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import fastseg

from ..machine import version
from ..setting import Context
from . import pytorch, runtimes
from .pytorch import Forward

BASELINE = "transformers eager"
_THEIRS, OURS = "transformers", "fastseg"


@dataclass(frozen=True)
class Provider:
    """How to get a forward, and how it is shown.

    `colour`: one hue a family, for people with any colour vision: greys and greyish blue for other
    libraries in PyTorch, muted blue-green for runtimes, orange to brown for fastseg.
    """

    name: str
    build: Callable[[Context], Forward]  # raises a SkippedCase with the reason where it cannot
    library: str  # the distribution that computes
    colour: str
    device: str = ""  # the only type that it runs on
    end_to_end: bool = False  # not runtimes that take NumPy arrays: they have no image processor
    graph: bool = False  # replays a CUDA graph, whose memory is counted once, at the capture
    slow_to_build: bool = False  # many minutes on a CPU, where it only runs when asked for

    @property
    def ours(self) -> bool:
        return self.name.startswith(OURS)

    def version(self) -> str:
        return fastseg.__version__ if self.library == OURS else version(self.library)


_ORT, _OV = "onnxruntime", "openvino"
_OVERHEAD, _MAX = (partial(pytorch.compiled, mode=m) for m in ("reduce-overhead", "max-autotune"))
_UNCHECKED = partial(pytorch.ours_cuda_graph, check_weights=False)
_EAGER, _TRITON = (partial(pytorch.ours, backend=name) for name in ("eager", "triton"))
_ALL = (
    Provider(BASELINE, pytorch.eager, _THEIRS, "#5b6168", "", True),
    Provider(f"{_THEIRS} compiled", pytorch.compiled, _THEIRS, "#8b9198", "", True),
    Provider(f"{_THEIRS} reduce-overhead", _OVERHEAD, _THEIRS, "#7a9cc6", "", True, True, True),
    Provider(f"{_THEIRS} max-autotune", _MAX, _THEIRS, "#9db4d3", "", True, True, True),
    Provider(f"{_THEIRS} CUDA graph", pytorch.cuda_graph, _THEIRS, "#6c8ebf", "cuda", True, True),
    Provider("torch-tensorrt", pytorch.tensorrt, "torch-tensorrt", "#4f8a8b", "cuda"),
    Provider("ONNX Runtime", runtimes.onnxruntime_theirs, _ORT, "#9cc4c4", "cpu"),
    Provider("OpenVINO fp32", runtimes.openvino_theirs, _OV, "#79adae", "cpu"),
    Provider("OpenVINO default", runtimes.openvino_default_theirs, _OV, "#5f9c9d", "cpu"),
    Provider("fastseg eager", _EAGER, OURS, "#d55e00", "", True),
    Provider("fastseg accelerate", pytorch.ours_accelerate, OURS, "#e8822e", "", True),
    Provider("fastseg compiled", pytorch.ours_compiled, OURS, "#b34d00", "", True),
    Provider("fastseg Triton", _TRITON, OURS, "#ee7733", "cuda", True),
    Provider("fastseg CUDA graph", pytorch.ours_cuda_graph, OURS, "#8c3b00", "cuda", True, True),
    Provider("fastseg unchecked graph", _UNCHECKED, OURS, "#6e2f00", "cuda", True, True),
    Provider("fastseg ONNX Runtime", runtimes.onnxruntime_ours, _ORT, "#f2ab5e", "cpu"),
    Provider("fastseg OpenVINO fp32", runtimes.openvino_ours, _OV, "#e69f00", "cpu"),
    Provider("fastseg OpenVINO default", runtimes.openvino_default_ours, _OV, "#c98a00", "cpu"),
)
PROVIDERS = {provider.name: provider for provider in _ALL}

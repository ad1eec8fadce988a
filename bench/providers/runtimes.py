"""Forwards by ONNX Runtime and OpenVINO, of transformers' ONNX export and of fastseg's.

Both runtimes get fixed shapes, one request at a time, and as many threads as torch has.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..setting import Context, SkippedCase
from . import pytorch
from .pytorch import Forward

OnnxFile = Callable[[Context], Path]


def _check(context: Context) -> None:
    if context.dtype != torch.float32:
        raise SkippedCase("the exported graphs are in float32")


def _onnxruntime(file: OnnxFile, context: Context) -> Forward:
    import onnxruntime

    _check(context)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = context.threads
    options.inter_op_num_threads = 1
    # Its threads would go on spinning while the other providers are timed.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.log_severity_level = 3
    on_cpu = ["CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(file(context), options, providers=on_cpu)

    def forward(pixel_values: torch.Tensor) -> torch.Tensor:
        (logits,) = session.run(None, {"pixel_values": pixel_values.numpy()})
        return torch.from_numpy(logits)

    return forward


class OpenVinoForward:
    """A compiled model and the precision that it computes in."""

    def __init__(self, file: OnnxFile, precision: str | None, context: Context) -> None:
        import openvino

        _check(context)
        settings: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": context.threads,
        }
        if precision is not None:
            settings["INFERENCE_PRECISION_HINT"] = precision
        model = openvino.compile_model(file(context), "CPU", settings)
        chosen = model.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        self.dtype = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}[chosen]
        self._request = model.create_infer_request()

    def __call__(self, pixel_values: torch.Tensor) -> torch.Tensor:
        result = self._request.infer([pixel_values.numpy()], share_inputs=True, share_outputs=True)
        return torch.from_numpy(result[0])


onnxruntime_theirs = partial(_onnxruntime, pytorch.onnx_file)
onnxruntime_ours = partial(_onnxruntime, pytorch.ours_onnx_file)
openvino_theirs = partial(OpenVinoForward, pytorch.onnx_file, "f32")
openvino_ours = partial(OpenVinoForward, pytorch.ours_onnx_file, "f32")
openvino_default_theirs = partial(OpenVinoForward, pytorch.onnx_file, None)
openvino_default_ours = partial(OpenVinoForward, pytorch.ours_onnx_file, None)

"""What tests of exported files share: runtimes that run them, and float64 references."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import openvino
import torch
import torch.nn.functional as F

SIZES = [(1, 64, 64), (2, 75, 101), (3, 40, 131)]  # none that an export traces or checks with

Run = Callable[[torch.Tensor], list[np.ndarray]]


def open_onnxruntime(path: Path) -> Run:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda pixels: session.run(None, {"pixel_values": pixels.numpy()})


def open_openvino(path: Path) -> Run:
    # Where a CPU has bfloat16, OpenVINO computes in it unless told otherwise.
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    compiled = openvino.Core().compile_model(str(path), "CPU", options)
    return lambda pixels: [np.asarray(found) for found in compiled(pixels.numpy()).values()]


RUNTIMES = {"onnxruntime": open_onnxruntime, "openvino": open_openvino}


def reference(hf_model, pixels: torch.Tensor) -> torch.Tensor:
    """The logits of transformers' model in float64."""
    with torch.no_grad():
        return hf_model.double()(pixels.double()).logits


def assert_labels(labels, logits: torch.Tensor, size: tuple[int, int]) -> None:
    """`labels` are those of `logits` resized to `size`, but where two classes are as good as equal.

    They have to show several classes, or the comparison would tell little.
    """
    resized = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
    best = resized.topk(2, dim=1)
    found = torch.as_tensor(labels).long()
    assert found.shape == (len(logits), *size)
    differs = found != best.indices[:, 0]
    gap = best.values[:, 0] - best.values[:, 1]
    assert gap[differs].max().item() < 1e-4 if differs.any() else True
    assert differs.double().mean() < 1e-3
    assert len(found.unique()) > 1

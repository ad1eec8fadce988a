"""ONNX files of `export` in other libraries' runtimes, on the CPU: opened, described and run."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

Shape = tuple[int | None, ...]


@dataclass(frozen=True)
class Opened:
    """A file in a runtime.

    Args:
        runtime: its name and version.
        precision: of the arithmetic, as the runtime tells it.
        inputs, outputs: shapes by name; None for an axis of any size.
        properties: what the file says of itself.
        run: pixels to the first output, in float32; from any thread.
    """

    runtime: str
    precision: str
    inputs: Mapping[str, Shape]
    outputs: Mapping[str, Shape]
    properties: Mapping[str, str]
    run: Callable[[np.ndarray], np.ndarray]


def open_file(path: Path, runtime: str, dtype: torch.dtype | None) -> Opened:
    """Open an ONNX file, for as many threads as torch has now.

    Args:
        runtime: one of `RUNTIMES`.
        dtype: that the runtime is to compute in; None leaves it to the runtime.

    Raises:
        ImportError: the runtime is not installed.
        ValueError: there is no such runtime, it cannot compute in `dtype`, or cannot read the file.
    """
    if runtime not in RUNTIMES:
        expected = " or ".join(map(repr, RUNTIMES))
        raise ValueError(f"runtime: expected {expected}, got {runtime!r}")
    opener, extra, dtypes = RUNTIMES[runtime]
    if dtype not in (None, *dtypes):
        expected = ", ".join(map(str, dtypes))
        raise ValueError(f"dtype: expected None, {expected} with {runtime}, got {dtype!r}")
    try:
        return opener(path, dtype)
    except ImportError as error:
        raise ImportError(
            f'runtime={runtime!r} needs {runtime}: pip install "fastseg-segformer[{extra}]"'
        ) from error
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: {runtime} cannot open it: {reason}") from error


def _open_onnxruntime(path: Path, dtype: torch.dtype | None) -> Opened:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # classes of its own, of C++
        raise ValueError(error) from error
    properties = session.get_modelmeta().custom_metadata_map

    def shapes(values: Any) -> dict[str, Shape]:
        return {
            one.name: tuple(side if isinstance(side, int) else None for side in one.shape)
            for one in values
        }

    inputs = shapes(session.get_inputs())
    return Opened(
        f"onnxruntime {onnxruntime.__version__}",
        properties.get("dtype", "float32"),
        inputs,
        shapes(session.get_outputs()),
        properties,
        lambda pixels: session.run(None, dict.fromkeys(inputs, pixels))[0],
    )


def _open_openvino(path: Path, dtype: torch.dtype | None) -> Opened:
    import openvino

    core = openvino.Core()
    model = core.read_model(str(path))
    options: dict[str, Any] = {"INFERENCE_NUM_THREADS": torch.get_num_threads()}
    if dtype is not None:
        options["INFERENCE_PRECISION_HINT"] = _OPENVINO_TYPES[dtype]
    compiled = core.compile_model(model, "CPU", options)
    requests = threading.local()  # a request is for one thread

    def run(pixels: np.ndarray) -> np.ndarray:
        if not hasattr(requests, "own"):
            requests.own = compiled.create_infer_request()
        return requests.own.infer([pixels], share_inputs=True)[0]

    def shapes(values: Any) -> dict[str, Shape]:
        return {
            one.get_any_name(): tuple(
                side.get_length() if side.is_static else None for side in one.partial_shape
            )
            for one in values
        }

    precision = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
    said = model.get_rt_info()["framework"] if model.has_rt_info("framework") else {}
    return Opened(
        f"openvino {openvino.__version__.partition('-')[0]}",
        next((str(t)[6:] for t, name in _OPENVINO_TYPES.items() if name == precision), precision),
        shapes(model.inputs),
        shapes(model.outputs),
        {name: value.astype(str) for name, value in said.items()},
        run,
    )


_OPENVINO_TYPES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
# How a file is opened, the extra that brings the runtime, and what it may be asked to compute in.
RUNTIMES: dict[str, tuple[Callable[[Path, Any], Opened], str, tuple[torch.dtype, ...]]] = {
    "onnxruntime": (_open_onnxruntime, "export", (torch.float32,)),
    "openvino": (_open_openvino, "openvino", tuple(_OPENVINO_TYPES)),
}

"""`export`: a model as a file for other runtimes, on folded weights, checked after writing."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import operator
import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from .check import Checked, ExportError, Run, check_shapes, compare
from .folded import FoldedModel
from .stages import fold_accelerated
from .torch_program import TWO_TOKENS, trace

__all__ = ["FORMATS", "ExportError", "ExportResult", "ExportWarning", "export"]

FORMATS = {"onnx": ".onnx", "torch-export": ".pt2"}
DEFAULT_OPSET = 20
_MAX_PROTOBUF = 2**31 - 1  # bytes in one file
_MAX_UINT8_CLASSES = 256


class ExportWarning(UserWarning):
    """An exported file was not checked."""


@dataclass(frozen=True)
class ExportResult:
    """Description of the file that `export` wrote.

    Args:
        dtype: of the weights and the arithmetic.
        opset: of ONNX; None for other formats.
        nodes: operators in the graph.
        checked: comparisons with the model; empty where the file was not checked, and
            `unchecked` says why.
    """

    path: Path
    format: str
    size_bytes: int
    opset: int | None
    nodes: int
    checked: tuple[Checked, ...]
    unchecked: str | None = None
    dtype: torch.dtype = torch.float32


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    format: str | None = None,
    labels: bool | Sequence[int] = False,
    label_dtype: torch.dtype | None = None,
    batch: int | None = None,
    height: int | None = None,
    width: int | None = None,
    opset: int | None = None,
    dtype: torch.dtype = torch.float32,
    check: bool = True,
) -> ExportResult:
    """Write the folded graph of `model` to a file, and check what was written against the model.

    The graph takes `pixel_values`, float32 (B, C, H, W), normalised as the image processor does it.
    It gives `logits`, float32 (B, K, H/4, W/4), or `labels` (B, H, W); of a classifier `logits`
    (B, K); of a bare encoder its maps, `feature_map_1` and on, NCHW. Axes are open to any size
    where none is given here. That of a SegGPT takes `pixel_values`, `prompt_pixel_values` and
    `prompt_masks`, of the model's size, and gives `pred_masks`, float32 (B, 3, 2 H, W).

    Args:
        model: of this library, or a segmentation model of transformers or NVlabs that `accelerate`
            has taken whole; in eval mode, of any dtype, on any device.
        path: the file; an older one is replaced. Nothing is left there where anything fails.
        format: "onnx", or "torch-export", which `torch.export.load` reads without fastseg: a
            program for the CPU, which takes sides that leave two tokens on every reduced grid, from
            61 pixels on. None to go by the suffix of `path`, .onnx or .pt2.
        labels: True for label maps of the input's size, or (H, W) for maps of that size: bilinear
            upsampling and the highest class, inside the graph. With one class 1 where its logit is
            positive.
        label_dtype: torch.int64, the default, or torch.uint8 for up to 256 classes.
        batch, height, width: of the input, to fix an axis. A model of KerasCV's network takes one
            size alone: by default that in its configuration, `image_size`.
        opset: of ONNX, from 11; 20 by default, where GELU is one operator. Before 17 LayerNorm is
            written in plain operators.
        dtype: of the weights and the arithmetic, whatever the model's: torch.float32, or, of ONNX,
            torch.float16 for runtimes on GPUs. Input and logits are float32 all the same.
        check: compare with the model in float64, at two sizes where any are allowed: the relative
            RMS error is at most 2e-6, in float16 5e-3, and labels differ at near-ties alone. ONNX
            files run in onnxruntime; without it there is a warning that the file was not checked.

    Raises:
        TypeError, ValueError: an argument is wrong, or the model cannot be folded.
        ImportError: `format` is "onnx" and onnx is not installed.
        OSError: the file cannot be written.
        ExportError: the graph does not give what the model gives.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"path: expected a path, got {type(path).__name__}")
    target = Path(path)
    if target.is_dir():
        raise IsADirectoryError(f"path: expected a file, got the folder {target}")
    format = _format(format, target)
    folded = _folded(model)
    if folded.like.dtype != torch.float32:
        model = copy.deepcopy(model).float()
        folded = _folded(model)
    height, width = _square(model, folded, height, width)
    reduced = TWO_TOKENS if format == "torch-export" else 1
    smallest = folded.smallest_side(reduced)
    only = folded.image_size or (None, None)
    sizes: dict[str, Any] = {
        "batch": _size("batch", batch, 1),
        "height": _size("height", height, smallest, only[0]),
        "width": _size("width", width, smallest, only[1]),
    }
    label_size = _labels(labels, label_dtype, folded)
    label_dtype = label_dtype or torch.int64
    options = {**sizes, "labels": label_size, "label_dtype": label_dtype}
    if not target.absolute().parent.is_dir():
        raise FileNotFoundError(f"path: there is no folder {target.parent} for {target.name}")
    if format == "onnx":
        opset = _opset(opset)
    elif opset is not None:
        raise ValueError(f"opset: expected None for the format {format}, got {opset!r}")
    if dtype not in (torch.float32, *([torch.float16] if format == "onnx" else [])):
        raise ValueError(
            f"dtype: expected torch.float32, or torch.float16 for the format onnx, got {dtype!r}"
        )

    # Inside torch.no_grad, or the tensors of a model that trains would be refused.
    with torch.no_grad(), _temporary(target) as temporary:
        if format == "onnx":
            properties = {**describe(model), "dtype": str(dtype).removeprefix("torch.")}
            nodes, run, unchecked = _write_onnx(
                folded, temporary, opset, {**options, "dtype": dtype}, check, properties
            )
        else:
            nodes, run, unchecked = _write_torch(folded, temporary, options, check)
        checked: list[Checked] = []
        if run is not None:
            shapes = check_shapes(folded, **sizes, reduced=reduced)
            checked = compare(model, folded, run, shapes, label_size, dtype)
        size_bytes = temporary.stat().st_size
    if check and unchecked is not None:
        warnings.warn(f"{target} was not checked: {unchecked}", ExportWarning, stacklevel=2)
    return ExportResult(
        *(target, format, size_bytes, opset, nodes, tuple(checked), unchecked), dtype=dtype
    )


def _folded(model: nn.Module) -> FoldedModel:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if model.training:
        raise ValueError("model: expected eval mode, got training mode; call model.eval() first")
    if hasattr(type(model), "folded_model"):  # of a family of fastseg, and no wrapper around one
        with torch.no_grad():
            own: Any = model
            return own.folded_model()
    folded = fold_accelerated(model)
    if folded is None:
        raise TypeError(
            "model: expected a model of fastseg, or one that fastseg.accelerate has taken, got a "
            f"{type(model).__module__}.{type(model).__name__}; call fastseg.accelerate(model) first"
        )
    _check_around(model, folded)
    return folded


def _check_around(model: nn.Module, folded: FoldedModel) -> None:
    """Raise where a model does more than its encoder and head, such as to normalise its input."""
    side = 2 * folded.smallest_side(TWO_TOKENS)
    (shape,) = check_shapes(folded, 1, *(folded.image_size or (side, side)))
    pixels = torch.linspace(-1, 1, math.prod(shape)).view(shape).to(folded.like.dtype)
    inputs = [pixels.roll(index, -1) for index in range(len(folded.inputs))]
    with torch.no_grad():
        result = folded.program(False, torch.int64)(*inputs)
        (expected,) = folded.results(model, [one.to(folded.like.device) for one in inputs])
    if (
        not isinstance(expected, torch.Tensor)
        or expected.shape != result.shape
        or not torch.allclose(result.float(), expected.float().cpu(), rtol=1e-2, atol=1e-2)
    ):
        raise ValueError(
            "model: expected an encoder and a decode head, got a model that does more around them, "
            "which would not be in the graph; export the part inside"
        )


def _format(format: str | None, path: Path) -> str:
    by_suffix = {suffix: name for name, suffix in FORMATS.items()}
    told = by_suffix.get(path.suffix.lower())
    if format is None:
        if told is None:
            raise ValueError(
                f"path: expected a suffix of {', '.join(by_suffix)}, or a format, got {path.name!r}"
            )
        return told
    if not isinstance(format, str) or format not in FORMATS:
        raise ValueError(f"format: expected one of {', '.join(FORMATS)}, got {format!r}")
    if told not in (None, format):
        raise ValueError(f"path: expected no suffix of {told} for {format}, got {path.name!r}")
    return format


def _size(name: str, size: Any, smallest: int, only: int | None = None) -> int | None:
    if size is None:
        return only
    try:
        number = operator.index(size)
    except TypeError:
        number = 0
    if isinstance(size, bool) or number < smallest or only not in (None, number):
        expected = f"an integer from {smallest}" if only is None else only
        raise ValueError(f"{name}: expected {expected}, or None, got {size!r}")
    return number


def _square(
    model: Any, folded: FoldedModel, height: int | None, width: int | None
) -> tuple[int | None, int | None]:
    """The sizes given, or the model's own where it takes one size alone."""
    multiple = folded.side_multiple
    own = getattr(model.config, "image_size", None) if multiple else None
    if isinstance(own, list) and len(own) == 2 and height is None and width is None:
        height, width = own
    if multiple and (height is None or height != width or height % multiple):
        raise ValueError(
            f"height, width: expected equal multiples of {multiple}, as KerasCV's network takes "
            f"squares and is another function at each size, got {height} and {width}"
        )
    return height, width


def _labels(
    labels: bool | Sequence[int], dtype: torch.dtype | None, folded: FoldedModel
) -> bool | tuple[int, int]:
    if dtype not in (None, torch.int64, torch.uint8):
        raise TypeError(f"label_dtype: expected torch.int64 or torch.uint8, got {dtype}")
    if labels is False:
        if dtype is not None:
            raise ValueError(f"label_dtype: expected None as labels is False, got {dtype}")
        return False
    if not folded.num_classes:
        raise ValueError("labels: expected False, as the model gives no logits of pixels")
    if dtype == torch.uint8 and folded.num_classes > _MAX_UINT8_CLASSES:
        raise ValueError(
            f"label_dtype: torch.uint8 tells {_MAX_UINT8_CLASSES} classes apart, "
            f"got {folded.num_classes}"
        )
    if labels is True:
        return True
    try:
        height, width = (operator.index(side) for side in labels)
    except (TypeError, ValueError):
        height = width = 0
    if height < 1 or width < 1:
        raise ValueError(f"labels: expected a bool or a positive (height, width), got {labels!r}")
    return height, width


def _opset(opset: Any) -> int:
    from .onnx import MIN_OPSET

    latest = int(_onnx().defs.onnx_opset_version())
    if opset is None:
        return DEFAULT_OPSET
    if not isinstance(opset, int) or isinstance(opset, bool) or not MIN_OPSET <= opset <= latest:
        raise ValueError(f"opset: expected an integer from {MIN_OPSET} to {latest}, got {opset!r}")
    return opset


def _onnx() -> Any:
    try:
        import onnx
    except ImportError as error:
        raise ImportError(
            'the format onnx needs onnx: pip install "fastseg-segformer[export]"'
        ) from error
    return onnx


@contextlib.contextmanager
def _temporary(target: Path) -> Iterator[Path]:
    """A path beside `target` that takes its place at the end; nothing is left after an error."""
    handle, name = tempfile.mkstemp(
        prefix=f".{target.stem}.", suffix=target.suffix or ".tmp", dir=target.absolute().parent
    )
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp's is for the owner alone
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def describe(model: Any) -> dict[str, str]:
    """What an ONNX file says of its model: the configuration and the image processor, in JSON."""
    said = {}
    config: Any = getattr(model, "config", None)
    if hasattr(config, "to_dict"):
        said["config"] = json.dumps(config.to_dict(), sort_keys=True, default=str)
    processor = getattr(model, "preprocessor_file", None)
    if processor is not None:
        said["image_processor"] = Path(processor).read_text(encoding="utf-8")
    return said


def _write_onnx(
    folded: FoldedModel,
    path: Path,
    opset: int | None,
    options: dict[str, Any],
    checked: bool,
    properties: dict[str, str],
) -> tuple[int, Run | None, str | None]:
    """Write the file; return its nodes, how to run it in onnxruntime, and why not if not."""
    from .onnx import build

    onnx = _onnx()
    graph = build(folded, opset=opset or DEFAULT_OPSET, **options)
    for name, value in properties.items():
        graph.metadata_props.add(key=name, value=value)
    if graph.ByteSize() > _MAX_PROTOBUF:
        raise ValueError(f"model: expected weights below 2 GiB, got {graph.ByteSize()} bytes")
    nodes = len(graph.graph.node)
    path.write_bytes(graph.SerializeToString())
    del graph  # as large as the file, which the checker and the runtime read by themselves
    onnx.checker.check_model(path, full_check=True)
    if not checked:
        return nodes, None, "check=False"
    try:
        import onnxruntime
    except ImportError:
        hint = 'pip install "fastseg-segformer[export]"'
        return nodes, None, f"onnxruntime is not installed; {hint}"
    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:  # classes of its own, of C++
        reason = str(error).strip().splitlines()[-1]
        raise ExportError(
            f"onnxruntime {onnxruntime.__version__} cannot read opset {opset}: {reason}"
        ) from error
    names = folded.inputs
    return nodes, lambda *arrays: session.run(None, dict(zip(names, arrays, strict=True))), None


def _write_torch(
    folded: FoldedModel, path: Path, options: dict[str, Any], checked: bool
) -> tuple[int, Run | None, str | None]:
    """Write the program; return its operators, how to run it as read back, and why not if not."""
    program = trace(folded, **options)
    with open(path, "wb") as file:
        torch.export.save(program, file)
    nodes = sum(node.op == "call_function" for node in program.graph.nodes)
    if not checked:
        return nodes, None, "check=False"
    with open(path, "rb") as written:
        module = torch.export.load(written).module()

    def run(*arrays: np.ndarray) -> list[np.ndarray]:
        with torch.no_grad():
            outputs = module(*map(torch.from_numpy, arrays))
        return [t.numpy() for t in (outputs if isinstance(outputs, tuple) else (outputs,))]

    return nodes, run, None

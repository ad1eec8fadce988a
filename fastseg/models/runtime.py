"""`RuntimeModel`: the folded graph of a segmentation model, run by OpenVINO or ONNX Runtime."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from fastseg.checkpoints.devices import chosen_device
from fastseg.checkpoints.report import LoadReport
from fastseg.checkpoints.values import class_names, names_of
from fastseg.exporting.cache import exported
from fastseg.exporting.runtimes import Opened, open_file
from fastseg.images.processor import SegformerImageProcessor

from .families import FAMILIES
from .outputs import SemanticSegmenterOutput

_SUFFIX = ".onnx"
_WITHOUT = "; export it without labels (--labels), which `segment` makes of the logits"
_PACKAGE = Path(__file__).parents[1]


class RuntimeModel(nn.Module):
    """A segmentation model whose forward another library's runtime computes, on the CPU.

    It is called as the model that it was exported from, with `pixel_values` alone, and
    `fastseg.segment` takes it. It holds no weights that PyTorch knows.

    Args:
        path: an ONNX file of `fastseg.export`, with logits.
        runtime: "openvino" or "onnxruntime".
        dtype: that the runtime is to compute in; None leaves it to the runtime. What it computes
            in is `precision`.

    Attributes:
        runtime: its name and version.
        precision: of its arithmetic, as it tells.
        config: of the model; of a file without one no more than num_labels, id2label, num_channels.
        image_processor: the one that was found beside the model; None where there was none.

    Raises:
        ImportError, ValueError: as `from_pretrained` raises them.
    """

    segments = True
    main_input_name = "pixel_values"
    image_processor_class: type[Any] = SegformerImageProcessor
    preprocessor_file: Path | None = None
    name_or_path = ""

    def __init__(
        self, path: str | os.PathLike[str], runtime: str, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.path = Path(path)
        opened = open_file(self.path, runtime, dtype)
        self.runtime, self.precision, self._run = opened.runtime, opened.precision, opened.run
        if [*opened.inputs, *opened.outputs] != ["pixel_values", "logits"]:
            raise ValueError(
                f"{path}: expected pixel_values and logits, as fastseg.export writes them for a "
                f"segmentation model, got {', '.join(opened.inputs)} and "
                f"{', '.join(opened.outputs)}{_WITHOUT if 'labels' in opened.outputs else ''}"
            )
        self._shape = opened.inputs["pixel_values"]
        self.config, self.image_processor = _described(opened)
        self.load_report = LoadReport()
        self.eval()

    def forward(self, pixel_values: torch.Tensor) -> SemanticSegmenterOutput:
        """Normalised pixels (B, C, H, W) to logits (B, num_labels, H/4, W/4), float32."""
        shape = getattr(pixel_values, "shape", ())
        pairs = zip(shape, self._shape, strict=False)
        if len(shape) != 4 or not all(side in (None, actual) for actual, side in pairs):
            expected = ", ".join("any" if side is None else str(side) for side in self._shape)
            raise ValueError(
                f"pixel_values: expected a tensor of shape ({expected}), as {self.path.name} was "
                f"exported, got {tuple(shape) or type(pixel_values).__name__}"
            )
        pixels = pixel_values.detach().to("cpu", torch.float32).contiguous()
        return SemanticSegmenterOutput(logits=torch.from_numpy(self._run(pixels.numpy())))

    def train(self, mode: bool = True) -> RuntimeModel:
        """Stay in eval mode.

        Raises:
            ValueError: `mode` is True.
        """
        if mode:
            raise ValueError("mode: expected False, as a runtime trains no model")
        return super().train(False)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """One without elements, for what asks a model for its device and dtype."""
        yield nn.Parameter(torch.empty(0, device="cpu", dtype=torch.float32), requires_grad=False)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """Of the pixels and the logits."""
        return torch.float32

    def report(self) -> str:
        """What `fastseg.report` says."""
        return f"{self.path.name}: folded, {self.runtime} on the CPU in {self.precision}"


def _described(opened: Opened) -> tuple[Any, SegformerImageProcessor | None]:
    """Configuration and image processor, from what an exported file says of itself."""
    fields = json.loads(opened.properties.get("config", "{}"))
    processor = json.loads(opened.properties.get("image_processor", "null"))
    if processor is not None:
        processor = SegformerImageProcessor.from_dict(processor)
    family = FAMILIES.get(fields.get("model_type"))
    if family is not None:
        return family.models[0].config_class.from_dict(fields), processor
    num_labels = opened.outputs["logits"][1] or 0
    known = json.loads(opened.properties.get("id2label", "{}"))
    id2label = names_of(num_labels, class_names(known) if known else {})
    channels = opened.inputs["pixel_values"][1]
    config = SimpleNamespace(num_labels=num_labels, id2label=id2label, num_channels=channels)
    return config, processor


def load_runtime(
    path: Any, runtime: str, load: Callable[..., Any], dtype: Any = None, **options: Any
) -> RuntimeModel:
    """`from_pretrained` with a runtime: of a checkpoint, or of an ONNX file of `export`.

    Args:
        load: loads a checkpoint; `options` are its.
    """
    place = Path(path) if isinstance(path, str | os.PathLike) else None
    device = chosen_device(options.pop("device", None), options.pop("device_map", None))
    if device.type != "cpu":
        raise ValueError(f"device: expected the CPU with a runtime, got {device}")
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype, dtype)
    if place is not None and place.suffix == _SUFFIX and place.is_file():
        if options:
            raise TypeError(f"{next(iter(options))}: a file of {_SUFFIX} takes none of these")
        return RuntimeModel(place, runtime, dtype)
    if options.pop("output_loading_info", False):
        raise ValueError("output_loading_info: expected False with a runtime; see load_report")
    model = load(path, device="cpu", dtype=torch.float32, **options)
    if not model.segments:
        raise ValueError(
            f"runtime: expected a model with logits of pixels, got a {type(model).__name__}"
        )
    found = RuntimeModel(exported(model, _folder_of(place)), runtime, dtype)
    found.config, found.load_report = model.config, model.load_report
    found.name_or_path, found.preprocessor_file = model.name_or_path, model.preprocessor_file
    return found


def _folder_of(place: Path | None) -> Path | None:
    """The folder of a checkpoint on this disk; None for others and for what is installed."""
    if place is None or not place.exists() or _PACKAGE in place.resolve().parents:
        return None
    return place if place.is_dir() else place.parent

"""`fastseg export`: a model as an ONNX file or a torch.export program, checked after writing."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

import torch

from fastseg.exporting.export import FORMATS, ExportError, ExportResult, ExportWarning, export

from . import options
from .options import CommandError, say

_LABEL_DTYPES = {"int64": torch.int64, "uint8": torch.uint8}


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "export",
        help="write a model for ONNX runtimes, or as a torch.export program",
        description="Writes the folded graph of a segmentation model and checks what "
        "was written against the model. The graph takes images of any number and size; of a SegGPT "
        "images with a prompt each, of the model's size.",
    )
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="a folder, a file or a hub id (default: the embedded model of drawn scenes)",
    )
    parser.add_argument(
        "--format", choices=FORMATS, help="of the file (default: by its suffix, else onnx)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="to write (default: the model's name with .onnx or .pt2, in this folder)",
    )
    parser.add_argument(
        "--labels",
        action="store_true",
        help="give label maps, not logits: upsampling and argmax inside the graph",
    )
    parser.add_argument(
        "--label-size",
        nargs=2,
        type=options.positive,
        metavar=("HEIGHT", "WIDTH"),
        help="of the label maps (default: that of the image)",
    )
    parser.add_argument("--label-dtype", choices=_LABEL_DTYPES, help="(default: int64)")
    parser.add_argument(
        "--size",
        nargs=2,
        type=options.positive,
        metavar=("HEIGHT", "WIDTH"),
        help="take images of this size only",
    )
    parser.add_argument(
        "--batch", type=options.positive, metavar="N", help="take this many images only"
    )
    parser.add_argument(
        "--opset",
        type=options.positive,
        metavar="N",
        help="of ONNX, from 11, for older runtimes (default: 20)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16"),
        default="float32",
        help="of the file, whatever the model's; float16 of ONNX alone (default: float32)",
    )
    parser.add_argument("--force", action="store_true", help="replace FILE where it exists")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    suffix = FORMATS[arguments.format or "onnx"]
    output = arguments.output or Path(_name(arguments.model) + suffix)
    if output.exists() and not arguments.force:
        raise CommandError(f"--output {output}: it exists; --force replaces it", status=2)
    if arguments.label_size and not arguments.labels:
        raise CommandError("--label-size: expected --labels too", status=2)
    if arguments.label_dtype and not arguments.labels:
        raise CommandError("--label-dtype: expected --labels too", status=2)
    model, _ = options.load_model(arguments.model, torch.device("cpu"), "float32")
    labels: Any = arguments.labels
    if arguments.label_size:
        labels = tuple(arguments.label_size)
    height, width = arguments.size or (None, None)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExportWarning)  # told below
            result = export(
                model,
                output,
                format=arguments.format,
                labels=labels,
                label_dtype=_LABEL_DTYPES.get(arguments.label_dtype),
                batch=arguments.batch,
                height=height,
                width=width,
                opset=arguments.opset,
                dtype=options.DTYPES[arguments.dtype],
            )
    except ValueError as error:
        raise CommandError(str(error), status=2) from error
    except OSError as error:
        raise CommandError(f"--output {output}: {options.first_line(error)}") from error
    except (ImportError, ExportError) as error:
        raise CommandError(str(error)) from error
    _tell(result, arguments.labels)
    return 0


def _name(source: str | None) -> str:
    if source is None:
        return options.EMBEDDED_MODEL.name
    return Path(source).resolve().name if Path(source).exists() else source.split("/")[-1]


def _tell(result: ExportResult, labels: bool) -> None:
    opset = "" if result.opset is None else f"opset {result.opset}, "
    dtype = str(result.dtype).removeprefix("torch.")
    size = f"{result.size_bytes / 1e6:.1f} MB"
    print(f"{result.path}: {size}, {dtype}, {opset}{result.nodes} nodes")
    for shape, error in result.checked:
        measure = (
            f"{error:.2%} of labels differ, near-ties" if labels else f"relative error {error:.1e}"
        )
        print(f"checked against the model at {'x'.join(map(str, shape))}: {measure}")
    if result.unchecked is not None:
        say(f"note: NOT CHECKED against the model: {result.unchecked}")

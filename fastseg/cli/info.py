"""`fastseg info`: versions, devices, the backend that would run on each and why; or a model."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

import torch

import fastseg
from fastseg.kernels import select_backend
from fastseg.kernels.core.configurations import configs_source
from fastseg.kernels.core.precision import fast_dtype

from . import model_info, options
from .options import EMBEDDED_MODEL, EMBEDDED_NAME, CommandError

_PACKAGES = (
    *("torch", "triton", "numpy", "pillow", "safetensors", "transformers", "huggingface_hub"),
    *("h5py", "onnx", "onnxruntime", "openvino"),
)
# What needs more packages, and the extra that brings them.
_EXTRAS = {
    "hub ids": ("hub", ("huggingface_hub",)),
    "HDF5 files": ("h5", ("h5py",)),
    "ONNX Runtime": ("export", ("onnx", "onnxruntime")),
    "OpenVINO": ("openvino", ("onnx", "openvino")),
}
_GIB = 1 << 30


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "info",
        help="versions, devices, and which backend would run; or what a model is and does",
        description="Shows versions, devices, which backend would run on each and why. Of a MODEL: "
        "its parameters, classes and dtype, the multiply-adds of its matrix products and "
        "convolutions by stage, as its plain path computes them, and what of it would run fast.",
    )
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="a folder, a file or a Hugging Face hub id"
    )
    parser.add_argument(
        "--size",
        nargs=2,
        type=options.positive,
        metavar=("HEIGHT", "WIDTH"),
        help="of the image that multiply-adds are of (default: the image processor's)",
    )
    parser.add_argument(
        "--device",
        type=options.device,
        metavar="DEVICE",
        help="that the model would run on (default: a GPU where there is one)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    if arguments.model is None:
        for option in ("size", "device"):
            if getattr(arguments, option) is not None:
                raise CommandError(f"--{option}: expected a MODEL too", status=2)
        info, text = collect(), _text
    else:
        size = tuple(arguments.size) if arguments.size else None
        device = arguments.device or options.device("auto")
        info, text = model_info.collect(arguments.model, device, size), model_info.text
    print(json.dumps(info, indent=2) if arguments.json else text(info))
    return 0


def collect() -> dict[str, Any]:
    """Collect what `fastseg info --json` prints; packages that are absent have version None."""
    return {
        "versions": {
            "fastseg": fastseg.__version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in _PACKAGES},
        },
        "devices": [_cpu(), *(_gpu(index) for index in range(_gpu_count()))],
        "embedded_model": _embedded_model(),
    }


def _version(package: str) -> str | None:
    """Version of a package by its installed metadata: importing transformers takes seconds."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> dict[str, Any]:
    return {
        "device": "cpu",
        "name": _cpu_name(),
        "threads": torch.get_num_threads(),
        **_backend("cpu"),
    }


def _gpu_count() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _gpu(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    return {
        "device": f"cuda:{index}",
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "configurations": configs_source(torch.device(f"cuda:{index}")),
        **_backend(f"cuda:{index}"),
    }


def _backend(device: str) -> dict[str, str | None]:
    """Backend on `device` and why, None where the one asked for cannot run; the same of dtypes."""
    dtype, why = fast_dtype(torch.device(device))
    of_dtype = {"fast_dtype": str(dtype).removeprefix("torch."), "dtype_reason": why}
    try:
        name, reason = select_backend(torch.device(device))
    except (RuntimeError, ValueError) as error:  # FASTSEG_BACKEND asks for what is not there
        return {"backend": None, "reason": str(error), **of_dtype}
    return {"backend": name, "reason": reason, **of_dtype}


def _cpu_name() -> str:
    """The marketing name where Linux tells it, else the architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _embedded_model() -> dict[str, Any] | None:
    """Name of the embedded model, and its metrics.json; None where it is not installed."""
    try:
        metrics = json.loads((EMBEDDED_MODEL / "metrics.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return {"name": EMBEDDED_NAME, "path": str(EMBEDDED_MODEL), "metrics": metrics}


def _text(info: dict[str, Any]) -> str:
    lines = ["versions"]
    for name, version in info["versions"].items():
        lines.append(f"  {name:<16} {version or 'not installed'}")
    lines.append("\ndevices")
    for device in info["devices"]:
        if "threads" in device:
            facts = f"{device['threads']} threads"
        else:
            memory = device["memory_bytes"] / _GIB
            facts = f"capability {device['capability']}, {memory:.1f} GiB"
        lines.append(f"  {device['device']:<16} {device['name']}, {facts}")
        lines.append(f"  {'':<16} backend {device['backend'] or 'none'}: {device['reason']}")
        lines.append(f"  {'':<16} --dtype fast {device['fast_dtype']}: {device['dtype_reason']}")
        if "configurations" in device:
            lines.append(f"  {'':<16} configurations {device['configurations']}")
    if len(info["devices"]) == 1:
        lines.append("  no CUDA device that torch can use")
    lines.append("\nmodels")
    for what, (extra, packages) in _EXTRAS.items():
        absent = [name for name in packages if info["versions"][name] is None]
        status = "yes"
        if absent:
            status = f'need {", ".join(absent)}: pip install "fastseg-segformer[{extra}]"'
        lines.append(f"  {what:<16} {status}")
    model = info["embedded_model"]
    if model is None:
        lines.append(f"  {'embedded':<16} not in this installation")
    else:
        score = f"held-out mIoU {model['metrics']['mean_iou']:.3f} on drawn scenes"
        lines.append(f"  {'embedded':<16} {model['name']}, {score}")
        lines.append(f"  {'':<16} {model['path']}")
    return "\n".join(lines)

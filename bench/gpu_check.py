"""`python -m bench.gpu_check --out DIR`: what this machine has, and whether anything runs.

Prints what it finds and writes DIR/setup.json, by which `bench.gpu` skips stages. The status is 1
where something is missing without which there is nothing to measure.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.gpu_stages import SETUP, sanitizer_program

# Module: distribution. fastseg needs the first, the kernels triton; the rest are for some stages.
_MODULES = {
    "torch": "torch",
    "numpy": "numpy",
    "safetensors": "safetensors",
    "PIL": "pillow",
    "triton": "triton",
    "transformers": "transformers",
    "tqdm": "tqdm",
    "pytest": "pytest",
    "xdist": "pytest-xdist",
    "hypothesis": "hypothesis",
    "matplotlib": "matplotlib",
    "onnx": "onnx",
    "onnxruntime": "onnxruntime",
    "torch_tensorrt": "torch-tensorrt",
    "segmentation_models_pytorch": "segmentation-models-pytorch",
}
_SMI_FIELDS = (
    *("name", "driver_version", "memory.total", "memory.free", "clocks.sm", "clocks.max.sm"),
    *("clocks.mem", "temperature.gpu", "power.limit", "mig.mode.current"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_check")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    given = parser.parse_args(argv)
    found, failures = look(on_gpu=given.device == "cuda")
    found["failures"] = failures
    (given.out / SETUP).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    for name, value in found.items():
        print(f"{name}: {value}")
    for failure in failures:
        print(f"FAILED {failure}")
    return int(bool(failures))


def look(on_gpu: bool) -> tuple[dict[str, Any], list[str]]:
    """What there is, and what is wrong with it."""
    found: dict[str, Any] = {
        "python": f"{platform.python_version()}, {sys.executable}",
        "machine": f"{platform.platform()}, {os.cpu_count()} cores",
        "modules": {module: _version(module) for module in _MODULES},
        "compute_sanitizer": sanitizer_program(),
        "nvidia_smi": _nvidia_smi(),
    }
    failures: list[str] = []

    def attempt(name: str, check: Callable[[], Any]) -> None:
        began = time.monotonic()
        try:
            found[name] = check()
        except Exception as error:  # of any library: what comes after it is told all the same
            found[name] = False
            failures.append(f"{name}: {type(error).__name__}: {error}")
        print(f"{name} took {time.monotonic() - began:.1f} s", flush=True)

    if on_gpu:
        attempt("cuda", _cuda)
        attempt("triton_kernel", _triton_kernel)
    attempt("fastseg", _fastseg)
    attempt("info", _info)
    return found, failures


def _version(module: str) -> str | None:
    """None where it cannot be found."""
    if importlib.util.find_spec(module) is None:
        return None
    try:
        return importlib.metadata.version(_MODULES[module])
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"


def _nvidia_smi() -> dict[str, str] | None:
    query = ["nvidia-smi", f"--query-gpu={','.join(_SMI_FIELDS)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    first = done.stdout.split("\n", 1)[0].split(",")
    return dict(zip(_SMI_FIELDS, (value.strip() for value in first), strict=False))


def _cuda() -> dict[str, Any]:
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError("torch.cuda.is_available() is False")
    facts = torch.cuda.get_device_properties(0)
    x = torch.ones(256, 256, device="cuda")
    if (x @ x)[0, 0].item() != 256:
        raise RuntimeError("a matrix product is wrong")
    free, total = torch.cuda.mem_get_info()
    return {
        "name": facts.name,
        "count": torch.cuda.device_count(),
        "capability": f"{facts.major}.{facts.minor}",
        "multiprocessors": facts.multi_processor_count,
        "l2_bytes": facts.L2_cache_size,
        "free_bytes": free,
        "total_bytes": total,
        "cuda": torch.version.cuda or torch.version.hip,
    }


def _triton_kernel() -> str:
    import torch

    from bench import gpu_kernel

    gpu_kernel.check(torch.device("cuda"))
    return "right"


def _fastseg() -> str:
    import fastseg
    import fastseg.kernels

    return f"{fastseg.__version__}, {Path(fastseg.__file__).parent}"


def _info() -> bool:
    """`fastseg info`; it prints."""
    from fastseg.cli import main as fastseg_main

    if fastseg_main(["info"]) != 0:
        raise RuntimeError("`fastseg info` failed")
    return True


if __name__ == "__main__":
    sys.exit(main())

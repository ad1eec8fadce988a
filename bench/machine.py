"""What a row says of where its figures come from: machine, versions, commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch  # below where it is needed, as fastseg: bench.gpu must start where it is broken

ROOT = Path(__file__).parent.parent
# What figures depend on: rows added by the last run do not make the next one dirty.
_MEASURED = ("fastseg", "kernels", "bench", ":!bench/results")


def machine(device: torch.device) -> dict[str, str]:
    """The fields of a row that tell the machine and the versions of all libraries."""
    import torch

    import fastseg

    on_gpu = device.type == "cuda"
    query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else cpu_name(),
        "driver": (_output(*query) or "unknown").split("\n", 1)[0] if on_gpu else "",
        "cpu": cpu_name(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "transformers": version("transformers"),
        "fastseg": fastseg.__version__,
    }


def version(distribution: str) -> str:
    """Of what is installed, or an empty text."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def cpu_name() -> str:
    """Name, number of cores and the widest instruction set that torch uses."""
    import torch

    file = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:(.*)", file.read_text() if file.exists() else "")
    name = found[1].strip() if found else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"


@contextmanager
def pinned_threads(threads: int, device: torch.device) -> Iterator[None]:
    """`threads` threads of torch; to measure a CPU, on the first (logical) cores that are allowed.

    Beside a GPU all cores stay free for compilers.
    """
    import torch

    threads_before = torch.get_num_threads()
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    torch.set_num_threads(threads)
    if device.type == "cpu" and cores is not None:
        os.sched_setaffinity(0, sorted(cores)[:threads])
    try:
        yield
    finally:
        torch.set_num_threads(threads_before)
        if cores is not None:
            os.sched_setaffinity(0, cores)


def commit() -> str:
    """Short commit, "-dirty" where measured code differs from it; "unknown" outside git."""
    head = _output("git", "rev-parse", "--short", "HEAD") or "unknown"
    return f"{head}-dirty" if _output("git", "status", "--porcelain", "--", *_MEASURED) else head


def _output(*command: str) -> str:
    """What a command prints; "" where it fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()

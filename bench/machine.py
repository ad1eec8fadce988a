"""What a row says of where its figures come from: machine, versions, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

import torch

import fastseg

ROOT = Path(__file__).parent.parent
# What figures depend on: rows added by the last run do not make the next one dirty.
_MEASURED = ("fastseg", "kernels", "bench", ":!bench/results")


def machine() -> dict[str, str]:
    # Where it is used: other benchmarks run where it is not installed.
    import transformers

    return {
        "cpu": cpu_name(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "fastseg": fastseg.__version__,
        "commit": commit(),
    }


def cpu_name() -> str:
    """Name, number of cores and the widest instruction set that torch uses."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"


def commit() -> str:
    """Short commit, "-dirty" where measured code differs from it; "unknown" outside git."""
    head = _git("rev-parse", "--short", "HEAD")
    if head is None:
        return "unknown"
    return f"{head}-dirty" if _git("status", "--porcelain", "--", *_MEASURED) else head


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()

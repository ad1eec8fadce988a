"""Which implementation of the ops runs: `backend(...)` and the variable FASTSEG_BACKEND."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

BACKENDS = ("auto", "eager", "triton")

_chosen: str | None = None


def _check(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}: expected one of {', '.join(BACKENDS)}, got {name!r}")
    return name


def requested_backend() -> str:
    """The backend asked for by `backend(...)`, else by FASTSEG_BACKEND, else "auto"."""
    if _chosen is not None:
        return _chosen
    return _check(os.environ.get("FASTSEG_BACKEND", "auto"), "FASTSEG_BACKEND")


def select_backend(device: torch.device) -> tuple[str, str]:
    """The backend that runs for tensors on `device`, and why.

    Raises:
        RuntimeError: "triton" is asked for, which this version does not have.
    """
    requested = requested_backend()
    if requested == "triton":
        raise RuntimeError("backend: this version of fastseg has no Triton kernels, got 'triton'")
    if requested == "eager":
        return "eager", "asked for by fastseg.backend or FASTSEG_BACKEND"
    return "eager", f"this version has no Triton kernels for {torch.device(device).type}"


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Choose the backend of the ops inside the block: "auto", "eager" or "triton".

    Raises:
        ValueError: another name.
        RuntimeError: "triton", which this version does not have.
    """
    global _chosen
    before, _chosen = _chosen, _check(name, "backend")
    try:
        select_backend(torch.device("cpu"))
        yield
    finally:
        _chosen = before

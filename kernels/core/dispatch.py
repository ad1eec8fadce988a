"""Choice of the ops' implementation: by `backend(...)`, FASTSEG_BACKEND, and the device."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator

import torch

from .optional_triton import HAS_TRITON, interpreting

BACKENDS = ("auto", "eager", "triton")
MINIMUM_CAPABILITY = (8, 0)

_chosen: str | None = None  # of the block opened last; one global, which graphs can guard on
_blocks: list[list[str]] = []
_lock = threading.Lock()
_fallbacks: dict[tuple[str, str], int] = {}


def _check(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}: expected one of {', '.join(BACKENDS)}, got {name!r}")
    return name


def requested_backend() -> str:
    """The backend asked for by `backend(...)`, else by FASTSEG_BACKEND, else "auto"."""
    if _chosen is not None:
        return _chosen
    return _check(os.environ.get("FASTSEG_BACKEND", "auto"), "FASTSEG_BACKEND")


@torch.compiler.assume_constant_result
def _device_reason(device_type: str, index: int | None) -> str | None:
    """Reason why kernels cannot run on a device; None where they can."""
    if not HAS_TRITON:
        return "triton is not installed"
    if device_type == "cpu":
        if interpreting():
            return None
        return "kernels need a GPU (on a CPU TRITON_INTERPRET=1 tests them, slowly)"
    if device_type != "cuda":
        return f"there are no Triton kernels for {device_type}"
    if interpreting():
        return "TRITON_INTERPRET=1 runs kernels on CPU tensors only"
    if torch.version.hip is None:
        capability = torch.cuda.get_device_capability(index)
        if capability < MINIMUM_CAPABILITY:
            return "its compute capability is {}.{}, kernels need {}.{}".format(
                *capability, *MINIMUM_CAPABILITY
            )
    return None


def select_backend(device: torch.device | str) -> tuple[str, str]:
    """The backend that runs for tensors on `device`, "triton" or "eager", and why.

    Raises:
        RuntimeError: "triton" is asked for and cannot run there.
    """
    requested = requested_backend()
    if requested == "eager":
        return "eager", "asked for by fastseg.backend or FASTSEG_BACKEND"
    device = torch.device(device)
    reason = _device_reason(device.type, device.index)
    if reason is None:
        return "triton", "interpreted" if interpreting() else "Triton kernels for this device"
    if requested == "triton":
        raise RuntimeError(f"backend: 'triton' was asked for, but on {device} {reason}")
    return "eager", reason


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Choose the backend of the ops inside the block: "auto", "eager" or "triton".

    With "triton" an op that cannot run its kernels raises an error instead of running eagerly. It
    holds for all threads; of blocks that are open at once the one opened last counts.

    Raises:
        ValueError: another name.
    """
    global _chosen
    block = [_check(name, "backend")]  # a list, as it is told apart from others by identity
    with _lock:
        _blocks.append(block)
        _chosen = name
    try:
        yield
    finally:
        with _lock:
            _blocks[:] = [other for other in _blocks if other is not block]
            _chosen = _blocks[-1][0] if _blocks else None


def use_triton(op: str, device: torch.device, declined: str | None) -> bool:
    """Return whether `op` runs its kernels for tensors on `device`.

    Args:
        declined: what the op's `supports` says: a reason, or None.

    Raises:
        RuntimeError: "triton" is asked for and cannot run.
    """
    if select_backend(device)[0] != "triton":
        return False
    if declined is None:
        return True
    if requested_backend() == "triton":
        raise RuntimeError(f"{op}: backend 'triton' was asked for, but {declined}")
    _count_fallback(op, declined)
    return False


@torch.compiler.assume_constant_result
def _count_fallback(op: str, declined: str) -> bool:
    _fallbacks[op, declined] = _fallbacks.get((op, declined), 0) + 1
    return True


def fallbacks() -> dict[tuple[str, str], int]:
    """Counts of calls that ran eagerly where the backend was "triton", by (op, reason).

    Counted since the process started; a call inside a compiled graph counts when it is traced.
    """
    return dict(_fallbacks)

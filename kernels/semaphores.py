"""Semaphores: the counters by which the programs of one launch find out who arrives last.

A kernel that splits a sum over programs lets each of them write its part and count itself in; the
last one adds the parts up. The counters are zero before the launch, and the kernel leaves them
zero. So they need no memset per launch, as long as no two kernels that run at the same time share
them:

- Eagerly, launches on one stream run one after the other: one buffer per device and stream.
- A launch inside a CUDA graph runs whenever the graph is replayed, beside any other graph and any
  eager launch: each captured launch takes a slice of its own, for good, of an arena per device.
  The arena is allocated and zeroed outside of captures, as what a capture allocates is not zeroed
  until a replay, and is never freed, as graphs hold its address. Where it is used up, or nothing
  ran eagerly before the capture, the capture allocates and zeroes: one small memset per replay.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch

from .primitives import ceil_div

ARENA_SIZE = 1 << 18  # counters, 1 MiB: a captured forward takes some hundreds
_GRANULARITY = 4096  # buffers grow by multiples of it

_buffers: dict[tuple[torch.device, int], torch.Tensor] = {}
_arenas: dict[torch.device, torch.Tensor] = {}
_arena_used: dict[torch.device, int] = {}
_lock = threading.Lock()


def _zeros(count: int, device: torch.device) -> torch.Tensor:
    return torch.zeros(count, dtype=torch.int32, device=device)


def _is_real(tensor: torch.Tensor) -> bool:
    """Whether `tensor` may be kept: a fake one, of a tool that records launches, may not."""
    return type(tensor) is torch.Tensor


def _capturing(device: torch.device) -> bool:
    if device.index == torch.cuda.current_device():
        return torch.cuda.is_current_stream_capturing()
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def semaphores(count: int, device: torch.device) -> torch.Tensor:
    """(count,) int32 zeros for one launch on `device`'s current stream, which leaves them zero.

    The next eager call on the same stream gives the same memory. While the stream captures a CUDA
    graph every call gives memory of its own.
    """
    stream = 0
    if device.type == "cuda" and torch.cuda.is_initialized():
        if _capturing(device):
            return _captured(count, device)
        stream = torch.cuda.current_stream(device).cuda_stream
    buffer = _buffers.get((device, stream))
    if buffer is None or buffer.numel() < count:
        _prepare_arena(device)
        # A smaller one may still be in use: its memory serves nobody else until this stream is
        # through with it.
        buffer = _zeros(ceil_div(count, _GRANULARITY) * _GRANULARITY, device)
        if _is_real(buffer):
            _buffers[device, stream] = buffer
    return buffer.narrow(0, 0, count)


def _prepare_arena(device: torch.device) -> None:
    if device.type != "cuda" or device in _arenas:
        return
    arena = _zeros(ARENA_SIZE, device)
    if not _is_real(arena):
        return
    torch.cuda.current_stream(device).synchronize()  # a replay may be on any stream
    with _lock:
        if device not in _arenas:
            _arenas[device], _arena_used[device] = arena, 0


def _captured(count: int, device: torch.device) -> torch.Tensor:
    with _lock:
        start = _arena_used.get(device, 0)
        if device in _arenas and start + count <= ARENA_SIZE:
            _arena_used[device] = start + count
            return _arenas[device].narrow(0, start, count)
    return _zeros(count, device)


@contextlib.contextmanager
def passing_graphs() -> Iterator[None]:
    """Give back at the end what graphs captured inside the block took; they must be gone by then.

    For tools that capture many graphs to time them, one after the other, in one thread.
    """
    before = dict(_arena_used)
    try:
        yield
    finally:
        for device, used in before.items():
            _arena_used[device] = used

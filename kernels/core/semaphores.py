"""Semaphores: the counters by which the programs of one launch find out who arrives last.

A kernel that splits a sum over programs lets each of them write its part and count itself in; the
last one adds the parts up. The counters are zero before the launch, and the kernel leaves them
zero. So they need no memset per launch, as long as no two kernels that run at the same time share
them:

- Eagerly, launches on one stream run one after the other: one buffer per device and stream.
- A launch inside a CUDA graph runs whenever the graph is replayed, beside any other graph and any
  eager launch: each captured launch takes a slice of its own, for good, of an arena per device.
  The arena is made outside of captures, as what a capture allocates is not zeroed until a replay.
  Where it is used up, or nothing ran eagerly before the capture, the capture allocates and zeroes:
  one small memset per replay.

Buffers and arenas are never freed, as graphs hold their addresses, and are made in a thread of
their own: what the caller's thread allocates may go to a memory pool that a graph will use again,
as in the warm-up of torch.compile's "reduce-overhead".
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch

from .launch import ceil_div, notes_of_thread

ARENA_SIZE = 1 << 18  # counters, 1 MiB: a captured forward takes some hundreds
_BUFFER_SIZE = 1 << 12  # counters of the first buffer of a stream; a later one is twice as large
# Slices begin at 128 bytes: Triton compiles anew for a pointer that is not aligned to 16, which a
# capture does not allow, and launches share no cache line.
_ALIGNMENT = 32

_buffers: dict[tuple[torch.device, int], torch.Tensor] = {}
_outgrown: list[torch.Tensor] = []
_arenas: dict[torch.device, torch.Tensor] = {}
_arena_used: dict[torch.device, int] = {}
_lock = threading.Lock()


def _zeros(count: int, device: torch.device) -> torch.Tensor:
    return torch.zeros(count, dtype=torch.int32, device=device)


def _lasting_zeros(count: int, device: torch.device) -> torch.Tensor:
    """(count,) int32 zeros, ready for any stream, from no pool of the caller's."""
    made: list[torch.Tensor] = []

    def make() -> None:
        made.append(_zeros(count, device))
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    if not made:
        raise RuntimeError(f"semaphores: {count} counters cannot be allocated on {device}")
    return made[0]


def is_capturing(device: torch.device) -> bool:
    """Return whether the current stream of a CUDA device captures a graph."""
    if device.index == torch.cuda.current_device():
        return torch.cuda.is_current_stream_capturing()
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def semaphores(count: int, device: torch.device) -> torch.Tensor:
    """(count,) int32 zeros for one launch on `device`'s current stream, which leaves them zero.

    The next eager call on the same stream gives the same memory. While the stream captures a CUDA
    graph every call gives memory of its own.
    """
    taken = _taken(count, device)
    notes = notes_of_thread()
    if notes is not None:
        notes.took(taken)
    return taken


def _taken(count: int, device: torch.device) -> torch.Tensor:
    stream = 0
    if device.type == "cuda":
        if is_capturing(device):
            return _captured(count, device)
        stream = torch.cuda.current_stream(device).cuda_stream
    buffer = _buffers.get((device, stream))
    if buffer is None or buffer.numel() < count:
        buffer = _grow(count, device, stream)
    return buffer.narrow(0, 0, count)


def _grow(count: int, device: torch.device, stream: int) -> torch.Tensor:
    """A larger buffer for a stream, or its first; and the device's arena, for graphs to come."""
    with _lock:
        if device.type == "cuda" and device not in _arenas:
            _arenas[device], _arena_used[device] = _lasting_zeros(ARENA_SIZE, device), 0
        before = _buffers.get((device, stream))
        size = _BUFFER_SIZE
        if before is not None:
            _outgrown.append(before)
            size = 2 * before.numel()
        buffer = _lasting_zeros(max(size, count), device)
        _buffers[device, stream] = buffer
    return buffer


def _captured(count: int, device: torch.device) -> torch.Tensor:
    with _lock:
        start = _arena_used.get(device, 0)
        if device in _arenas and start + count <= ARENA_SIZE:
            _arena_used[device] = start + ceil_div(count, _ALIGNMENT) * _ALIGNMENT
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

"""Semaphores: which launches share counters; plain values play streams and captures."""

from __future__ import annotations

import threading

import pytest
import torch

from fastseg.kernels.core import semaphores


@pytest.fixture
def fake_cuda(monkeypatch):
    """CUDA streams and captures played by plain values; memory is the CPU's."""

    class Stream:
        cuda_stream = 0
        synchronized = 0

        def synchronize(self):
            assert not state.capturing
            Stream.synchronized += 1

    class State:
        capturing = False
        stream = Stream()

    state = State()
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: state.stream)
    monkeypatch.setattr(semaphores, "ARENA_SIZE", 130)
    monkeypatch.setattr(
        semaphores, "_zeros", lambda count, device: torch.zeros(count, dtype=torch.int32)
    )
    monkeypatch.setattr(semaphores, "_outgrown", [])
    for name in ("_buffers", "_arenas", "_arena_used"):
        monkeypatch.setattr(semaphores, name, {})
    return state


def span(counters: torch.Tensor) -> set[int]:
    start = counters.data_ptr() // 4
    return set(range(start, start + counters.numel()))


def test_semaphores_of_streams(fake_cuda):
    gpu = torch.device("cuda", 0)
    first = semaphores.semaphores(5, gpu)
    assert first.shape == (5,)
    assert fake_cuda.stream.synchronized == 2  # the arena, and a buffer
    assert span(semaphores.semaphores(7, gpu)) >= span(first)
    assert semaphores.semaphores(100_000, gpu).shape == (100_000,)
    fake_cuda.stream = type(fake_cuda.stream)()
    fake_cuda.stream.cuda_stream = 1
    assert not span(semaphores.semaphores(5, gpu)) & span(first)
    assert len(semaphores._arenas) == 1


def test_counters_are_made_in_a_thread_of_their_own(fake_cuda, monkeypatch):
    """What the caller's thread allocates may go to the pool of a graph, which uses it again."""
    threads = []

    def zeros(count, device):
        threads.append(threading.get_ident())
        return torch.zeros(count, dtype=torch.int32)

    monkeypatch.setattr(semaphores, "_zeros", zeros)
    gpu = torch.device("cuda", 0)
    small = semaphores.semaphores(5, gpu)
    semaphores.semaphores(10_000, gpu)
    assert len(threads) == 3
    assert threading.get_ident() not in threads
    # An outgrown buffer may be in use, and its memory belongs to another stream: it stays.
    assert any(span(small) <= span(buffer) for buffer in semaphores._outgrown)


def test_semaphores_of_captures(fake_cuda):
    gpu = torch.device("cuda", 0)
    fake_cuda.capturing = True
    unprepared = semaphores.semaphores(40, gpu)  # nothing ran before: a captured memset
    assert not semaphores._arenas
    fake_cuda.capturing = False
    eager = semaphores.semaphores(40, gpu)
    fake_cuda.capturing = True
    captured = [semaphores.semaphores(40, gpu) for _ in range(4)]  # two fit the arena
    arena = span(semaphores._arenas[gpu])
    assert [span(counters) <= arena for counters in captured] == [True, True, False, False]
    spans = [span(counters) for counters in (unprepared, eager, *captured)]
    assert len(set().union(*spans)) == sum(map(len, spans))
    assert all(counters.shape == (40,) and not counters.any() for counters in captured)
    # Triton compiles anew for a pointer that is not aligned, which a capture does not allow.
    assert all(counters.data_ptr() % 16 == 0 for counters in captured)
    fake_cuda.capturing = False
    assert span(semaphores.semaphores(40, gpu)) == span(eager)


def test_counters_of_passing_graphs_are_given_back(fake_cuda):
    gpu = torch.device("cuda", 0)
    semaphores.semaphores(40, gpu)  # makes the arena
    fake_cuda.capturing = True
    kept = semaphores.semaphores(40, gpu)
    with semaphores.passing_graphs():
        passing = semaphores.semaphores(40, gpu)
    again = semaphores.semaphores(40, gpu)
    assert span(again) == span(passing)
    assert not span(again) & span(kept)

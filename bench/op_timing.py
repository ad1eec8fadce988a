"""Time the providers of a call in turn: on a CPU call by call, on a GPU by replayed CUDA graphs.

A graph holds as many calls as fill a millisecond or more. "warm" calls have the same inputs, and
small ones find them in the L2 cache; "cold" ones take turns among copies of all inputs and weights
that are together three times that cache. A forward is in between: tokens come warm from the op
before, weights cold where a model outgrows the cache.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from fastseg.kernels.core.semaphores import passing_graphs

from . import timing
from .context import first_line
from .op_cases import CountedCall, tensors

_GRAPH_MICROSECONDS = 1000
_FEWEST_CALLS, _MOST_CALLS = 10, 1000
_WARM_UP_SECONDS = 0.05  # for the clocks of a GPU that was idle while a CPU compiled
_SLEEP_CYCLES = 1_000_000  # half a millisecond, longer than a CPU takes to start a graph
_CACHES_OF_COPIES = 3

Function = Callable[..., torch.Tensor]


class Figures(NamedTuple):
    """The samples of one provider."""

    microseconds: list[float]  # of a call
    calls: int  # that one sample is the mean of


def time_call(
    call: CountedCall, functions: Mapping[str, Function], cache: str, repeats: int, label: str
) -> tuple[dict[str, Figures], dict[str, str]]:
    """The figures of each of `functions`, by name, and why one has none.

    Args:
        cache: "warm" or "cold"; a CPU's is warm.
    """
    if call.device.type == "cuda":
        return _time_graphs(call, functions, cache, repeats)
    bound = {name: call.bind(function) for name, function in functions.items()}
    samples = timing.interleave(bound, repeats, label)
    figures = {
        name: Figures([1e3 * taken for taken in milliseconds], calls=1)
        for name, milliseconds in samples.items()
    }
    return figures, {}


def _time_graphs(
    call: CountedCall, functions: Mapping[str, Function], cache: str, repeats: int
) -> tuple[dict[str, Figures], dict[str, str]]:
    graphs: dict[str, _Graph] = {}
    failed: dict[str, str] = {}
    # Captured launches keep their counters for good, in an arena that is no larger than forwards
    # need. These graphs end here, so what they took is given back.
    with torch.cuda.device(call.device), passing_graphs():
        calls = cold_copies(call) if cache == "cold" else [call]
        for name, function in functions.items():
            try:
                graphs[name] = _Graph.of([one.bind(function) for one in calls])
            except Exception as error:  # of a capture; the other providers still have theirs
                failed[name] = first_line(error)
        stop = time.monotonic() + _WARM_UP_SECONDS
        while graphs and time.monotonic() < stop:
            for graph in graphs.values():
                graph.microseconds()
        samples: dict[str, list[float]] = {name: [] for name in graphs}
        for _ in range(repeats):
            for name, graph in graphs.items():
                samples[name].append(graph.microseconds())
    return {name: Figures(taken, graphs[name].calls) for name, taken in samples.items()}, failed


def cold_copies(call: CountedCall) -> list[CountedCall]:
    """Copies of `call` in memory of their own, together several times the L2 cache."""
    inputs = itertools.chain.from_iterable(map(tensors, call.arguments.values()))
    size = sum(tensor.numel() * tensor.element_size() for tensor in inputs)
    cache = torch.cuda.get_device_properties(call.device).L2_cache_size
    number = max(2, math.ceil(_CACHES_OF_COPIES * cache / size))
    # A clone of a tensor without gaps has its strides.
    return [call.map(torch.clone) for _ in range(number)]


class _Graph(NamedTuple):
    """Calls captured in a CUDA graph."""

    graph: torch.cuda.CUDAGraph
    calls: int

    @classmethod
    def of(cls, functions: Sequence[Callable[[], Any]]) -> _Graph:
        """Calls of `functions` in turn: each at least once, and enough to be timed."""
        trial = cls._capture(functions, _FEWEST_CALLS)
        trial.microseconds()
        wanted = math.ceil(_GRAPH_MICROSECONDS / trial.microseconds())
        return cls._capture(functions, max(len(functions), _FEWEST_CALLS, min(wanted, _MOST_CALLS)))

    @classmethod
    def _capture(cls, functions: Sequence[Callable[[], Any]], calls: int) -> _Graph:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            functions[0]()  # libraries set themselves up for a stream
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for function in itertools.islice(itertools.cycle(functions), calls):
                function()
        return cls(graph, calls)

    def microseconds(self) -> float:
        """Time of a call, from one replay."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # While the GPU sleeps the CPU queues what follows: its own time is not in the figure.
        torch.cuda._sleep(_SLEEP_CYCLES)
        start.record()
        self.graph.replay()
        end.record()
        end.synchronize()
        return 1e3 * start.elapsed_time(end) / self.calls

"""All that touches CUDA of CUDA graphs. Tests put a capturer of their own here.

What a graph needs to stay right, and how it is had:

- Kernels write to the addresses that they wrote to when they were captured. Temporary memory is in
  a pool that the graphs of one capturer share: they run one after the other, so together they need
  little more than the largest. Outputs stay referenced, so no later capture takes their memory.
- Kernels also read what was there before: weights, folded weights, tables that a module keeps. One
  run before the capture notes these tensors, and the graph holds them.
- Libraries set themselves up in ordinary runs on the stream of the capture before it begins.
  cuBLAS keeps its workspace for a stream, which anybody may free; as in torch's own graph trees
  it is dropped before and after, so the capture takes one from the pool.
- Autocast keeps cast weights until its block ends; a graph has to cast for itself.
- Other threads may go on: a capture forbids unsafe calls to its own thread only. One capture runs
  at a time in a process.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fastseg.kernels.core.semaphores import is_capturing

_one_capture = threading.Lock()
_thread = threading.local()


class Capture(Protocol):
    """A captured function."""

    output: Any  # what it returned: each replay writes the tensors in it anew
    held_bytes: int  # of the device's memory that is reserved for it

    def replay(self, inputs: Sequence[torch.Tensor]) -> None:
        """Queue copies of `inputs` to the function's own, and the graph, on the current stream."""

    def release(self) -> None:
        """Free the graph, after all that is queued."""


class Capturer(Protocol):
    """Object that captures the functions of one runner."""

    def declines(self, device: torch.device) -> str | None:
        """Reason why nothing can be captured or replayed on `device` now; None where it can."""

    def turn(self, device: torch.device) -> contextlib.AbstractContextManager[None]:
        """Let what is queued inside the block run after all that earlier blocks queued."""

    def capture(
        self, device: torch.device, function: Callable[[], Any], inputs: Sequence[torch.Tensor]
    ) -> Capture:
        """Capture `function`, which reads `inputs`. It runs several times."""


class ReadTensors(TorchDispatchMode):
    """Mode that notes the tensors that operators inside the block read and did not make."""

    def __init__(self) -> None:
        super().__init__()
        self._read: dict[int, torch.Tensor] = {}  # by storage
        self._made: set[int] = set()

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The tensors, one for each storage."""
        return list(self._read.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for tensor in _tensors((args, kwargs)):
            storage = tensor.untyped_storage()._cdata
            if storage not in self._made:
                self._read.setdefault(storage, tensor)
        result = func(*args, **kwargs)
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()._cdata
            if storage not in self._read:
                self._made.add(storage)
        return result


@contextlib.contextmanager
def operators_seen() -> Iterator[None]:
    """Run what torch.compile made as it was written, so that a TorchDispatchMode sees it."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and its import takes seconds
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def read_tensors(function: Callable[[], Any]) -> list[torch.Tensor]:
    """The tensors that a call of `function` reads and does not make."""
    with operators_seen(), ReadTensors() as reads:
        function()
    return reads.tensors


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if type(leaf) in _WITH_STORAGE]


_WITH_STORAGE = (torch.Tensor, torch.nn.Parameter)


def in_capture() -> bool:
    """Return whether this thread is between the first and the last run of a capture."""
    return getattr(_thread, "in_capture", False)


@contextlib.contextmanager
def capture_conditions() -> Iterator[None]:
    """Run a function as a capture needs it: alone, without gradients, on tensors of any mode."""
    cached = torch.is_autocast_cache_enabled()
    with _one_capture, torch.inference_mode(False), torch.no_grad():
        _thread.in_capture = True
        torch.set_autocast_cache_enabled(False)
        try:
            yield
        finally:
            torch.set_autocast_cache_enabled(cached)
            _thread.in_capture = False


class CudaCapturer:
    """Capturer of CUDA graphs, into a memory pool and on a stream of its own."""

    def __init__(self) -> None:
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None
        self._live = 0  # captures in the pool
        self._turns: dict[torch.device, tuple[torch.cuda.Stream, torch.cuda.Event]] = {}

    def declines(self, device: torch.device) -> str | None:
        if device.type != "cuda":
            return f"CUDA graphs need a CUDA device, its input is on the {device.type}"
        return "the current stream is capturing a graph" if is_capturing(device) else None

    @contextlib.contextmanager
    def turn(self, device: torch.device) -> Iterator[None]:
        stream = torch.cuda.current_stream(device)
        last_stream, done = self._turns.get(device, (None, None))
        if done is None:
            done = torch.cuda.Event()
        elif last_stream != stream:
            stream.wait_event(done)
        try:
            yield
        finally:
            done.record(stream)
            self._turns[device] = stream, done

    def capture(
        self, device: torch.device, function: Callable[[], Any], inputs: Sequence[torch.Tensor]
    ) -> CudaCapture:
        with capture_conditions(), torch.cuda.device(device):
            # A pool is gone with the last graph in it. Its memory belongs to one stream.
            if self._live == 0 or self._stream is None or self._stream.device != device:
                self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
            caller, stream = torch.cuda.current_stream(), self._stream
            stream.wait_stream(caller)
            with torch.cuda.stream(stream):
                function()
                read = read_tensors(function)
            torch.cuda.synchronize()
            torch.cuda.empty_cache()  # what is not in use may serve the pool
            reserved = torch.cuda.memory_reserved()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.stream(stream), _cublas_workspaces_dropped():
                output = _capture(graph, self._pool, function)
            caller.wait_stream(stream)
            self._live += 1
            held = torch.cuda.memory_reserved() - reserved
            held += sum(tensor.untyped_storage().nbytes() for tensor in inputs)
            return CudaCapture(graph, output, list(inputs), caller, read, held, self._forget)

    def _forget(self) -> None:
        self._live -= 1


class CudaCapture:
    """A captured CUDA graph with its inputs, its output and what it reads."""

    def __init__(
        self,
        graph: torch.cuda.CUDAGraph,
        output: Any,
        inputs: list[torch.Tensor],
        stream: torch.cuda.Stream,
        read: list[torch.Tensor],
        held_bytes: int,
        forget: Callable[[], None],
    ) -> None:
        self.output = output
        self.held_bytes = held_bytes
        self._graph = graph
        self._inputs = inputs
        self._stream = stream  # on which the inputs were allocated
        self._read = read
        self._forget = forget

    def replay(self, inputs: Sequence[torch.Tensor]) -> None:
        stream = torch.cuda.current_stream(self._stream.device)
        for static, tensor in zip(self._inputs, inputs, strict=True):
            static.copy_(tensor, non_blocking=True)
            if stream != self._stream:
                # Freed while this stream still works, its memory is not to go to the other one.
                static.record_stream(stream)
        self._graph.replay()

    def release(self) -> None:
        # The current stream comes after all others, by `turn`.
        torch.cuda.current_stream(self._stream.device).synchronize()
        self._graph.reset()
        self._forget()
        self.output, self._inputs, self._read = None, [], []


@contextlib.contextmanager
def _cublas_workspaces_dropped() -> Iterator[None]:
    torch._C._cuda_clearCublasWorkspaces()
    try:
        yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()


def _capture(graph: torch.cuda.CUDAGraph, pool: Any, function: Callable[[], Any]) -> Any:
    """Capture `function` on the current stream; after an error nothing is left of the attempt.

    `torch.cuda.graph` does not suffice: where a capture cannot be ended it leaves its stream the
    current one, the allocator directed to the pool, and the random generator in capture.
    """
    device = torch.cuda.current_device()
    generator = torch.cuda.default_generators[device]
    random_state = generator.clone_state()
    try:
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        output = function()
    except BaseException:
        with contextlib.suppress(RuntimeError):  # the first error says more
            _end_capture(graph, pool, device, random_state)
        graph.reset()
        raise
    _end_capture(graph, pool, device, random_state)
    return output


def _end_capture(
    graph: torch.cuda.CUDAGraph, pool: Any, device: int, random_state: torch.Generator
) -> None:
    try:
        graph.capture_end()
    except BaseException:
        with contextlib.suppress(RuntimeError):  # it may have come so far
            torch._C._cuda_endAllocateToPool(device, pool)
            torch._C._cuda_releasePool(device, pool)
        with contextlib.suppress(RuntimeError):
            # Its state still counts for the graph; a copy from before does not.
            torch.cuda.default_generators[device].graphsafe_set_state(random_state)
        raise

"""The captured graphs of a model: one for each kind of call, replayed, dropped, counted.

A forward at batch 1 is some hundred kernels of a few microseconds: a GPU waits for the CPU to queue
them. A graph is queued at once.

- Key: the shape, dtype, device and memory format of each tensor argument, the value of each other
  one, autocast, `fastseg.backend`, `fastseg.plain_path`, the float32 precisions, determinism and
  the default dtype. Gradients are off in a graph.
- The first call with a key runs eagerly, as a model's first call does: kernels compile, weights
  fold. The second captures; later ones copy their inputs in, replay and copy the outputs out.
- Weights: a graph reads parameters where they are, but folded weights are derived. At each call
  the model is compared with what it was (`ModelWatch`) while the GPU already works; if something
  changed, that result is thrown away, all graphs are dropped, and the call runs eagerly.
- Threads and streams: a call holds the lock until all is queued, and its work waits on the GPU for
  that of the call before, whatever its stream. Results belong to the caller's stream.
- What no graph can do runs eagerly, counted by reason in `report()`. A capture that fails also
  gives a warning.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import threading
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch import nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils import _pytree as pytree
from torch.utils._device import DeviceContext

from fastseg.folding.freshness import ATTRIBUTES_COUNT, ModelWatch
from fastseg.folding.swap import refold
from fastseg.kernels.core.launch import is_recorded

from .capture import Capture, Capturer, CudaCapturer, in_capture
from .key import PLAIN_TYPES, TENSOR_TYPES, Call, NoGraph, positional_names, read_call, static_like

_KEYS_REMEMBERED = 256
_requires_grad = operator.attrgetter("requires_grad")
_thread = threading.local()


class _Graph:
    """A captured forward: its replays give outputs like those of the model."""

    def __init__(self, capture: Capture, device: torch.device) -> None:
        leaves, self._spec = pytree.tree_flatten(capture.output)
        self._leaves: list[Any] = []  # a tensor's number in `_tensors`, or another value as it is
        self._tensors: list[torch.Tensor] = []
        numbers: dict[int, int] = {}
        for leaf in leaves:
            if type(leaf) in TENSOR_TYPES:
                if leaf.device != device or leaf.layout is not torch.strided:
                    raise NoGraph(f"its output has a {leaf.layout} tensor on {leaf.device}")
                if id(leaf) not in numbers:
                    numbers[id(leaf)] = len(self._tensors)
                    self._tensors.append(leaf.detach())
                self._leaves.append((numbers[id(leaf)],))
            elif isinstance(leaf, PLAIN_TYPES):
                self._leaves.append(leaf)
            else:
                raise NoGraph(f"its output has a {type(leaf).__name__}, which may hold tensors")
        self.capture = capture
        self.device = device

    def output(self, copy: bool) -> Any:
        tensors = [tensor.clone() for tensor in self._tensors] if copy else self._tensors
        leaves = [tensors[leaf[0]] if type(leaf) is tuple else leaf for leaf in self._leaves]
        return pytree.tree_unflatten(leaves, self._spec)

    def release(self) -> None:
        self._tensors = []
        self.capture.release()


class ModelGraphs:
    """The graphs of one model; threads may use them at once.

    Args:
        model: whose forward is captured.
        max_graphs: so many are kept; the one that was not used for longest goes first.
        sightings_when_full: how often inputs must have come before a graph goes for theirs; at
            first the second time suffices. Sizes that keep changing would capture all the time.
        copy_outputs: give tensors of the caller's own.
        check_weights: look at each call whether the model is what it was.
        capturer: what captures; tests have one without a GPU.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        max_graphs: int,
        sightings_when_full: int = 2,
        copy_outputs: bool = True,
        check_weights: bool = True,
        capturer: Capturer | None = None,
    ) -> None:
        self.model = model
        self._max_graphs = max_graphs
        self._sightings_when_full = sightings_when_full
        self._sightings: Counter[Hashable] = Counter()  # of keys without a graph
        self._copy_outputs = copy_outputs
        self._check_weights = check_weights
        self._capturer: Capturer = CudaCapturer() if capturer is None else capturer
        self._names = positional_names(model)
        self._lock = threading.RLock()
        self._count_lock = threading.Lock()  # so that eager calls do not wait for one another
        self._graphs: OrderedDict[Hashable, _Graph] = OrderedDict()  # the one used last at the end
        # Keys that were called, with the reason for which they get no graph.
        self._seen: OrderedDict[Hashable, str | None] = OrderedDict()
        self._watch: ModelWatch | None = None
        self._counts: Counter[str] = Counter()
        self._reasons: Counter[str] = Counter()

    def call(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
        """What `forward`, which runs the model, gives for these arguments: by a graph if it can."""
        run = functools.partial(forward, *args, **kwargs)
        try:
            self._check_mode()
            call = read_call(self._names, args, kwargs)
            self._check_device(call)
        except NoGraph as no_graph:
            return self._eager(str(no_graph), run)
        with self._lock, self._capturer.turn(call.device):
            change = None
            graph = self._graphs.get(call.key)
            if graph is not None:
                graph.capture.replay(call.tensors)
                output = graph.output(self._copy_outputs)
                if self._check_weights:
                    change = self._change(ATTRIBUTES_COUNT)  # the device works meanwhile
                if change is None:
                    self._graphs.move_to_end(call.key)
                    self._counts["replays"] += 1
                    return output
            reason = self._seen.get(call.key)
            if reason is None:
                change = change or self._change()
                if change is not None:
                    self._drop(change)
                if call.key not in self._seen or self._watch is None:
                    return self._first(call, change, run)
                reason = self._watch.reason
            if reason is None:
                self._sightings[call.key] += 1
                is_full = len(self._graphs) >= self._max_graphs
                if self._sightings[call.key] >= (self._sightings_when_full if is_full else 2):
                    return self._capture(call, run, forward)
                reason = "all graphs are of other inputs, and these come seldom"
        return self._eager(reason, run)

    def clear(self) -> None:
        """Drop all graphs and the memory they hold, and what is folded in the model.

        Graphs are captured anew when needed, from the weights as they are then.
        """
        with self._lock:
            self._forget()
            refold(self.model)

    def report(self) -> str:
        """Tell how many graphs there are and what was replayed; what ran eagerly, by reason."""
        with self._lock:
            counts = self._counts
            held = sum(graph.capture.held_bytes for graph in self._graphs.values())
            lines = [
                f"{len(self._graphs)} graphs of at most {self._max_graphs}; {counts['replays']} "
                f"replays, {counts['captures']} captures, {counts['evictions']} evictions; "
                f"{held / 2**20:.0f} MiB held"
            ]
            lines += [
                f"{count} times {what}"
                for what, count in counts.items()
                if what not in ("replays", "captures", "evictions")
            ]
        with self._count_lock:
            lines += [f"{count} calls ran eagerly: {why}" for why, count in self._reasons.items()]
        return "\n".join(lines)

    def _check_mode(self) -> None:
        """Raise NoGraph where no call can run by a graph now."""
        if getattr(self.model, "training", False):
            raise NoGraph("the model is in training mode")
        if in_capture() or torch.jit.is_tracing():
            raise NoGraph("called while another graph is captured")
        if is_recorded():
            raise NoGraph("a tool records its launches")
        if torch._C._len_torch_dispatch_stack() or not all(
            isinstance(mode, DeviceContext) for mode in _get_current_function_mode_stack()
        ):
            raise NoGraph("a TorchDispatchMode or TorchFunctionMode is to see its operators")

    def _check_device(self, call: Call) -> None:
        """Raise NoGraph where this call cannot run by a graph now."""
        declined = self._capturer.declines(call.device)
        if declined is not None:
            raise NoGraph(declined)
        if torch.is_grad_enabled():
            watch = self._watch
            weights = self.model.parameters() if watch is None else watch.tensors
            if any(map(_requires_grad, call.tensors)) or any(map(_requires_grad, weights)):
                raise NoGraph("gradients are on, and its weights or its input require them")

    def _change(self, patience: float = 0.0) -> str | None:
        return None if self._watch is None else self._watch.change(patience)

    def _eager(self, reason: str, run: Callable[[], Any]) -> Any:
        with self._count_lock:
            self._reasons[reason] += 1
        with running_eagerly():
            return run()

    def _first(self, call: Call, change: str | None, run: Callable[[], Any]) -> Any:
        """An eager call, after which the model is as it should be at the next one."""
        why = "first with such inputs" if change is None else "first after a change"
        output = self._eager(why, run)
        change = self._change()
        if change is not None:
            self._drop(change)
        if self._watch is None:
            self._watch = ModelWatch(self.model, derived=True)
        self._remember(call.key, None)
        self._sightings[call.key] = 1
        return output

    def _remember(self, key: Hashable, reason: str | None) -> None:
        self._seen[key] = reason
        self._seen.move_to_end(key)
        if len(self._seen) > _KEYS_REMEMBERED:
            self._sightings.pop(self._seen.popitem(last=False)[0], None)

    def _release(self, graph: _Graph) -> None:
        with self._capturer.turn(graph.device):
            graph.release()

    def _drop(self, change: str) -> None:
        if self._graphs:
            self._counts[f"graphs dropped, for this changed: {change}"] += 1
        self._forget()

    def _forget(self) -> None:
        for graph in self._graphs.values():
            self._release(graph)
        self._graphs.clear()
        self._seen.clear()
        self._sightings.clear()
        self._watch = None

    def _capture(self, call: Call, run: Callable[[], Any], forward: Callable[..., Any]) -> Any:
        """The model's output, from an eager call; and a graph for the calls to come."""
        output = self._eager("captured then", run)
        try:
            graph = self._captured(call, forward)
        except NoGraph as no_graph:
            self._remember(call.key, str(no_graph))
            return output
        except Exception as error:  # of any kind: the model's, CUDA's, out of memory
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in call.tensors)
            reason = f"its capture failed: {type(error).__name__}: {error}"
            self._remember(call.key, reason)
            warnings.warn(
                f"CUDA graphs: inputs {shapes} run without a graph, as {reason}",
                RuntimeWarning,
                stacklevel=4,  # the caller of the model
            )
            return output
        self._counts["captures"] += 1
        self._graphs[call.key] = graph
        if len(self._graphs) > self._max_graphs:
            evicted, graph = self._graphs.popitem(last=False)
            self._release(graph)
            self._seen.pop(evicted, None)
            self._counts["evictions"] += 1
        return output

    def _captured(self, call: Call, forward: Callable[..., Any]) -> _Graph:
        watch = self._watch
        assert watch is not None
        if watch.devices - {call.device}:
            places = ", ".join(sorted(map(str, watch.devices)))
            raise NoGraph(f"its input is on {call.device}, its weights are on {places}")
        change = watch.change()
        if change is not None:
            raise NoGraph(f"its forward changes {change}")
        with torch.inference_mode(False), torch.no_grad():
            static = [static_like(tensor) for tensor in call.tensors]
        versions = [tensor._version for tensor in static]
        args, kwargs = call.replaced(static)
        function = functools.partial(forward, *args, **kwargs)
        capture = self._capturer.capture(call.device, function, static)
        try:
            change = watch.change()
            if change is not None:
                raise NoGraph(f"its forward changes {change}")
            if [tensor._version for tensor in static] != versions:
                raise NoGraph("its forward edits its input")
            return _Graph(capture, call.device)
        except BaseException:
            capture.release()
            raise


@contextlib.contextmanager
def running_eagerly() -> Iterator[None]:
    """Run a model inside of which no other graphs are to be made: it is that of a `ModelGraphs`."""
    before = getattr(_thread, "eagerly", False)
    _thread.eagerly = True
    try:
        yield
    finally:
        _thread.eagerly = before


def is_running_eagerly() -> bool:
    """Return whether this thread is in a block of `running_eagerly`, or captures a graph."""
    return getattr(_thread, "eagerly", False) or in_capture()

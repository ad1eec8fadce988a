"""What tests of `fastseg.graphed` share: a stand-in for CUDA graphs on a CPU.

The stand-in records operators and repeats them on the same memory. Like a CUDA graph a recording
knows addresses and no Python: it reads weights where they were, and writes its outputs where they
were. What goes stale on a GPU goes stale here.
"""

from __future__ import annotations

import contextlib
import threading
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fastseg.cuda_graphs.capture import capture_conditions, operators_seen, read_tensors
from fastseg.cuda_graphs.runner import GraphedModel

SHAPE = (1, 3, 64, 64)


def runner_of(model: nn.Module, **options: Any) -> Any:
    """A runner with recordings in place of graphs."""
    return GraphedModel(model, capturer=FakeCapturer(), **options)


class Default:
    """A model by its own graphs, in the place of a runner."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        held = self.model._graphs_for((torch.empty(0),), {})  # there from the first call on
        assert held is not None
        return getattr(held, name)


def default_of(model: nn.Module) -> Any:
    """The model as it is, whose forward has recordings in place of graphs: see conftest.py."""
    return Default(model)


def capture(runner: Any, *args: Any, **kwargs: Any) -> None:
    """Call it until it has a graph for these arguments, which it has not."""
    before = len(runner._graphs)
    for _ in range(2):
        runner(*args, **kwargs)
    assert len(runner._graphs) == before + 1, runner.report()


class Wrap(nn.Module):
    """A model from a function, which is given a linear layer and the arguments."""

    def __init__(self, function):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.function = function

    def forward(self, x, *args, **kwargs):
        return self.function(self.linear, x, *args, **kwargs)


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class Recording:
    """What a `Capturer` gives."""

    def __init__(self, capturer: FakeCapturer, calls: Any, output: Any, inputs: Any) -> None:
        self.output = output
        self.held_bytes = sum(tensor.untyped_storage().nbytes() for tensor in inputs)
        self.released = False
        self._capturer, self._calls, self._inputs = capturer, calls, inputs

    def replay(self, inputs: Any) -> None:
        assert not self.released
        assert self._capturer.in_turn
        self._capturer.replays += 1
        with torch.inference_mode(False), torch.no_grad():
            for static, tensor in zip(self._inputs, inputs, strict=True):
                static.copy_(tensor)
            for func, args, kwargs, result in self._calls:
                new = func(*args, **kwargs)
                for old, value in zip(*map(pytree.tree_leaves, (result, new)), strict=True):
                    # A view, or the result of an edit in place, is there already.
                    if isinstance(old, torch.Tensor) and old.data_ptr() != value.data_ptr():
                        old.copy_(value)

    def release(self) -> None:
        assert self._capturer.in_turn
        assert not self.released
        self.released = True
        self.output = self._calls = self._inputs = None


class FakeCapturer:
    """Records on any device."""

    def __init__(self) -> None:
        self.recordings: list[Recording] = []
        self.replays = 0
        self.in_turn = 0
        self.error: Exception | None = None  # for the next capture
        self.declined: str | None = None
        self._owner: int | None = None

    @property
    def live(self) -> int:
        return sum(not recording.released for recording in self.recordings)

    def declines(self, device: torch.device) -> str | None:
        return self.declined

    @contextlib.contextmanager
    def turn(self, device: torch.device) -> Any:
        thread = threading.get_ident()
        assert self._owner in (None, thread), "two threads had a turn at once"
        self._owner, self.in_turn = thread, self.in_turn + 1
        try:
            yield
        finally:
            self.in_turn -= 1
            if not self.in_turn:
                self._owner = None

    def capture(self, device: torch.device, function: Any, inputs: Any) -> Recording:
        error, self.error = self.error, None
        with capture_conditions():
            function()
            read = read_tensors(function)
            with operators_seen(), _Recorder() as recorder:
                output = function()
                if error is not None:
                    raise error
            # What the GPU would read, a graph has to hold.
            held = {tensor.untyped_storage().data_ptr() for tensor in read}
            made: set[int] = set()
            for _, args, kwargs, result in recorder.calls:
                for tensor in _tensors((args, kwargs)):
                    pointer = tensor.untyped_storage().data_ptr()
                    assert pointer in held | made
                made.update(t.untyped_storage().data_ptr() for t in _tensors(result))
        recording = Recording(self, recorder.calls, output, list(inputs))
        self.recordings.append(recording)
        return recording

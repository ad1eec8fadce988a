"""Graphs by default: forwards that replay CUDA graphs without being asked to.

Fastseg's own models have such forwards, and `fastseg.accelerate` gives them to other libraries'.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from fastseg.folding.conditions import is_plain_path
from fastseg.folding.swap import Swapped, register_host

from .capture import Capturer, CudaCapturer
from .graphs import ModelGraphs, is_running_eagerly

MAX_GRAPHS = 4  # of one model, as nobody has asked for the memory that they hold
SIGHTINGS_WHEN_FULL = 8  # where sizes change all the time, captures would be most of the work
# By kind of device; tests have one for a CPU.
CAPTURERS: dict[str, Callable[[], Capturer]] = {"cuda": CudaCapturer}

_blocks: list[list[bool]] = []
_lock = threading.Lock()


@contextlib.contextmanager
def graphs(enabled: bool) -> Iterator[None]:
    """Switch graphs by default on or off inside the block, as for comparisons and debugging.

    It holds for all threads; of blocks that are open at once the one opened last counts. Graphs
    that are there stay, with their memory.

    Args:
        enabled: whether models may replay CUDA graphs.

    Raises:
        TypeError: it is no bool.
    """
    if not isinstance(enabled, bool):
        raise TypeError(f"enabled: expected a bool, got {enabled!r}")
    block = [enabled]
    with _lock:
        _blocks.append(block)
    try:
        yield
    finally:
        with _lock:
            _blocks[:] = [other for other in _blocks if other is not block]


class Graphed(Swapped):
    """Mixin of modules that replay graphs where they are called.

    It is the call and not the forward that does, so that readers of the forward (signatures,
    torch.fx) find it as it is.

    Attributes:
        _fastseg_graphs: whether it does; `fastseg.accelerate` sets it.
    """

    _fastseg_graphs = True
    _fastseg_runner: ModelGraphs | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output: by a graph where inputs are seen again and it can."""
        call: Any = super().__call__  # type: ignore[misc]
        found = None if torch.compiler.is_compiling() else self._graphs_for(args, kwargs)
        return call(*args, **kwargs) if found is None else found.call(call, args, kwargs)

    def fastseg_graphs(self) -> ModelGraphs | None:
        """The graphs of calls so far; None before the first that might have one."""
        return self._fastseg_runner

    def _drop_graphs(self) -> None:
        """Free the graphs, after all that is queued."""
        held = self.__dict__.pop("_fastseg_runner", None)
        if held is not None:
            held.clear()

    def _graphs_for(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ModelGraphs | None:
        """The graphs by which a call with these arguments may run; None for a plain call."""
        module: Any = self
        if module.training or not self._fastseg_graphs or "_is_replica" in self.__dict__:
            return None
        if (_blocks and not _blocks[-1][0]) or is_plain_path() or is_running_eagerly():
            return None
        values = (*args, *kwargs.values())
        kind = next((one.device.type for one in values if isinstance(one, torch.Tensor)), "")
        if kind not in CAPTURERS:
            return None
        if self._fastseg_runner is None:
            made = ModelGraphs(
                module,
                max_graphs=MAX_GRAPHS,
                sightings_when_full=SIGHTINGS_WHEN_FULL,
                capturer=CAPTURERS[kind](),
            )
            self.__dict__.setdefault("_fastseg_runner", made)  # one for all threads
        return self._fastseg_runner


class _ModelSwap:
    """What `fastseg.accelerate` gives other libraries' models around their encoders and heads."""

    name = "graphs"
    mixin = Graphed


MODEL_SWAP = _ModelSwap()
register_host(MODEL_SWAP)


def models_around(model: nn.Module, parts: list[Any]) -> list[nn.Module]:
    """The outermost modules in `model` that hold `parts` and are of the same library.

    What a graph leaves out, such as a print, is known of them; a user's own module around them may
    do anything.

    Args:
        parts: accelerated modules of other libraries.
    """
    found: list[nn.Module] = []
    covered: set[int] = set()
    for module in model.modules():  # outer ones first
        if id(module) in covered or any(module is part for part in parts):
            continue
        inner = list(module.modules())
        held = {_library(part) for part in parts if any(part is one for one in inner)}
        if _library(module) in held:
            found.append(module)
            covered.update(map(id, inner))
    return found


def _library(module: Any) -> str:
    kind = getattr(module, "_fastseg_class", None) or type(module)
    return str(kind.__module__).partition(".")[0]

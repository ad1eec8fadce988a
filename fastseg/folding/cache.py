"""Folded tensors and what they were made of: derived, never stale.

Before each use the sources, parameters and buffers, are compared with those at the time of folding:
by identity, version counter and address. An edit in place (an optimizer step, `copy_` under
no_grad) or a replaced parameter is noticed too. PyTorch does not count edits in place through
`parameter.data` (as merges of LoRA adapters are), nor those of its fused optimizers; so `train()`,
`eval()`, forwards with gradients and those of a model with foreign parts drop what is folded.

Outside of graphs that comparison is Python. A graph of torch.compile has it as one operator per
`FoldSet`, `fastseg::refresh_folds`, which folds into the memory that the graph reads; it is opaque
to CUDA graphs, so that their replays compare as well.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from fastseg.kernels.core.tracing import is_exporting

Folded = dict[str, Any]  # keyword arguments of an op, or dicts of such


def all_parts(*roots: nn.Module) -> list[nn.Module]:
    """The modules and all modules in them, in half the time that `modules()` takes."""
    parts = list(roots)
    for part in parts:
        parts.extend(child for child in part._modules.values() if child is not None)
    return parts


class _SourceTensor(NamedTuple):
    """A parameter or buffer as it was when it was folded."""

    tensor: torch.Tensor
    alias: torch.Tensor  # holds the memory, so that nothing else can take its address
    version: int
    address: int

    @classmethod
    def all_of(cls, tensors: list[torch.Tensor]) -> list[_SourceTensor]:
        return [cls(t, t.detach(), t._version, _address(t)) for t in tensors]

    def unchanged(self) -> bool:
        return self.tensor._version == self.version and self.tensor.data_ptr() == self.address


def _address(tensor: torch.Tensor) -> int:
    try:
        return tensor.data_ptr()
    except RuntimeError:  # a fake or wrapped one, which folding declines
        return 0


class _Snapshot(NamedTuple):
    """Folded tensors, and what they were folded from."""

    folded: Folded
    sources: list[_SourceTensor]
    traits: list[Any]

    def is_of(self, tensors: list[torch.Tensor], traits: list[Any]) -> bool:
        """Return whether it was folded from these, as they are now."""
        return (
            len(tensors) == len(self.sources)
            and traits == self.traits
            and all(
                tensor is source.tensor and source.unchanged()
                for tensor, source in zip(tensors, self.sources, strict=True)
            )
        )


def _own_tensors(parts: Sequence[nn.Module]) -> list[torch.Tensor]:
    """All parameters and buffers that the modules themselves hold."""
    tensors: list[torch.Tensor] = []
    for part in parts:
        tensors.extend(t for t in part._parameters.values() if t is not None)
        tensors.extend(t for t in part._buffers.values() if t is not None)
    return tensors


def _sources(roots: Sequence[nn.Module]) -> tuple[list[torch.Tensor], list[Any]]:
    """All tensors in the modules, and each module's class and the numbers that folding reads."""
    parts = all_parts(*roots)
    traits: list[Any] = []
    for part in parts:
        own = part.__dict__
        numbers = (own.get("eps"), own.get("stride"), own.get("dilation"))
        traits.append((type(part), *numbers, own.get("scale"), own.get("scaling")))
    return _own_tensors(parts), traits


def _finished(device: torch.device) -> bool:
    """Wait until what this stream has folded is there for all streams.

    False while a CUDA graph is captured: then nothing is folded before the graph is replayed.
    """
    if device.type != "cuda":
        return True
    if torch.cuda.is_current_stream_capturing():
        return False
    torch.cuda.current_stream(device).synchronize()
    return True


def _as_parameters(folded: Any, sources: set[int]) -> Any:
    """The tensors in `folded` as parameters, whose shapes torch.compile takes as constants.

    With `dynamic=True` it would hold sizes of other tensors for variables, equal to an image's
    where the numbers happen to be equal.

    Args:
        sources: addresses of the sources' storages. What lies in one is copied, lest a refresh
            writes into a parameter.
    """
    if isinstance(folded, torch.Tensor):
        if folded.untyped_storage().data_ptr() in sources:
            folded = folded.clone()
        return nn.Parameter(folded, requires_grad=False)
    if isinstance(folded, dict):
        return {name: _as_parameters(value, sources) for name, value in folded.items()}
    if isinstance(folded, list):
        return [_as_parameters(value, sources) for value in folded]
    return folded


def _tensors(folded: Any) -> Iterator[torch.Tensor]:
    if isinstance(folded, torch.Tensor):
        yield folded
    elif isinstance(folded, dict | list):
        for value in folded.values() if isinstance(folded, dict) else folded:
            yield from _tensors(value)


def _alike(folded: Folded, other: Folded) -> bool:
    """Return whether one can be copied into the other's memory."""
    ours, theirs = list(_tensors(folded)), list(_tensors(other))
    return len(ours) == len(theirs) and all(
        a.shape == b.shape and a.dtype == b.dtype and a.device == b.device
        for a, b in zip(ours, theirs, strict=True)
    )


class Fold:
    """The folded tensors of some modules.

    Args:
        roots: the modules; all parameters and buffers in them are sources.
        fold: computes the folded tensors, in a dict that may hold dicts and lists.
    """

    def __init__(self, roots: Sequence[nn.Module], fold: Callable[[], Folded]) -> None:
        self._roots = tuple(roots)
        self._fold = fold
        self.current: _Snapshot | None = None  # what was folded last
        # What compiled graphs read. Their memory stays, so it is refreshed in place.
        self.graph: _Snapshot | None = None

    def drop(self, graph: bool = False) -> None:
        """Forget the folded tensors; with `graph` also the memory that compiled graphs read."""
        self.current = None
        if graph:
            self.graph = None
        elif self.graph is not None:
            self.graph = self.graph._replace(sources=[])  # equal to no sources: refreshed next time

    def get(self) -> Folded:
        """The folded tensors, made anew where a source has changed.

        In a graph of torch.compile those that `FoldOwner.refresh_in_graph` keeps fresh. An exported
        graph folds by itself: whose tensors it is traced with cannot be told.
        """
        if not torch.compiler.is_compiling():
            return self.get_now()
        if is_exporting() or self.graph is None:
            return self._fold()
        return self.graph.folded

    def tensors(self) -> list[torch.Tensor]:
        """The sources as they are now."""
        return _own_tensors(all_parts(*self._roots))

    def get_now(self) -> Folded:
        """The folded tensors, made anew where a source has changed, outside of graphs."""
        tensors, traits = _sources(self._roots)
        current = self.current
        if current is not None and current.is_of(tensors, traits):
            return current.folded
        # Before folding: another thread may edit them meanwhile.
        sources = _SourceTensor.all_of(tensors)
        # Tensors of inference mode could neither be refreshed nor be captured by a graph.
        with torch.inference_mode(False), torch.no_grad():
            folded = self._fold()  # first: it may decline tensors that have no address
            storages = {tensor.untyped_storage().data_ptr() for tensor in tensors}
            folded = _as_parameters(folded, storages)
        if tensors and not _finished(tensors[0].device):
            return folded
        self.current = _Snapshot(folded, sources, traits)
        return folded

    def get_for_graph(self) -> Folded:
        """The folded tensors that graphs read, fresh."""
        folded = self.get_now()
        if self.graph is None or not _alike(self.graph.folded, folded):
            self.graph = self.current
        else:
            self.refresh_graph()
        return folded if self.graph is None else self.graph.folded

    def refresh_graph(self) -> None:
        """Bring the tensors that graphs read up to date, in their memory.

        Raises:
            RuntimeError: the weights have other shapes, dtypes or devices now.
        """
        graph = self.graph
        if graph is None:
            return
        tensors, traits = _sources(self._roots)
        if graph.is_of(tensors, traits):
            return
        sources = _SourceTensor.all_of(tensors)
        folded = self.get_now()
        if not _alike(graph.folded, folded):
            raise RuntimeError(
                "a compiled graph holds a model whose weights have other shapes, dtypes or devices "
                "now; call torch.compiler.reset()"
            )
        with torch.no_grad():
            for target, source in zip(_tensors(graph.folded), _tensors(folded), strict=True):
                target.copy_(source)
        self.graph = _Snapshot(graph.folded, sources, traits)


class FoldSet:
    """The folds that one graph reads, and what must still hold when it runs.

    Args:
        folds: each with tensors for graphs.
        problem: says why the graph would be wrong for the model as it is now, or None.
    """

    def __init__(self, folds: Sequence[Fold], problem: Callable[[], str | None]) -> None:
        self.folds = list(folds)
        self._problem = problem
        self._folded = [fold.graph and fold.graph.folded for fold in folds]
        self.tensors = list(_tensors(self._folded))
        self._sources = [fold.tensors() for fold in folds]
        with _lock:
            self.handle = next(_handles)
            _fold_sets[self.handle] = self

    def is_of(self, folds: Sequence[Fold]) -> bool:
        """Return whether these are the folds, with the same sources and tensors for graphs."""
        return (
            len(folds) == len(self.folds)
            and all(
                fold is other and (fold.graph and fold.graph.folded) is folded
                for fold, other, folded in zip(folds, self.folds, self._folded, strict=True)
            )
            and self.has_sources()
        )

    def has_sources(self) -> bool:
        """Return whether modules hold what was folded; a graph asks it while it is traced.

        Not so inside of `torch.func.functional_call`, which a graph sees, and nothing outside.
        """
        for fold, sources in zip(self.folds, self._sources, strict=True):
            tensors = fold.tensors()
            if len(tensors) != len(sources):
                return False
            for tensor, source in zip(tensors, sources, strict=True):
                if tensor is not source:
                    return False
        return True

    def refresh(self) -> None:
        """Make all folds fresh.

        Raises:
            RuntimeError: the model has changed in ways that the graph does not know.
        """
        problem = self._problem()
        if problem is not None:
            raise RuntimeError(
                f"a compiled graph holds a model that has changed since: {problem}; call "
                "torch.compiler.reset()"
            )
        for fold in self.folds:
            fold.refresh_graph()


_fold_sets: weakref.WeakValueDictionary[int, FoldSet] = weakref.WeakValueDictionary()
_handles = itertools.count()
_lock = threading.Lock()


def _refresh_folds(folded: list[torch.Tensor], handle: int) -> None:
    fold_set = _fold_sets.get(handle)
    if fold_set is None:
        raise RuntimeError("a compiled graph outlived its model; call torch.compiler.reset()")
    fold_set.refresh()
    # Backends that make graphs functional pass copies, and copy them back over the originals.
    with torch.no_grad():
        for passed, kept in zip(folded, fold_set.tensors, strict=True):
            if passed.data_ptr() != kept.data_ptr():
                passed.copy_(kept)


_LIBRARY = torch.library.Library("fastseg", "FRAGMENT")
_LIBRARY.define(
    "refresh_folds(Tensor(a!)[] folded, int handle) -> ()",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe),
)
_LIBRARY.impl("refresh_folds", _refresh_folds, "CompositeExplicitAutograd")
torch.library.register_fake("fastseg::refresh_folds", lambda folded, handle: None, lib=_LIBRARY)


class FoldOwner:
    """A module whose forward reads folds, as a mixin: what torch.compile needs of it."""

    _fold_set: FoldSet | None = None

    def folds(self) -> list[Fold]:
        """List all folds that the forward reads."""
        raise NotImplementedError

    def graph_problem(self) -> str | None:
        """Reason why a graph that was traced on the fast path would be wrong now, or None."""
        raise NotImplementedError

    def drop_folds(self) -> None:
        """Forget all that is folded, where weights may be edited in ways that are not counted.

        torch's fused optimizers, the default of transformers' Trainer, do that, and merges of LoRA
        adapters. So a forward on the plain path for a reason of its own ends with this.
        """
        if not torch.compiler.is_compiling():
            for fold in self.folds():
                fold.drop()

    def refresh_in_graph(self) -> bool:
        """Return whether a forward may read its folds; it calls this before it does.

        Outside of graphs of torch.compile it may always.

        The folding itself happens while the graph is traced, and is not in it: the graph takes the
        folded tensors as inputs, and has one operator that keeps them fresh.
        """
        if not torch.compiler.is_compiling() or is_exporting():
            return True
        self._fold_now()
        fold_set = self._fold_set
        if fold_set is None or not fold_set.has_sources():
            return False
        torch.ops.fastseg.refresh_folds(fold_set.tensors, fold_set.handle)
        return True

    # A method: torch 2.11 takes no module as an argument of such a function.
    @torch.compiler.assume_constant_result
    def _fold_now(self) -> bool:
        """Fold what the forward reads, outside of the graph that is traced."""
        folds = self.folds()
        for fold in folds:
            fold.get_for_graph()
        if self._fold_set is None or not self._fold_set.is_of(folds):
            self._fold_set = FoldSet(folds, self.graph_problem)
        return True

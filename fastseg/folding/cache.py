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

Packed = dict[str, Any]


def all_parts(*roots: nn.Module) -> list[nn.Module]:
    """The modules and all modules in them, in half the time that `modules()` takes."""
    parts = list(roots)
    for part in parts:
        parts.extend(child for child in part._modules.values() if child is not None)
    return parts


class _Source(NamedTuple):
    """A parameter or buffer as it was when it was folded."""

    tensor: torch.Tensor
    alias: torch.Tensor  # holds the memory, so that nothing else can take its address
    version: int
    address: int

    @classmethod
    def all_of(cls, tensors: list[torch.Tensor]) -> list[_Source]:
        return [cls(t, t.detach(), t._version, _address(t)) for t in tensors]

    def unchanged(self) -> bool:
        return self.tensor._version == self.version and self.tensor.data_ptr() == self.address


def _address(tensor: torch.Tensor) -> int:
    try:
        return tensor.data_ptr()
    except RuntimeError:  # a fake or wrapped one, which folding declines
        return 0


class _Folded(NamedTuple):
    packed: Packed
    sources: list[_Source]
    traits: list[Any]

    def is_of(self, tensors: list[torch.Tensor], traits: list[Any]) -> bool:
        """Whether it was folded from these, as they are now."""
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


def _as_parameters(packed: Any, sources: set[int]) -> Any:
    """The tensors in `packed` as parameters, whose shapes torch.compile takes as constants.

    With `dynamic=True` it would hold sizes of other tensors for variables, equal to an image's
    where the numbers happen to be equal.

    Args:
        sources: addresses of the sources' storages. What lies in one is copied, lest a refresh
            writes into a parameter.
    """
    if isinstance(packed, torch.Tensor):
        if packed.untyped_storage().data_ptr() in sources:
            packed = packed.clone()
        return nn.Parameter(packed, requires_grad=False)
    if isinstance(packed, dict):
        return {name: _as_parameters(value, sources) for name, value in packed.items()}
    if isinstance(packed, list):
        return [_as_parameters(value, sources) for value in packed]
    return packed


def _tensors(packed: Any) -> Iterator[torch.Tensor]:
    if isinstance(packed, torch.Tensor):
        yield packed
    elif isinstance(packed, dict | list):
        for value in packed.values() if isinstance(packed, dict) else packed:
            yield from _tensors(value)


def _alike(packed: Packed, other: Packed) -> bool:
    """Whether one can be copied into the other's memory."""
    ours, theirs = list(_tensors(packed)), list(_tensors(other))
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

    def __init__(self, roots: Sequence[nn.Module], fold: Callable[[], Packed]) -> None:
        self._roots = tuple(roots)
        self._fold = fold
        self.folded: _Folded | None = None
        # What compiled graphs read. Their memory stays, so it is refreshed in place.
        self.graph: _Folded | None = None

    def drop(self, graph: bool = False) -> None:
        """Forget the folded tensors; with `graph` also the memory that compiled graphs read."""
        self.folded = None
        if graph:
            self.graph = None
        elif self.graph is not None:
            self.graph = self.graph._replace(sources=[])  # equal to no sources: refreshed next time

    def get(self) -> Packed:
        """The folded tensors, made anew where a source has changed.

        In a graph of torch.compile those that `FoldOwner.refresh_in_graph` keeps fresh. An exported
        graph folds by itself: whose tensors it is traced with cannot be told.
        """
        if not torch.compiler.is_compiling():
            return self.get_now()
        if torch.compiler.is_exporting() or self.graph is None:
            return self._fold()
        return self.graph.packed

    def tensors(self) -> list[torch.Tensor]:
        """The sources as they are now."""
        return _own_tensors(all_parts(*self._roots))

    def get_now(self) -> Packed:
        """The folded tensors, made anew where a source has changed, outside of graphs."""
        tensors, traits = _sources(self._roots)
        folded = self.folded
        if folded is not None and folded.is_of(tensors, traits):
            return folded.packed
        # Before folding: another thread may edit them meanwhile.
        sources = _Source.all_of(tensors)
        # Tensors of inference mode could neither be refreshed nor be captured by a graph.
        with torch.inference_mode(False), torch.no_grad():
            packed = self._fold()  # first: it may decline tensors that have no address
            storages = {tensor.untyped_storage().data_ptr() for tensor in tensors}
            packed = _as_parameters(packed, storages)
        if tensors and not _finished(tensors[0].device):
            return packed
        self.folded = _Folded(packed, sources, traits)
        return packed

    def get_for_graph(self) -> Packed:
        """The folded tensors that graphs read, fresh."""
        packed = self.get_now()
        if self.graph is None or not _alike(self.graph.packed, packed):
            self.graph = self.folded
        else:
            self.refresh_graph()
        return packed if self.graph is None else self.graph.packed

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
        sources = _Source.all_of(tensors)
        packed = self.get_now()
        if not _alike(graph.packed, packed):
            raise RuntimeError(
                "a compiled graph holds a model whose weights have other shapes, dtypes or devices "
                "now; call torch.compiler.reset()"
            )
        with torch.no_grad():
            for target, source in zip(_tensors(graph.packed), _tensors(packed), strict=True):
                target.copy_(source)
        self.graph = _Folded(graph.packed, sources, traits)


class FoldSet:
    """The folds that one graph reads, and what must still hold when it runs.

    Args:
        folds: each with tensors for graphs.
        problem: says why the graph would be wrong for the model as it is now, or None.
    """

    def __init__(self, folds: Sequence[Fold], problem: Callable[[], str | None]) -> None:
        self.folds = list(folds)
        self._problem = problem
        self._packed = [fold.graph and fold.graph.packed for fold in folds]
        self.tensors = list(_tensors(self._packed))
        self._sources = [fold.tensors() for fold in folds]
        with _lock:
            self.handle = next(_handles)
            _fold_sets[self.handle] = self

    def is_of(self, folds: Sequence[Fold]) -> bool:
        """Whether these are the folds, with the same sources and the same tensors for graphs."""
        return (
            len(folds) == len(self.folds)
            and all(
                fold is other and (fold.graph and fold.graph.packed) is packed
                for fold, other, packed in zip(folds, self.folds, self._packed, strict=True)
            )
            and self.has_sources()
        )

    def has_sources(self) -> bool:
        """Whether modules hold the tensors that were folded; a graph asks it while it is traced.

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


def _refresh_folds(packed: list[torch.Tensor], handle: int) -> None:
    fold_set = _fold_sets.get(handle)
    if fold_set is None:
        raise RuntimeError("a compiled graph outlived its model; call torch.compiler.reset()")
    fold_set.refresh()
    # Backends that make graphs functional pass copies, and copy them back over the originals.
    with torch.no_grad():
        for given, kept in zip(packed, fold_set.tensors, strict=True):
            if given.data_ptr() != kept.data_ptr():
                given.copy_(kept)


_LIBRARY = torch.library.Library("fastseg", "FRAGMENT")
_LIBRARY.define(
    "refresh_folds(Tensor(a!)[] packed, int handle) -> ()",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe),
)
_LIBRARY.impl("refresh_folds", _refresh_folds, "CompositeExplicitAutograd")
torch.library.register_fake("fastseg::refresh_folds", lambda packed, handle: None, lib=_LIBRARY)


class FoldOwner:
    """A module whose forward reads folds, as a mixin: what torch.compile needs of it."""

    _fold_set: FoldSet | None = None

    def folds(self) -> list[Fold]:
        """All folds that the forward reads."""
        raise NotImplementedError

    def graph_problem(self) -> str | None:
        """Why a graph that was traced on the fast path would be wrong now; None where it is not."""
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
        """To be called by a forward before it reads its folds: whether it may.

        Outside of graphs of torch.compile it may always.

        The folding itself happens while the graph is traced, and is not in it: the graph takes the
        folded tensors as inputs, and has one operator that keeps them fresh.
        """
        if not torch.compiler.is_compiling() or torch.compiler.is_exporting():
            return True
        _fold_now(self)
        fold_set = self._fold_set
        if fold_set is None or not fold_set.has_sources():
            return False
        torch.ops.fastseg.refresh_folds(fold_set.tensors, fold_set.handle)
        return True


@torch.compiler.assume_constant_result
def _fold_now(owner: FoldOwner) -> bool:
    """Fold what `owner` reads, outside of the graph that is traced."""
    folds = owner.folds()
    for fold in folds:
        fold.get_for_graph()
    if owner._fold_set is None or not owner._fold_set.is_of(folds):
        owner._fold_set = FoldSet(folds, owner.graph_problem)
    return True

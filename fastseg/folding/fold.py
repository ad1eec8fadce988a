"""An op's part of a model: what it is folded from, its folded tensors, and why it may have none.

A part reads its modules by name at every fold, so what is replaced is found.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch import nn

from fastseg.kernels.core.weights import Weights

from .conditions import (
    all_parts,
    first_problem,
    is_plain,
    kind_of,
    kind_problem,
    part_problem,
    tensor_problem,
)
from .find import Declined
from .freshness import ModelWatch
from .sharded import is_gathered

Folded = Any  # weights of an op, or tensors, in lists and dicts too


def tensors_of(module: nn.Module) -> Iterator[torch.Tensor]:
    """The parameters and buffers that `module` itself holds."""
    for tensor in (*module._parameters.values(), *module._buffers.values()):
        if tensor is not None:
            yield tensor


def tensors_in(folded: Any) -> Iterator[torch.Tensor]:
    """All tensors in `folded`."""
    if isinstance(folded, torch.Tensor):
        yield folded
    elif isinstance(folded, Weights):
        yield from folded.tensors()
    elif isinstance(folded, dict | list):
        for value in folded.values() if isinstance(folded, dict) else folded:
            yield from tensors_in(value)


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
    if isinstance(folded, Weights):
        return folded.map(lambda tensor: _as_parameters(tensor, sources))
    if isinstance(folded, dict):
        return {name: _as_parameters(value, sources) for name, value in folded.items()}
    if isinstance(folded, list):
        return [_as_parameters(value, sources) for value in folded]
    return folded


def _alike(folded: Folded, other: Folded) -> bool:
    """Return whether one can be copied into the other's memory."""
    ours, theirs = list(tensors_in(folded)), list(tensors_in(other))
    return len(ours) == len(theirs) and all(
        a.shape == b.shape and a.dtype == b.dtype and a.device == b.device
        for a, b in zip(ours, theirs, strict=True)
    )


def _is_finished(device: torch.device) -> bool:
    """Wait until what this stream has folded is there for all streams.

    False while a CUDA graph is captured: then nothing is folded before the graph is replayed.
    """
    if device.type != "cuda":
        return True
    if torch.cuda.is_current_stream_capturing():
        return False
    torch.cuda.current_stream(device).synchronize()
    return True


def _folding_problem(part: nn.Module) -> str | None:
    # Of FullyShardedDataParallel and replicas of DataParallel, in memory that may be freed.
    for name in ("weight", "bias"):
        if isinstance(part.__dict__.get(name), torch.Tensor):
            return f"has a {name} that is no parameter"
    return tensor_problem(part)


def _gradient_problem(part: nn.Module) -> str | None:
    if part._backward_hooks or part._backward_pre_hooks:
        return "has backward hooks"
    if any(is_gathered(part, tensor) for tensor in tensors_of(part)):
        return None  # a report asks outside of a forward
    return tensor_problem(part)


class Known:
    """Modules that compute what their names say: fastseg's own classes, or kinds that were tried.

    Args:
        owner: the module that names are relative to.
        roots: the modules.
        own: they are fastseg's own.
        inside: whether the modules in them count too.

    Attributes:
        kind: of the modules, as they were when they were tried out.
        was_tried: whether a trial was of this kind.
    """

    def __init__(
        self, owner: nn.Module, roots: list[nn.Module], own: bool, inside: bool = False
    ) -> None:
        self.roots = roots
        self._owner = owner
        self._own = own
        self._inside = inside
        self.kind = None if own else self._kind_now()
        self.was_tried = True

    def known_modules(self) -> list[nn.Module]:
        """The modules, all of them."""
        return all_parts(*self.roots) if self._inside else self.roots

    def _kind_now(self) -> Hashable:
        # Of what a LayerNorm computes, `eps` is all that is no tensor, and folds read it.
        parts = self.known_modules()
        return tuple(kind_of(part, inside=False, without=("eps",)) for part in parts)

    def problem(self, any_mode: bool = False) -> str | None:
        """Reason why the modules would do something else than the op.

        Args:
            any_mode: leave aside that they may be in training mode.
        """
        modules = self.known_modules()
        reason = first_problem(self._owner, modules, lambda part: part_problem(part, any_mode))
        if reason is not None:
            return reason
        if self._own:
            return first_problem(self._owner, modules, kind_problem)
        if (self.was_tried and self.kind == self._kind_now()) or is_plain(modules):
            return None
        return "changed since it was tried out; call accelerate again"

    def problem_with_gradients(self) -> str | None:
        """Reason why the modules would do something else than a form of them for training."""
        reason = self.problem(any_mode=True)
        return (
            reason
            or first_problem(self._owner, self.known_modules(), _gradient_problem)
            or self._mixed()
        )

    def _mixed(self) -> str | None:
        """Reason that lies in weights of different kinds."""
        kinds = {
            f"{tensor.dtype} on {tensor.device}"
            for module in self.known_modules()
            for tensor in tensors_of(module)
            if tensor.is_floating_point()
        }
        if len(kinds) > 1:
            return f"its weights are of different kinds: {', '.join(sorted(kinds))}"
        return None


class Part(Known):
    """One op of a module: either folded, or left to the module's own code for a reason.

    Args:
        owner: the module that names are relative to.
        roots: the modules whose work the op does.
        fold: computes the op's weights; raises Declined where it cannot be.
        own: they are fastseg's own, and known by their classes; others are tried out first.

    Attributes:
        reason: why it runs by the module's own code, as settled; None where it runs folded.
        watch: the roots as they were when they were folded; None where that does not last.
    """

    def __init__(
        self, owner: nn.Module, roots: list[nn.Module], fold: Callable[[], Folded], own: bool
    ) -> None:
        self.reason: str | None = None
        self._fold = fold
        self._declined: str | None = None  # what the last fold said
        self._folded: Folded | None = None
        self._in_graph = False  # then its memory stays, and is refreshed in place
        self._at_each_use = False
        self.watch: ModelWatch | None = None
        super().__init__(owner, roots, own, inside=True)

    def settle(self, any_mode: bool = False, fold: bool = True) -> None:
        """Fold it where a module has changed since, or find the reason why not.

        Args:
            any_mode: leave aside that modules may be in training mode.
            fold: where False, as for an export, `folded` folds at each call.
        """
        watch = self.watch
        if fold and watch is not None and watch.is_same():
            return
        self.watch = None
        self._at_each_use = not fold
        reason = self.problem(any_mode)
        if reason is None and fold:
            # Before the fold: others may edit meanwhile.
            watch = ModelWatch(*self.roots, derived=False) if watch is None else watch.renewed()
            is_kept = self._fold_and_keep()
            if is_kept and (not any_mode or self.problem() is None):
                self.watch = watch
        # Set once, at the end: other threads may be reading it.
        self.reason = reason or self._declined
        if self.reason is not None:
            # A LoRA adapter may go the way it came, and leave its trace in `parameter.data`.
            self.drop()

    def decline(self, reason: str) -> None:
        """Leave it to the module's own code."""
        self.reason = reason
        self.drop()

    def folded(self) -> Folded:
        """The op's weights, as settled."""
        if self._at_each_use or self._folded is None:
            return self._checked_fold()
        return self._folded

    def tensors(self) -> list[torch.Tensor]:
        """The folded tensors."""
        return list(tensors_in(self._folded))

    def for_graphs(self) -> list[torch.Tensor]:
        """The folded tensors, whose memory stays from now on and is refreshed in place."""
        self._in_graph = True
        return self.tensors()

    def drop(self, free: bool = False) -> None:
        """Forget what is folded.

        Args:
            free: also the memory that compiled graphs read.
        """
        self.watch = None
        if free or not self._in_graph:
            self._folded = None
            self._in_graph = False

    def _fold_and_keep(self) -> bool:
        """Fold, or have `_declined` say why not; return whether it is there for later calls."""
        modules = self.known_modules()
        self._declined = first_problem(self._owner, modules, _folding_problem)
        if self._declined is not None:
            return False
        # Tensors of inference mode could neither be refreshed nor be captured by a graph.
        with torch.inference_mode(False), torch.no_grad():
            try:
                folded = self._checked_fold()
            except Declined as declined:
                self._declined = str(declined)
                return False
            if self._in_graph and self._folded is not None and _alike(self._folded, folded):
                pairs = zip(tensors_in(self._folded), tensors_in(folded), strict=True)
                for target, source in pairs:
                    target.copy_(source)
            else:
                sources = [tensor for module in modules for tensor in tensors_of(module)]
                storages = {tensor.untyped_storage().data_ptr() for tensor in sources}
                self._folded = _as_parameters(folded, storages)
            return all(map(_is_finished, {tensor.device for tensor in tensors_in(folded)}))

    def _checked_fold(self) -> Folded:
        if reason := self._mixed():
            raise Declined(reason)
        return self._fold()

"""Modules of fastseg's own families that keep folded tensors beside their parameters.

Folded tensors are outside `state_dict`, `buffers()` and pickles. They are made on the first eval
forward without gradients; `cache.py` says how they are kept fresh. What nothing notices, an edit in
place through `parameter.data` between two such forwards, needs `fastseg.refold(model)`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn

from .cache import Fold, Folded, FoldOwner
from .conditions import structure_reason
from .swap import Accelerated


class FoldedModule(nn.Module):
    """A module with a second forward, on tensors folded from its parameters."""

    _fold_cache: Fold | None = None

    def fold(self) -> Folded:
        """The folded tensors, in the parameters' dtype and on their device."""
        raise NotImplementedError

    def fold_cache(self) -> Fold:
        if self._fold_cache is None:
            self._fold_cache = Fold((self,), lambda: self.fold())
        return self._fold_cache

    def folded(self) -> Folded:
        """The folded tensors, made anew where a parameter has changed."""
        # A replica of DataParallel shares the cache of its original, on another device.
        return self.fold() if "_is_replica" in self.__dict__ else self.fold_cache().get()

    def train(self, mode: bool = True) -> FoldedModule:
        self._drop()  # on eval() too: what comes before may have edited `parameter.data`
        super().train(mode)
        return self

    def _drop(self, graph: bool = False) -> None:
        if self._fold_cache is not None:
            self._fold_cache.drop(graph)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> FoldedModule:
        self._drop(graph=True)
        super()._apply(fn, recurse)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._drop()
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is folded: copies and pickles fold for themselves."""
        return without_folds(self.__dict__)


class FoldedForward(FoldOwner):
    """Mixin of a module whose forward runs `FoldedModule`s in it on folded tensors."""

    def folds(self) -> list[Fold]:
        modules = cast(nn.Module, self).modules()
        return [part.fold_cache() for part in modules if isinstance(part, FoldedModule)]

    # A graph of torch.compile has the answer as a constant, and asks anew when it runs.
    @torch.compiler.assume_constant_result
    def graph_problem(self) -> str | None:
        return structure_reason(cast(nn.Module, self))

    def __getstate__(self) -> dict[str, Any]:
        return without_folds(self.__dict__)


def without_folds(state: dict[str, Any]) -> dict[str, Any]:
    """`state` of a module without what is derived."""
    return {n: v for n, v in state.items() if n not in ("_fold_cache", "_fold_set")}


def refold(model: nn.Module) -> None:
    """Forget all that is folded in `model`; the next forward folds anew.

    Needed only after an edit that PyTorch does not count, in eval mode and without gradients: one
    through `parameter.data`, or from outside of this process.

    Raises:
        TypeError: `model` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    for module in model.modules():
        if isinstance(module, FoldedModule):
            module._drop(graph=True)
        elif isinstance(module, Accelerated):
            module.drop_folds()


def repack(model: nn.Module) -> None:
    """Call `refold`: its deprecated name, to be removed with the release after the first."""
    warnings.warn("repack: the name is refold now", DeprecationWarning, stacklevel=2)
    refold(model)

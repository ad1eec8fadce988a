"""What a module's fast forward runs on, and the one decision whether it still may.

Every forward asks `State.settle`: is the module as it was when its parts were folded? An eager
forward asks before it runs. A graph of torch.compile takes the folded tensors as inputs and has an
operator at its head, `fastseg::refresh_folds`, that asks when the graph runs, and folds into the
memory that the graph reads; it is opaque to CUDA graphs, so that their replays ask as well. An
exported program folds at each run. `fastseg.graphed` watches a whole model, and states in it.

PyTorch does not count edits in place through `parameter.data` (as merges of LoRA adapters are), nor
those of its fused optimizers; so `train()`, `eval()`, forwards with gradients and those of a model
with foreign parts drop what is folded.
"""

from __future__ import annotations

import functools
import itertools
import operator
import threading
import weakref
from collections.abc import Callable, Hashable, Iterator

import torch
from torch import nn

from fastseg.kernels.core.plans import LaunchPlans
from fastseg.kernels.core.weights import Weights

from .fold import Known, Part, tensors_of
from .freshness import ATTRIBUTES_COUNT, Derived, ModelWatch
from .sharded import sharded_reason


class Plan:
    """Base of the plan of a module's forward, part by part: folded, or by the module's own code.

    As it is, it is all or nothing: the whole runs its own code where one part has to.
    """

    @functools.cached_property
    def launches(self) -> LaunchPlans:
        """Plans of what runs folded, which hold until something is folded anew."""
        return LaunchPlans(self._held)

    def _held(self) -> Iterator[torch.Tensor]:
        for part in self.parts():
            yield from part.tensors()
        for one in self.known():
            for module in one.known_modules():
                yield from tensors_of(module)

    def parts(self) -> list[Part]:
        """The parts of the module, folded or not."""
        raise NotImplementedError

    def is_current(self) -> bool:
        """Return whether the module still holds the modules that this was made for."""
        raise NotImplementedError

    def weights(self) -> Iterator[tuple[str, Weights]]:
        """Each op that runs folded, by name, with its weights."""
        raise NotImplementedError

    def settle(self, any_mode: bool = False, fold: bool = True) -> str | None:
        """Fold what can be folded; a reason where the module as a whole runs its own code.

        Args:
            any_mode: leave aside that parts may be in training mode.
            fold: where False, find reasons alone; parts fold at each use then.
        """
        for part in self.parts():
            part.settle(any_mode, fold)
        return next((part.reason for part in self.parts() if part.reason is not None), None)

    def settle_training(self) -> None:
        """Find what has a form for training, and why other parts run by their own code."""

    def known(self) -> list[Known]:
        """The parts, and what else has to be known."""
        return [*self.parts()]

    def folded_parts(self) -> list[Part]:
        """The parts that run folded, as settled."""
        return [part for part in self.parts() if part.reason is None]

    def modes(self) -> list[str | None]:
        """Reasons why parts are not folded, None for those that are: graphs depend on them."""
        return [part.reason for part in self.parts()]

    def runs_by(self) -> str | None:
        """How it runs, for reports, where that is not by ops that have kernels."""
        return None

    def reasons(self) -> Iterator[tuple[str, str]]:
        """Pairs (module's name, reason) of what is not folded beside what `settle` tells."""
        return iter(())


class State(Derived):
    """The plan of a module, settled for the module as it is.

    Args:
        module: the module.
        make_plan: makes its plan.

    Attributes:
        traced: what the last graph of torch.compile was traced with.
    """

    def __init__(self, module: nn.Module, make_plan: Callable[[], Plan]) -> None:
        self._module = module
        self._make_plan = make_plan
        self._lock = threading.RLock()
        self._plan: Plan | None = None
        self._tried: set[Hashable] | None = None  # kinds of what was in the first plan
        self._reason: str | None = None
        self._watch: ModelWatch | None = None  # the module as it was when the plan was settled
        self.traced: Traced | None = None

    def plan(self) -> Plan:
        """The plan, made anew where modules were exchanged."""
        with self._lock:
            if self._plan is None or not self._plan.is_current():
                self._plan = self._make_plan()
                known = self._plan.known()
                if self._tried is None:
                    self._tried = {one.kind for one in known}
                for one in known:  # not so where modules were exchanged for others
                    one.was_tried = one.kind in self._tried
            return self._plan

    @property
    def settled(self) -> Plan:
        """The plan as it was settled last."""
        assert self._plan is not None
        return self._plan

    def settle(self, fold: bool = True, patience: float = 0.0) -> str | None:
        """Make what is folded fresh; a reason where the module as a whole runs its own code.

        Args:
            fold: where False, as for an export, parts fold at each use until the next call.
            patience: seconds for which a look at attributes counts; see `ModelWatch`.
        """
        watch = self._watch
        if fold and watch is not None and watch.is_same(patience):
            return self._reason
        with self._lock:
            self._watch = None
            plan = self.plan()
            self._count(plan)
            if not fold:
                return plan.settle(fold=False)
            # Before any fold: others may edit meanwhile.
            watch = ModelWatch(self._module, derived=False) if watch is None else watch.renewed()
            if reason := sharded_reason(self._module):
                for part in plan.parts():
                    part.decline(reason)
                self._reason, self._watch = reason, watch
                return reason
            self._reason = reason = plan.settle()
            if all(part.watch is not None for part in plan.folded_parts()):
                self._watch = watch
            return reason

    def _count(self, plan: Plan) -> None:
        """Tell all that was made of what is folded that it is no more."""
        self.folds += 1
        plan.launches.clear()

    def trace(self) -> None:
        """Make `traced` what a graph is to be traced with, after `settle`."""
        if self.traced is None or not self.traced.is_current():
            self.traced = Traced(self)

    def drop(self, free: bool = False) -> None:
        """Forget what is folded; with `free` also the memory that compiled graphs read."""
        with self._lock:
            self._watch = None
            if self._plan is not None:
                self._count(self._plan)
                for part in self._plan.parts():
                    part.drop(free)
            if free:
                self.traced = None


class Traced:
    """The folded tensors that a graph of torch.compile reads, and what it takes for granted."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._plan = state.settled
        self._modes = self._plan.modes()
        self._parts = self._plan.folded_parts()
        self._sources = [self._sources_of(part) for part in self._parts]
        self.tensors = [tensor for part in self._parts for tensor in part.for_graphs()]
        self.addresses = [tensor.data_ptr() for tensor in self.tensors]
        self._folds = -1  # of the state, when it was last found to be what this is of
        with _lock:
            self.handle = next(_handles)
            _graphs[self.handle] = self

    @staticmethod
    def _sources_of(part: Part) -> list[torch.Tensor]:
        return [tensor for module in part.known_modules() for tensor in tensors_of(module)]

    def is_current(self) -> bool:
        """Return whether a graph would be traced with the same now."""
        return self._difference() is None and self.has_sources()

    def has_sources(self) -> bool:
        """Return whether modules hold what was folded; a graph asks it while it is traced.

        Not so inside of `torch.func.functional_call`, which a graph sees, and nothing outside.
        """
        for part, sources in zip(self._parts, self._sources, strict=True):
            tensors = self._sources_of(part)
            if len(tensors) != len(sources):
                return False
            for tensor, source in zip(tensors, sources, strict=True):
                if tensor is not source:
                    return False
        return True

    def refresh(self) -> None:
        """Make the tensors fresh.

        Raises:
            RuntimeError: the module has changed in ways that the graph does not know.
        """
        reason = self._state.settle(patience=ATTRIBUTES_COUNT)
        folds = self._state.folds
        if reason is None and folds != self._folds:
            reason = self._difference()
        if reason is not None:
            raise RuntimeError(
                f"a compiled graph holds a model that has changed since: {reason}; call "
                "torch.compiler.reset()"
            )
        self._folds = folds

    def _difference(self) -> str | None:
        plan = self._state.settled
        if plan is not self._plan:
            return "modules in it were exchanged"
        for then, now in zip(self._modes, plan.modes(), strict=True):
            if then != now:
                return f"a part of it changed: {now}" if now else "other parts of it can be folded"
        tensors = [tensor for part in self._parts for tensor in part.for_graphs()]
        if len(tensors) == len(self.tensors) and all(map(operator.is_, tensors, self.tensors)):
            return None
        return "its weights have other shapes, dtypes or devices"


_graphs: weakref.WeakValueDictionary[int, Traced] = weakref.WeakValueDictionary()
_handles = itertools.count()
_lock = threading.Lock()


def _refresh_folds(folded: list[torch.Tensor], handle: int) -> None:
    traced = _graphs.get(handle)
    if traced is None:
        raise RuntimeError("a compiled graph outlived its model; call torch.compiler.reset()")
    traced.refresh()
    if list(map(torch.Tensor.data_ptr, folded)) == traced.addresses:
        return
    # Backends that make graphs functional pass copies, and copy them back over the originals.
    with torch.no_grad():
        for passed, kept in zip(folded, traced.tensors, strict=True):
            if passed.data_ptr() != kept.data_ptr():
                passed.copy_(kept)


_LIBRARY = torch.library.Library("fastseg", "FRAGMENT")
_LIBRARY.define(
    "refresh_folds(Tensor(a!)[] folded, int handle) -> ()",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe),
)
_LIBRARY.impl("refresh_folds", _refresh_folds, "CompositeExplicitAutograd")
torch.library.register_fake("fastseg::refresh_folds", lambda folded, handle: None, lib=_LIBRARY)

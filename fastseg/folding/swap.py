"""Modules with a fast forward beside their own: what it runs is a `Plan` that their `Host` makes.

A `Host` describes a kind of module: one of fastseg's own, whose classes have the fast forward from
the start (`with_plan`), or one of another library. To the latter `accelerate` gives a subclass of
their own class. Setting `__class__` keeps the object, its tree, parameters, hooks and `isinstance`;
the subclass has the name of the host's class. Unlike a `forward` bound to the instance it also
holds in a replica of DataParallel, which copies attributes, and in copies and pickles.
"""

from __future__ import annotations

import copyreg
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, cast

import torch
from torch import nn

from fastseg.kernels.core.tracing import is_exporting

from .cache import Fold, Folded, FoldOwner
from .conditions import mode_reason
from .parts import Part


class _HostAnswers:
    def __repr__(self) -> str:
        return "HOST"


HOST = _HostAnswers()  # "let the host's own forward answer"


class Plan(Protocol):
    """Plan of a module's forward, part by part: folded, or by the host's own code."""

    def is_current(self) -> bool:
        """Return whether the module still holds the modules that this was made for."""

    def settle(self, any_mode: bool = False) -> str | None:
        """Fold what can be folded; a reason where the module as a whole stays the host's.

        Args:
            any_mode: leave aside that parts may be in training mode.
        """

    def may_run(self) -> bool:
        """Return whether it may run, as settled before, or as it is now in an export."""

    def parts(self) -> list[Part]:
        """The parts of the module, folded or not."""

    def folded_parts(self) -> list[Part]:
        """The parts that run folded, as settled."""

    def modes(self) -> list[str | None]:
        """Reasons why parts stay the host's, None for those that do not: graphs depend on them."""

    def reasons(self) -> Iterator[tuple[str, str]]:
        """Pairs (module's name, reason) of what stays the host's."""

    def arguments(self) -> Iterator[tuple[str, Folded]]:
        """Each op that runs folded, by name, with its folded arguments."""


class Host(Protocol):
    """A kind of module."""

    @property
    def name(self) -> str:
        """Name of the library, for reports and pickles."""

    @property
    def own(self) -> bool:
        """Return whether it is of fastseg, whose classes have the fast forward from the start."""

    @property
    def method(self) -> str:
        """The method that is replaced."""

    def plan(self, module: Any, refused: Mapping[str, str], /) -> Plan:
        """Make the plan of `module`; modules with the names in `refused` stay the host's."""

    def answer(self, module: Any, plan: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Return what the method returns, by `plan`; HOST where only the host can answer."""


_hosts: dict[tuple[str, str], Host] = {}


def register_host(host: Host) -> None:
    """Make `host` known to pickles of accelerated modules, which name it."""
    if _key(host) in _hosts:
        raise ValueError(f"host: there is one of the name {host.name!r} already")
    _hosts[_key(host)] = host


def _key(host: Host) -> tuple[str, str]:
    return type(host).__name__, host.name


_DERIVED = ("_fastseg_plan", "_fastseg_kind", "_fold_set")


class Accelerated(FoldOwner):
    """Mixin of modules with a fast forward.

    Attributes:
        _fastseg_class: the class that `restore` gives back; None for one of fastseg's own.
        _fastseg_refused: why layers, by their names, stay the host's, as their check has found.
        _fastseg_kind: what the modules in it were when they were checked; None in a copy.
    """

    _fastseg_host: Host
    _fastseg_class: type[nn.Module] | None = None
    _fastseg_refused: Mapping[str, str] = {}
    _fastseg_kind: Any = None
    _fastseg_plan: Plan | None = None

    def fastseg_plan(self) -> Plan:
        """Return the plan, made anew where modules were exchanged."""
        plan = self._fastseg_plan
        if plan is None or not plan.is_current():
            plan = self._fastseg_host.plan(self, self._fastseg_refused)
            self._fastseg_plan = plan
        return plan

    def fastseg_reason(self, *inputs: Any) -> str | None:
        """Reason why the module as a whole runs the host's own forward now; None where not."""
        module = cast(nn.Module, self)
        leaves: list[Any] = []
        for value in inputs:  # heads take their maps in a list
            leaves.extend(value if isinstance(value, list | tuple) else [value])
        if reason := mode_reason(module, *leaves):
            return reason
        if "forward" in self.__dict__:
            return "it has a forward of its own"
        if "_is_replica" in self.__dict__:
            return "it is a replica of DataParallel, which has no weights of its own"
        if torch.is_grad_enabled():
            for name, parameter in module.named_parameters():
                if parameter.requires_grad:
                    return f"gradients are on and {name} requires them"
        return _settle(self)

    @torch.compiler.assume_constant_result
    def _settled(self) -> str | None:
        return self.fastseg_plan().settle()

    def folds(self) -> list[Fold]:
        return [part.fold for part in self.fastseg_plan().folded_parts()]

    def drop_folds(self) -> None:
        plan = self._fastseg_plan
        if plan is not None and not torch.compiler.is_compiling():
            for part in plan.parts():
                part.drop()

    def graph_problem(self) -> str | None:
        plan = self._fastseg_plan
        if plan is None or not plan.is_current():
            return "modules in it were exchanged"
        before = plan.modes()
        if problem := plan.settle():
            return problem
        for then, now in zip(before, plan.modes(), strict=True):
            if then != now:
                return f"a part of it changed: {now}" if now else "other parts of it can be folded"
        return None

    def train(self, mode: bool = True) -> Any:
        # For eval() too: what comes before it may have edited `parameter.data`.
        self.drop_folds()
        return super().train(mode)  # type: ignore[misc]

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        # Not to keep the memory of another device or dtype.
        if self._fastseg_plan is not None:
            for part in self._fastseg_plan.parts():
                part.drop(graph=True)
        self._fold_set = None
        return super()._apply(*args, **kwargs)  # type: ignore[misc]

    def __getstate__(self) -> dict[str, Any]:
        inherited = getattr(super(), "__getstate__", None)  # object has one from Python 3.11
        state = self.__dict__ if inherited is None else inherited()
        return {name: value for name, value in state.items() if name not in _DERIVED}

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(max(int(protocol), 2))
        rebuild, arguments, *rest = reduced
        if (
            self._fastseg_class is not None
            and rebuild is copyreg.__newobj__  # type: ignore[attr-defined]
            and arguments[0] is type(self)
        ):
            host = _key(self._fastseg_host)
            return (_rebuild, (self._fastseg_class, host, *arguments[1:]), *rest)
        return (rebuild, arguments, *rest)


def _rebuild(host_class: type[nn.Module], host: tuple[str, str], *arguments: Any) -> nn.Module:
    if host not in _hosts:
        known = ", ".join(name for _, name in _hosts)
        raise ValueError(f"an accelerated model of the host {host[1]!r}: expected one of {known}")
    accelerated = accelerated_class(host_class, _hosts[host])
    return accelerated.__new__(accelerated, *arguments)


def _settle(module: Accelerated) -> str | None:
    if not torch.compiler.is_compiling():
        return module.fastseg_plan().settle()
    if is_exporting():
        # Nothing can be folded now, and what it is traced with cannot be told.
        return None if module.fastseg_plan().may_run() else "none of its parts can be folded"
    return module._settled()


def accelerated_class(host_class: Any, host: Host) -> Any:
    """The subclass of `host_class`, made once for a process."""
    key = (host_class, _key(host))
    if key not in _classes:
        _classes[key] = _make_class(host_class, host)
    return _classes[key]


_classes: dict[tuple[type, tuple[str, str]], Any] = {}


def with_plan(method: Callable[..., Any]) -> Callable[..., Any]:
    """`method` of an `Accelerated` class, a forward: by the module's plan where that may run."""

    @functools.wraps(method)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self, Accelerated):  # restored, and another library kept this method
            return method(self, *args, **kwargs)
        if self.fastseg_reason(*args, *kwargs.values()) is not None:
            if torch.is_grad_enabled():
                self.drop_folds()
            return method(self, *args, **kwargs)
        if not self.refresh_in_graph():
            return method(self, *args, **kwargs)
        output = self._fastseg_host.answer(self, self._fastseg_plan, *args, **kwargs)
        return method(self, *args, **kwargs) if output is HOST else output

    return forward


def _make_class(host_class: Any, host: Host) -> Any:
    names = {
        "__module__": host_class.__module__,
        "__qualname__": host_class.__qualname__,
        "__doc__": host_class.__doc__,
        "_fastseg_host": host,
        "_fastseg_class": host_class,
        host.method: with_plan(getattr(host_class, host.method)),
    }
    metaclass = type(host_class)
    return metaclass(host_class.__name__, (Accelerated, host_class), names)


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
        if isinstance(module, Accelerated):
            module.drop_folds()


def repack(model: nn.Module) -> None:
    """Call `refold`: its deprecated name, to be removed with the release after the first."""
    warnings.warn("repack: the name is refold now", DeprecationWarning, stacklevel=2)
    refold(model)

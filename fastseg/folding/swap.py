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
from collections.abc import Callable, Mapping
from typing import Any, Protocol, Self, cast

import torch
from torch import nn

from fastseg.kernels.core.checks import is_exporting

from .conditions import counts_edits, mode_reason, onnx_reason
from .state import Plan, State

HOST = object()  # "let the host's own forward answer"


class Swap(Protocol):
    """What a module's class is replaced by: a subclass with a mixin, its `mixin` or `Accelerated`.

    A `method` that it names is replaced too, by `wrap` of it, or else by `with_plan`.
    """

    @property
    def name(self) -> str:
        """Its name, with that of its type, for reports and pickles."""


class Host(Swap, Protocol):
    """A kind of module."""

    @property
    def method(self) -> str:
        """The method that is replaced."""

    @property
    def own(self) -> bool:
        """Return whether it is of fastseg, whose classes have the fast forward from the start."""

    def plan(self, module: Any, refused: Mapping[str, str], /) -> Plan:
        """Make the plan of `module`; modules with the names in `refused` stay the host's."""

    def answer(self, module: Any, plan: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Return what the method returns, by `plan`; HOST where only the host can answer."""


_hosts: dict[tuple[str, str], Swap] = {}


def register_host(host: Swap) -> None:
    """Make `host` known to pickles of accelerated modules, which name it."""
    if _key(host) in _hosts:
        raise ValueError(f"host: there is one of the name {host.name!r} already")
    _hosts[_key(host)] = host


def _key(host: Swap) -> tuple[str, str]:
    return type(host).__name__, host.name


_DERIVED = ("_fastseg_state", "_fastseg_kind", "_fastseg_runner")  # no copy has these


class Swapped:
    """Mixin of modules whose class is a subclass that was made for them, or one of fastseg's own.

    Attributes:
        _fastseg_class: the class that `restore` gives back; None for one of fastseg's own.
    """

    _fastseg_host: Any
    _fastseg_class: type[nn.Module] | None = None

    def __getstate__(self) -> dict[str, Any]:
        state: Any = super().__getstate__()
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


class Accelerated(Swapped):
    """Mixin of modules with a fast forward; `_fastseg_host` is their `Host`.

    Attributes:
        _fastseg_refused: why layers, by their names, stay the host's, as their check has found.
        _fastseg_kind: what the modules in it were when they were checked; None in a copy.
        _fastseg_training: whether its host's `with_gradients` may run in the place of its own code.
    """

    _fastseg_refused: Mapping[str, str] = {}
    _fastseg_kind: Any = None
    _fastseg_training = False
    _fastseg_state: State | None = None

    def fastseg_state(self) -> State:
        """What the fast forward runs on."""
        if self._fastseg_state is None:
            state = State(
                cast(nn.Module, self),
                lambda: self._fastseg_host.plan(self, self._fastseg_refused),
            )
            self.__dict__.setdefault("_fastseg_state", state)  # one for all threads
        return cast(State, self._fastseg_state)

    def fastseg_reason(self, *inputs: object) -> str | None:
        """Reason why the module as a whole runs its own code now; None where not."""
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
        return self._settle()

    # A graph of torch.compile has the answers of these as constants: they run as it is traced, and
    # are methods, as torch 2.11 takes no module as an argument of such a function.
    @torch.compiler.assume_constant_result
    def _settle(self) -> str | None:
        if self._fastseg_state is None:
            for inner in cast(nn.Module, self).modules():
                if isinstance(inner, Accelerated):  # its state is an attribute that is watched
                    inner.fastseg_state()
        if is_exporting() and (reason := onnx_reason()):
            return reason
        # Whose tensors an export is traced with cannot be told, so its program folds by itself.
        return self.fastseg_state().settle(fold=not is_exporting())

    @torch.compiler.assume_constant_result
    def _settle_training(self) -> bool:
        self.fastseg_state().plan().settle_training()
        return True

    @torch.compiler.assume_constant_result
    def _trace(self) -> bool:
        self.fastseg_state().trace()
        return True

    @torch.compiler.assume_constant_result
    def _drop(self) -> bool:
        """Forget what is folded, where weights may be edited in ways that are not counted.

        torch's fused optimizers, the default of transformers' Trainer, do that, and merges of LoRA
        adapters.
        """
        if self._fastseg_state is not None:
            self._fastseg_state.drop()
        return True

    def _refresh_in_graph(self) -> bool:
        """Return whether a forward may read what is folded; it asks before it does.

        Folding happens while a graph is traced, and is not in it: the graph has one operator that
        keeps fresh what it reads.
        """
        if not torch.compiler.is_compiling() or is_exporting():
            return True
        self._trace()
        traced: Any = cast(State, self._fastseg_state).traced
        if not traced.has_sources():
            return False
        torch.ops.fastseg.refresh_folds(traced.tensors, traced.handle)
        return True

    def train(self, mode: bool = True) -> Self:
        # For eval() too: what comes before it may have edited `parameter.data`.
        self._drop()
        make_edits_count(cast(nn.Module, self))
        trained: Self = super().train(mode)  # type: ignore[misc]
        return trained

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        if self._fastseg_state is not None:  # not to keep the memory of another device or dtype
            self._fastseg_state.drop(free=True)
        make_edits_count(cast(nn.Module, self))
        with torch.inference_mode(False):  # what is cast or moved there would be uncounted
            return super()._apply(*args, **kwargs)  # type: ignore[misc]

    def __prepare_scriptable__(self) -> Any:
        """Refuse `torch.jit.script`, which would compile the source of this class.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(
            f"{type(self).__name__}: torch.jit.script cannot compile what fastseg runs; "
            + (
                "fastseg.export writes ONNX and torch.export files"
                if self._fastseg_class is None
                else "fastseg.restore(model) first, or write a file by fastseg.export"
            )
        )


def make_edits_count(model: nn.Module) -> None:
    """Make ordinary tensors of parameters and buffers from inference mode.

    Edits of those are not counted, and so nothing could be folded from them.
    """
    made: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # with the old one, to keep its id
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None or counts_edits(tensor):
                    continue
                if id(tensor) not in made:
                    with torch.inference_mode(False), torch.no_grad():
                        new = tensor.clone()
                        if isinstance(tensor, nn.Parameter):
                            new = nn.Parameter(new, tensor.requires_grad)
                    made[id(tensor)] = tensor, new
                tensors[name] = made[id(tensor)][1]  # type: ignore[assignment]


def _rebuild(host_class: type[nn.Module], host: tuple[str, str], *arguments: Any) -> nn.Module:
    if host not in _hosts:
        known = ", ".join(name for _, name in _hosts)
        raise ValueError(f"an accelerated model of the host {host[1]!r}: expected one of {known}")
    swapped = swapped_class(host_class, _hosts[host])
    return swapped.__new__(swapped, *arguments)


def with_plan(method: Callable[..., Any]) -> Callable[..., Any]:
    """`method` of an `Accelerated` class, a forward: by the module's plan where that may run."""

    @functools.wraps(method)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self, Accelerated):  # restored, and another library kept this method
            return method(self, *args, **kwargs)
        if self.fastseg_reason(*args, *kwargs.values()) is not None:
            if torch.is_grad_enabled():
                self._drop()
            if self._fastseg_training:
                output = self._fastseg_host.with_gradients(self, *args, **kwargs)
                return method(self, *args, **kwargs) if output is HOST else output
            return method(self, *args, **kwargs)
        if not self._refresh_in_graph():
            return method(self, *args, **kwargs)
        output = self._fastseg_host.answer(self, self.fastseg_state().settled, *args, **kwargs)
        return method(self, *args, **kwargs) if output is HOST else output

    return forward


def _make_class(host_class: Any, host: Swap) -> Any:
    names = {
        "__module__": host_class.__module__,
        "__qualname__": host_class.__qualname__,
        "__doc__": host_class.__doc__,
        "_fastseg_host": host,
        "_fastseg_class": host_class,
    }
    if method := getattr(host, "method", None):
        names[method] = getattr(host, "wrap", with_plan)(getattr(host_class, method))
    bases = getattr(host, "mixin", Accelerated), host_class
    return type(host_class)(host_class.__name__, bases, names)


# (host's class, host) -> the subclass, made once for a process.
swapped_class: Callable[[Any, Any], Any] = functools.cache(_make_class)


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
            module._drop()

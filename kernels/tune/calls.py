"""Calls of ops as a model makes them, with their real arguments: what tools tune and time."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass(frozen=True)
class OpCall:
    """A call of `torch.ops.fastseg.<op>`."""

    op: str
    arguments: dict[str, Any]  # by the names in the op's schema

    def bind(self, function: Callable[..., Any]) -> Callable[[], Any]:
        """`function`, one of the op's forms, on the arguments, passed as the op takes them."""
        schema = getattr(torch.ops.fastseg, self.op).default._schema
        positional = [self.arguments[a.name] for a in schema.arguments if not a.kwarg_only]
        named = {a.name: self.arguments[a.name] for a in schema.arguments if a.kwarg_only}
        return functools.partial(function, *positional, **named)

    def key(self) -> str:
        """Return a key that is equal for calls that do the same work: by shapes and numbers."""
        signature = {name: _signature(value) for name, value in self.arguments.items()}
        return f"{self.op}{signature}"


def _signature(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.stride(), value.dtype
    return [_signature(item) for item in value] if isinstance(value, (list, tuple)) else value


class OpRecorder(TorchDispatchMode):
    """Mode that hands every call of an op inside the block to `note` before it runs.

    Args:
        run: gives what runs instead of the op of a name; None for the op itself.
    """

    def __init__(
        self,
        note: Callable[[OpCall], Any],
        run: Callable[[str], Callable[..., Any]] | None = None,
    ) -> None:
        super().__init__()
        self._note = note
        self._run = run

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace != "fastseg":
            return func(*args, **kwargs)
        arguments = {
            argument.name: args[index]
            if index < len(args)
            else kwargs.get(argument.name, argument.default_value)
            for index, argument in enumerate(func._schema.arguments)
        }
        self._note(OpCall(func._opname, arguments))
        return (func if self._run is None else self._run(func._opname))(*args, **kwargs)

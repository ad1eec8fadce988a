"""The key of a call: equal for calls that one captured graph serves."""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from fastseg.folding.conditions import is_plain_path
from fastseg.kernels.core.checks import autocasts
from fastseg.kernels.core.dispatch import requested_backend

# Values that are equal where they do the same in a forward.
PLAIN_TYPES = (
    type(None),
    *(bool, int, float, complex, str, bytes),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
)
TENSOR_TYPES = (torch.Tensor, nn.Parameter)


class NoGraph(Exception):
    """Reason why a call runs without a graph."""


class Call(NamedTuple):
    """A call's arguments by name, and the tensors in them in the order of the names."""

    key: Hashable
    tensors: list[torch.Tensor]
    arguments: dict[str, Any]  # sorted by name
    positional: list[str]  # the names of those that were given by position

    @property
    def device(self) -> torch.device:
        return self.tensors[0].device

    def replaced(self, tensors: list[torch.Tensor]) -> tuple[list[Any], dict[str, Any]]:
        """Positional and keyword arguments with `tensors` in place of the call's."""
        remaining = iter(tensors)
        by_name = {name: _replace(value, remaining) for name, value in self.arguments.items()}
        return [by_name.pop(name) for name in self.positional], by_name


def read_call(names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """The call of a forward with these arguments.

    Args:
        names: of the forward's positional parameters, so that a graph serves a tensor given either
            way.

    Raises:
        NoGraph: an argument is no tensor, simple value, or list, tuple or dict of them; there is no
            tensor, or tensors are on several devices.
    """
    positional = [
        names[index] if index < len(names) else f"argument {index}" for index in range(len(args))
    ]
    by_name = dict(zip(positional, args, strict=True))
    twice = by_name.keys() & kwargs.keys()
    if twice:
        raise NoGraph(f"{', '.join(sorted(twice))} is given twice")
    by_name.update(kwargs)
    arguments = {name: by_name[name] for name in sorted(by_name)}
    tensors: list[torch.Tensor] = []
    described = tuple((name, _describe(name, arguments[name], tensors)) for name in arguments)
    if not tensors:
        raise NoGraph("there is no tensor among its arguments")
    device = tensors[0].device
    if any(tensor.device != device for tensor in tensors):
        raise NoGraph("its inputs are on several devices")
    return Call((described, _settings(device)), tensors, arguments, positional)


def positional_names(model: nn.Module) -> list[str]:
    """The names of the positional parameters of a model's forward; none where it has no Python."""
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return []
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [parameter.name for parameter in parameters if parameter.kind in kinds]


def static_like(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of an input in memory of its own, that a graph can read."""
    static = torch.empty_like(tensor, memory_format=_memory_format(tensor), requires_grad=False)
    return static.copy_(tensor)


def _describe(name: str, value: Any, tensors: list[torch.Tensor]) -> Hashable:
    """An argument's part of the key; appends the tensors in it to `tensors`."""
    kind = type(value)
    if kind in TENSOR_TYPES:
        if value.layout is not torch.strided:
            raise NoGraph(f"{name} is a {value.layout} tensor")
        tensors.append(value)
        return value.shape, value.dtype, value.device, _memory_format(value)
    if kind in PLAIN_TYPES:
        return kind, value
    if kind in (list, tuple):
        return kind, *(_describe(name, item, tensors) for item in value)
    if kind is dict:
        return kind, *((key, _describe(name, item, tensors)) for key, item in value.items())
    raise NoGraph(f"{name} is a {kind.__name__}")


def _replace(value: Any, tensors: Iterator[torch.Tensor]) -> Any:
    """An argument with the next of `tensors` for each tensor in it, in the order of `_describe`."""
    if type(value) in TENSOR_TYPES:
        return next(tensors)
    if type(value) in (list, tuple):
        return type(value)(_replace(item, tensors) for item in value)
    if type(value) is dict:
        return {key: _replace(item, tensors) for key, item in value.items()}
    return value


def _memory_format(tensor: torch.Tensor) -> torch.memory_format:
    # Other strides are copied to contiguous memory.
    if (
        tensor.ndim == 4
        and not tensor.is_contiguous()
        and tensor.is_contiguous(memory_format=torch.channels_last)
    ):
        return torch.channels_last
    return torch.contiguous_format


def _settings(device: torch.device) -> Hashable:
    """Settings outside of the call that decide which kernels run."""
    backends: Any = torch.backends  # whose precisions are properties that no stub knows
    return (
        autocasts(device) and torch.get_autocast_dtype(device.type),
        requested_backend(),
        is_plain_path(),
        backends.fp32_precision,
        backends.cuda.matmul.fp32_precision,
        backends.cudnn.conv.fp32_precision,
        torch.are_deterministic_algorithms_enabled(),
        torch.get_default_dtype(),
        torch.get_default_device(),
    )

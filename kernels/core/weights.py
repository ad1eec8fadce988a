"""Weights of an op as one object, which is checked when it is made and not at every call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self, get_type_hints

import torch

from .checks import autocasts

# How torch.library spells the types of fields.
_SCHEMA_TYPES: dict[Any, str] = {
    torch.Tensor: "Tensor",
    torch.Tensor | None: "Tensor?",
    tuple[torch.Tensor, ...]: "Tensor[]",
    float: "float",
    int: "int",
    str: "str",
}


@dataclass(frozen=True, eq=False)
class Weights:
    """Base of the weights of an op: a frozen dataclass of tensors and numbers.

    Attributes:
        derived: names of fields that follow from others, and are no work of their own.
    """

    derived: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Raise TypeError or ValueError where fields do not go together."""
        raise NotImplementedError

    @property
    def like(self) -> torch.Tensor:
        """A tensor of their dtype, on their device."""
        raise NotImplementedError

    @property
    def channels(self) -> int:
        """Channels of the op's input."""
        raise NotImplementedError

    def least_input(self) -> tuple[object, ...]:
        """Empty tensors, in the place of an input of one position."""
        return (self.like.new_empty(1, 1, self.channels), 1, 1)

    def check_input(self, name: str, x: torch.Tensor) -> None:
        """Raise where `x` is of another dtype or device; autocast casts as it goes."""
        like = self.like
        if x.device != like.device:
            raise ValueError(f"{name}: expected a tensor on {like.device}, got {x.device}")
        if x.dtype != like.dtype and not autocasts(like.device):
            raise TypeError(f"{name}: expected {like.dtype} as the weights, got {x.dtype}")

    def tensors(self) -> list[torch.Tensor]:
        """All tensors, of tuples too."""
        found: list[torch.Tensor] = []
        for value in self.arguments().values():
            if isinstance(value, torch.Tensor):
                found.append(value)
            elif isinstance(value, tuple):
                found += value
        return found

    def arguments(self) -> dict[str, object]:
        """The fields, by name, as the registered op takes them."""
        return {name: getattr(self, name) for name in self.names()}

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        """The same with `function` of each tensor, unchecked."""

        def mapped(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(function(tensor) for tensor in value)
            return function(value) if isinstance(value, torch.Tensor) else value

        return self.of(**{name: mapped(value) for name, value in self.arguments().items()})

    @classmethod
    def of(cls, **arguments: object) -> Self:
        """Weights of `arguments`, unchecked; defaults of what is not there."""
        made = object.__new__(cls)
        for field in fields(cls):
            value = arguments.get(field.name, field.default)
            made.__dict__[field.name] = tuple(value) if isinstance(value, list) else value
        return made

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Names of the fields."""
        return cls.__match_args__

    @classmethod
    def schema(cls) -> str:
        """The fields in torch.library's language."""
        types = get_type_hints(cls)
        return ", ".join(
            f"{_SCHEMA_TYPES[types[field.name]]} {field.name}{_default(field.default)}"
            for field in fields(cls)
        )


def _default(value: Any) -> str:
    if value is None or isinstance(value, int | float):
        return f"={value}"
    return f'="{value}"' if isinstance(value, str) else ""


def check_weights(weights: Any, kind: type[Weights]) -> None:
    """Raise unless `weights` are of `kind`."""
    if not isinstance(weights, kind):
        raise TypeError(f"weights: expected {kind.__name__}, got {type(weights).__name__}")


def check_tokens(name: str, x: torch.Tensor, height: int, width: int, weights: Weights) -> None:
    """Raise unless `x` is floating (B, height * width, C), of a grid that is not empty."""
    if not isinstance(x, torch.Tensor) or not x.is_floating_point():
        got = getattr(x, "dtype", type(x).__name__)
        raise TypeError(f"{name}: expected a floating-point tensor, got {got}")
    if height < 1 or width < 1:
        raise ValueError(f"height, width: expected positive sizes, got {height} and {width}")
    channels = weights.channels
    if x.ndim != 3 or x.shape[1] != height * width or x.shape[2] != channels:
        raise ValueError(
            f"{name}: expected shape (batch, {height} * {width}, {channels}), got {tuple(x.shape)}"
        )
    weights.check_input(name, x)

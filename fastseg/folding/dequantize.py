"""Quantised linear layers of other libraries that compute with floats, until they are restored.

Such a layer is an ordinary linear one to whatever folds, exports or trains it. Its quantised weight
stays beside, for `restore`, and is what `state_dict` and `load_state_dict` deal with.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from .quantized import float_weight, quantized_as, quantized_problem
from .swap import Swapped, register_host, swapped_class


class Dequantized(Swapped):
    """Mixin of linear layers with a float weight in the place of their quantised one.

    Attributes:
        _fastseg_quantized: the quantised one.
        _fastseg_stored: what it is, in words.
    """

    _fastseg_plain_kind = nn.Linear
    _fastseg_quantized: nn.Parameter
    _fastseg_stored: str

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        layer = cast(nn.Linear, self)
        return F.linear(input, layer.weight, layer.bias)

    def give_back(self) -> None:
        """Take the quantised weight in the place of the float one."""
        cast(nn.Module, self)._parameters["weight"] = self._fastseg_quantized

    def _save_to_state_dict(self, *arguments: Any) -> None:
        with _as_stored(self) as layer:
            layer._save_to_state_dict(*arguments)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        with _as_stored(self) as layer:
            layer._load_from_state_dict(*arguments)
            self.__dict__["_fastseg_quantized"] = layer.weight  # where it is assigned, another one
            loaded = float_weight(layer)
        with torch.no_grad():
            cast(nn.Linear, self).weight.copy_(loaded)


@contextlib.contextmanager
def _as_stored(layer: Any) -> Iterator[Any]:
    """The layer as its library knows it, inside the block."""
    swapped, weight = type(layer), layer.weight
    layer.__class__ = layer._fastseg_class
    layer._parameters["weight"] = layer._fastseg_quantized
    try:
        yield layer
    finally:
        layer.__class__ = swapped
        layer._parameters["weight"] = weight


class _Dequantization:
    """What `fastseg.accelerate(dequantize=True)` gives quantised linear layers."""

    name = "dequantized"
    mixin = Dequantized


_SWAP = _Dequantization()
register_host(_SWAP)


def dequantize_layers(model: nn.Module) -> list[nn.Module]:
    """Give the quantised linear layers in `model` float weights, and return these layers.

    The dtype is that of the model's other floats. A layer with a forward of its own stays.

    Raises:
        ValueError: the library cannot say what the weights of one are. Then all are as they were.
    """
    layers: dict[str, Any] = {
        name: layer
        for name, layer in model.named_modules()
        if quantized_as(layer) is not None and "forward" not in layer.__dict__
    }
    quantized = {id(layer.weight) for layer in layers.values()}
    others = (p.dtype for p in model.parameters() if id(p) not in quantized)
    dtype = next((dtype for dtype in others if dtype.is_floating_point), torch.float32)
    weights = []
    for name, layer in layers.items():
        try:
            weights.append(nn.Parameter(float_weight(layer).to(dtype), requires_grad=False))
        except Exception as error:  # of the library
            raise ValueError(
                f"dequantize: {name or 'model'} has {quantized_as(layer)}, which fail to become "
                f"floats: {type(error).__name__}: {error}"
            ) from error
    for layer, weight in zip(layers.values(), weights, strict=True):
        layer.__dict__.update(_fastseg_quantized=layer.weight, _fastseg_stored=quantized_as(layer))
        layer.__class__ = swapped_class(type(layer), _SWAP)
        layer._parameters["weight"] = weight
    return [*layers.values()]


def first_quantized(module: nn.Module) -> str | None:
    """Reason of the first quantised layer in `module`, with how many more; None where is none."""
    problems = [
        (name, problem)
        for name, layer in module.named_modules()
        if (problem := quantized_problem(layer)) is not None
    ]
    if not problems:
        return None
    name, problem = problems[0]
    if len(problems) == 1:
        return f"{name} has {problem}"
    return f"{name} and {len(problems) - 1} more layers have {problem}"

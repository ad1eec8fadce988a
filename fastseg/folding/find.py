"""The layers of a module by their names, where they are of the form that folding takes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from fastseg.kernels.blocks.activations import ACTIVATIONS

_ACTIVATION_CLASSES = {
    "GELU": "gelu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_pytorch_tanh",
    "Mish": "mish",
    "MishActivation": "mish",
    "NewGELUActivation": "gelu_new",
    "PytorchGELUTanh": "gelu_pytorch_tanh",
    "QuickGELUActivation": "quick_gelu",
    "ReLU": "relu",
    "ReLU6": "relu6",
    "SELU": "selu",
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "Swish": "silu",
}


class Affine(NamedTuple):
    """Weight (out, in) and bias (out,) or None of a linear map that is no `nn.Linear`."""

    weight: torch.Tensor
    bias: torch.Tensor | None


class Declined(Exception):
    """Reason why a part stays the host's."""


def find(module: Any, path: str) -> Any:
    """Return what `path` leads to from `module`; None where it leads to nothing."""
    for name in path.split("."):
        module = getattr(module, name, None)  # a list's modules are attributes "0", "1", ...
        if module is None:
            return None
    return module


def activation_name(function: Any) -> str | None:
    """The name in `ACTIVATIONS` of an activation module, function or name; None for others."""
    if isinstance(function, str):
        return function if function in ACTIVATIONS else None
    if isinstance(function, nn.GELU) and function.approximate == "tanh":
        return "gelu_pytorch_tanh"
    if isinstance(function, nn.Module):
        return _ACTIVATION_CLASSES.get(type(function).__name__)
    names = (name for name, known in ACTIVATIONS.items() if known is function)
    return next(names, None)


def find_leaf(owner: nn.Module, path: str, kind: type[Any]) -> Any:
    """The layer at `path`, a `kind` without modules in it.

    Subclasses pass: what they compute is checked by a trial.

    Raises:
        Declined: it is something else.
    """
    module = find(owner, path)
    if not isinstance(module, kind) or module._modules or not module.weight.is_floating_point():
        actual = "absent" if module is None else f"a {type(module).__name__}"
        raise Declined(f"{path} is {actual}, no plain {kind.__name__}")
    return module


def find_linear(owner: nn.Module, path: str) -> Any:
    """The linear layer at `path`, or the 1x1 convolution there as one."""
    module = find(owner, path)
    if isinstance(module, nn.Conv2d):
        conv = find_pointwise(owner, path)
        return Affine(conv.weight.flatten(1), conv.bias)
    return find_leaf(owner, path, nn.Linear)


def find_pointwise(owner: nn.Module, path: str) -> nn.Conv2d:
    """The 1x1 convolution at `path`, a linear map of each pixel."""
    return find_conv2d(owner, path, kernel=1, stride=1, padding=0)


def find_conv2d(
    owner: nn.Module,
    path: str,
    *,
    kernel: int | None = None,
    stride: int | None = None,
    padding: int | None = None,
    depthwise: bool = False,
) -> nn.Conv2d:
    """The convolution at `path`: square, padded with zeros, in one group or one a channel.

    Args:
        kernel, stride, padding: of both sides, where it has to be a certain one.

    Raises:
        Declined: it is something else.
    """
    conv = find_leaf(owner, path, nn.Conv2d)
    sides = ((conv.weight.shape[2:], kernel), (conv.stride, stride), (conv.padding, padding))
    if (
        all(_is_square(side, expected) for side, expected in sides)
        and _is_square(conv.dilation, 1)
        and conv.padding_mode == "zeros"
        and conv.groups == (len(conv.weight) if depthwise else 1)
        and (not depthwise or conv.weight.shape[1] == 1)
    ):
        return conv
    raise Declined(f"{path} is a convolution of another form: {conv}")


def _is_square(sides: Any, expected: int | None) -> bool:
    return (
        isinstance(sides, tuple)
        and len({*sides}) == 1
        and (expected is None or sides[0] == expected)
    )


def find_layer_norm(owner: nn.Module, path: str) -> nn.LayerNorm:
    """The LayerNorm over channels at `path`, with weight and bias."""
    norm = find_leaf(owner, path, nn.LayerNorm)
    if len(norm.normalized_shape) != 1 or norm.bias is None:
        raise Declined(f"{path} has no weight and bias for each channel")
    return norm

"""Parts of a host that run as one op each: what they are folded from, and why some cannot be.

A part reads its host's modules by name at every fold, so what is replaced is found.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from fastseg.kernels.blocks.activations import ACTIVATIONS
from fastseg.kernels.core.tracing import is_exporting

from .cache import Fold, Folded, all_parts
from .conditions import has_forward_hooks, is_of_fastseg, tensor_problem

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


# What may be inside a part of fastseg's own models beside its own classes.
_OWN_KINDS = {
    nn.BatchNorm2d,
    nn.Conv2d,
    nn.Dropout,
    nn.LayerNorm,
    nn.Linear,
    nn.ModuleList,
    nn.ReLU,
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


def part_problem(part: nn.Module, any_mode: bool = False) -> str | None:
    """Reason why folding would leave out something that `part` itself does.

    Args:
        any_mode: leave aside that it may be in training mode.
    """
    if part.training and not any_mode:
        return "is in training mode"
    if "forward" in part.__dict__:
        return "has a forward of its own"
    return "has forward hooks" if has_forward_hooks(part) else None


def foreign_module(owner: nn.Module, parts: list[nn.Module]) -> str | None:
    """Name the first of `parts` that is of no class of fastseg's own models, or None."""
    for part in parts:
        kind = type(part)
        if kind not in _OWN_KINDS and not is_of_fastseg(kind):
            return f"{name_in(owner, part)} is a {kind.__name__}".strip()
    return None


def name_in(owner: nn.Module, part: nn.Module) -> str:
    """The name of `part` in `owner`; "" where it has none."""
    return next((name for name, inner in owner.named_modules() if inner is part), "")


def problem(owner: nn.Module, roots: list[nn.Module], any_mode: bool = False) -> str | None:
    """The first reason why something in `roots` would be left out, with its name in `owner`."""
    for part in all_parts(*roots):
        reason = part_problem(part, any_mode)
        if reason is not None:
            return f"{name_in(owner, part)} {reason}".strip()
    return None


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


def _traits(part: nn.Module) -> tuple[Any, ...]:
    """Attributes that a module computes by, beside its tensors and its `eps`."""
    own = part.__dict__
    return type(part), own.get("scale"), own.get("scaling"), own.get("num_heads")


class Part:
    """One op of a host: either folded, or left to the host for a reason.

    Args:
        owner: the host's module that names are relative to.
        roots: the modules whose work the op does.
        fold: keyword arguments of the op; raises Declined where it cannot be.
        own: they are fastseg's own, and known by their classes; others are tried out first.
    """

    def __init__(
        self, owner: nn.Module, roots: list[nn.Module], fold: Callable[[], Folded], own: bool
    ) -> None:
        self.owner = owner
        self.own = own
        self.roots = roots
        self.fold = Fold(roots, lambda: self._checked(fold))
        self._traits = [_traits(part) for part in all_parts(*roots)]
        self.reason: str | None = None  # why it stays the host's
        self._folded: Folded | None = None

    def _checked(self, fold: Callable[[], Folded]) -> Folded:
        if reason := self._unknown():
            raise Declined(reason)
        if reason := self._tensor_reason():
            raise Declined(reason)
        kinds = {
            f"{tensor.dtype} on {tensor.device}"
            for tensor in self.fold.tensors()
            if tensor.is_floating_point()
        }
        if len(kinds) > 1:
            raise Declined(f"its weights are of different kinds: {', '.join(sorted(kinds))}")
        return fold()

    def _tensor_reason(self) -> str | None:
        for part in all_parts(*self.roots):
            if reason := tensor_problem(part):
                return f"{name_in(self.owner, part)} {reason}".strip()
        return None

    def settle(self, any_mode: bool = False) -> None:
        """Fold it, or find the reason why not."""
        reason = problem(self.owner, self.roots, any_mode) or self._tensor_reason()
        if reason is None:
            try:
                self._folded = self.fold.get_now()
            except Declined as declined:
                reason = str(declined)
        # Set once, at the end: other threads may be reading it.
        self.reason = reason
        if reason is not None:
            # A LoRA adapter may go the way it came, and leave its trace in `parameter.data`.
            self.drop()

    def is_folded(self) -> bool:
        """Return whether it runs folded: as settled; in an export, which settles nothing, now."""
        if self.reason is not None or not is_exporting():
            return self.reason is None
        return problem(self.owner, self.roots) is None and self._unknown() is None

    def _unknown(self) -> str | None:
        """Reason why it may compute something else than its names say."""
        if self.own:
            return foreign_module(self.owner, all_parts(*self.roots))
        if [_traits(part) for part in all_parts(*self.roots)] == self._traits:
            return None
        return "changed since it was tried out; call accelerate again"

    def folded(self) -> Folded:
        """Keyword arguments of the op, as settled, or as a graph is to read them."""
        if torch.compiler.is_compiling() or self._folded is None:
            return self.fold.get()
        return self._folded

    def drop(self, graph: bool = False) -> None:
        """Forget the folded tensors; with `graph` also the memory that compiled graphs read."""
        self._folded = None
        self.fold.drop(graph)

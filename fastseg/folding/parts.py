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
from .conditions import has_forward_hooks, tensor_problem

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
    """The name in `ACTIVATIONS` of an activation module or function; None for an unknown one."""
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


def problem(owner: nn.Module, roots: list[nn.Module], any_mode: bool = False) -> str | None:
    """The first reason why something in `roots` would be left out, with its name in `owner`."""
    for part in all_parts(*roots):
        reason = part_problem(part, any_mode)
        if reason is not None:
            name = next((name for name, inner in owner.named_modules() if inner is part), "")
            return f"{name} {reason}".strip()
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
        conv = find_conv2d(owner, path, kernel=1)
        return Affine(conv.weight.flatten(1), conv.bias)
    return find_leaf(owner, path, nn.Linear)


def find_conv2d(owner: nn.Module, path: str, kernel: int | None = None) -> nn.Conv2d:
    """The convolution at `path`, square and with zero padding.

    Raises:
        Declined: it is something else.
    """
    conv = find_leaf(owner, path, nn.Conv2d)
    sides = (*conv.kernel_size, *conv.stride)
    simple = (
        len({*conv.kernel_size}) == len({*conv.stride}) == 1
        and set(conv.dilation) == {1}
        and conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
        and len({*conv.padding}) == 1
    )
    if not simple or (kernel is not None and sides[0] != kernel):
        raise Declined(f"{path} is a convolution of another form: {conv}")
    return conv


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
    """

    def __init__(
        self, owner: nn.Module, roots: list[nn.Module], fold: Callable[[], Folded]
    ) -> None:
        self.owner = owner
        self.roots = roots
        self.fold = Fold(roots, lambda: self._checked(fold))
        self._traits = [_traits(part) for part in all_parts(*roots)]
        self.reason: str | None = None  # why it stays the host's
        self._folded: Folded | None = None

    def _checked(self, fold: Callable[[], Folded]) -> Folded:
        if not self._is_as_tried_out():
            raise Declined("changed since it was tried out; call accelerate again")
        for part in all_parts(*self.roots):
            if reason := tensor_problem(part):
                raise Declined(f"{type(part).__name__} {reason}")
        kinds = {
            f"{tensor.dtype} on {tensor.device}"
            for tensor in self.fold.tensors()
            if tensor.is_floating_point()
        }
        if len(kinds) > 1:
            raise Declined(f"its weights are of different kinds: {', '.join(sorted(kinds))}")
        return fold()

    def settle(self, any_mode: bool = False) -> None:
        """Fold it, or find the reason why not."""
        reason = problem(self.owner, self.roots, any_mode)
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
        return problem(self.owner, self.roots) is None and self._is_as_tried_out()

    def _is_as_tried_out(self) -> bool:
        return [_traits(part) for part in all_parts(*self.roots)] == self._traits

    def folded(self) -> Folded:
        """Keyword arguments of the op, as settled, or as a graph is to read them."""
        if torch.compiler.is_compiling() or self._folded is None:
            return self.fold.get()
        return self._folded

    def drop(self, graph: bool = False) -> None:
        """Forget the folded tensors; with `graph` also the memory that compiled graphs read."""
        self._folded = None
        self.fold.drop(graph)

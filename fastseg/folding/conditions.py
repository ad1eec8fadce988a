"""Conditions under which a forward may run on folded weights."""

from __future__ import annotations

import contextlib
import sys
import threading
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import nn
from torch.fx import Proxy
from torch.nn.modules import module as _module

from fastseg.kernels.core.checks import is_exporting

from .quantized import quantized_problem

# Modules of torch that are what they are called.
_PLAIN_KINDS = {
    nn.BatchNorm2d,
    nn.Conv2d,
    nn.Dropout,
    nn.LayerNorm,
    nn.Linear,
    nn.ModuleList,
    nn.ReLU,
}

# Attributes that tell kinds of modules apart, and those that do not change what one computes in
# eval mode.
_KIND_TYPES = (bool, int, float, str, tuple, list, FunctionType)
_NOT_OF_A_KIND = ("training", "p", "drop_prob", "layer_idx", "gradient_checkpointing")

# transformers collects hidden states and attentions by hooks that it leaves on for good; they do
# nothing unless it is asked for attentions, and then its own forward runs.
_IDLE_HOOKS = "transformers.utils.output_capturing"

_HOOKS = ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")

_plain_paths = 0  # blocks of plain_path() that are open, in all threads
_lock = threading.Lock()


@contextlib.contextmanager
def plain_path() -> Iterator[None]:
    """Run models on the plain path inside the block, as in training: for comparisons.

    It holds for all threads of the process.
    """
    global _plain_paths
    with _lock:
        _plain_paths += 1
    try:
        yield
    finally:
        with _lock:
            _plain_paths -= 1


def is_plain_path() -> bool:
    """Return whether a block of `plain_path` is open."""
    return _plain_paths > 0


def mode_reason(module: nn.Module, *inputs: Any) -> str | None:
    """Reason for the plain path that lies in the mode of the whole: training, tracing; or None."""
    if _plain_paths:
        return "asked for by fastseg.plain_path"
    if module.training:
        return "it is in training mode"
    if _module._global_forward_hooks or _module._global_forward_pre_hooks:
        return "global forward hooks want to see every module"
    if reason := tracing_reason(*inputs):
        return reason
    if torch.is_grad_enabled() and any(
        isinstance(value, torch.Tensor) and value.requires_grad for value in inputs
    ):
        return "the input requires gradients"
    return None


def gradient_reason(*inputs: Any) -> str | None:
    """Reason for a model's own operators with gradients that lies in the mode of the whole."""
    if _plain_paths:
        return "asked for by fastseg.plain_path"
    if reason := tracing_reason(*inputs):
        return reason
    if is_exporting():
        return "it is exported"
    if any(getattr(_module, f"_global_{kind}") for kind in _HOOKS):
        return "global hooks want to see every module"
    return None


def tracing_reason(*inputs: Any) -> str | None:
    """Reason for a model's own operators that lies in who traces or transforms them; or None."""
    if torch.jit.is_tracing():
        return onnx_reason() or "it is traced by torch.jit"
    if any(isinstance(value, Proxy) for value in inputs):
        return "it is traced by torch.fx"
    if torch._C._functorch.maybe_current_level() is not None:
        return "it is inside a transform of torch.func"
    return None


def onnx_reason() -> str | None:
    """Reason for the plain path, with a warning, inside `torch.onnx.export`; None outside of it.

    Folding would be in the file: 1,019 nodes in the place of 325.
    """
    onnx = sys.modules.get("torch.onnx")  # torch imports it where it is used
    if onnx is None or not onnx.is_in_onnx_export():
        return None
    warnings.warn(
        "torch.onnx.export writes the model's own operators; fastseg.export writes the folded "
        "ones, which are fewer and faster",
        stacklevel=2,
    )
    return "it is exported by torch.onnx"


def all_parts(*roots: nn.Module) -> list[nn.Module]:
    """The modules and all modules in them, in half the time that `modules()` takes."""
    parts = list(roots)
    for part in parts:
        parts.extend(child for child in part._modules.values() if child is not None)
    return parts


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


def is_plain(parts: list[nn.Module]) -> bool:
    """Return whether all of `parts` are modules of torch that are what they are called."""
    return all(_plain_kind(part) in _PLAIN_KINDS for part in parts)


def kind_problem(part: nn.Module) -> str | None:
    """Reason why `part` is none of what fastseg's own models are made of, or None."""
    kind = _plain_kind(part)
    return None if kind in _PLAIN_KINDS or is_of_fastseg(kind) else f"is a {kind.__name__}"


def _plain_kind(part: nn.Module) -> type:
    """The class of `part`; of a dequantised layer the one that it computes as."""
    return getattr(type(part), "_fastseg_plain_kind", type(part))


def first_problem(
    owner: nn.Module, parts: Iterable[nn.Module], of: Callable[[nn.Module], str | None]
) -> str | None:
    """The first of the problems that `of` tells of `parts`, after the part's name in `owner`."""
    for part in parts:
        reason = of(part)
        if reason is not None:
            name = next((name for name, inner in owner.named_modules() if inner is part), "")
            return f"{name} {reason}".strip()
    return None


def is_of_fastseg(kind: type) -> bool:
    """Return whether a class is one of this library, and not a host's."""
    return kind.__module__.partition(".")[0] == "fastseg"


def has_forward_hooks(part: nn.Module) -> bool:
    """Return whether hooks on `part` itself want to see its forward."""
    if not part._forward_hooks and not part._forward_pre_hooks:
        return False
    hooks = (*part._forward_hooks.values(), *part._forward_pre_hooks.values())
    return any(getattr(hook, "__module__", "") != _IDLE_HOOKS for hook in hooks)


def counts_edits(tensor: torch.Tensor) -> bool:
    """Return whether `tensor` has a version counter, as all but those of inference mode have.

    One of these that was cast outside of it has none either, and says that it is ordinary.
    """
    try:
        return tensor._version >= 0
    except RuntimeError:
        return False


def tensor_problem(part: nn.Module) -> str | None:
    """Reason why the parameters and buffers of `part` itself cannot be folded."""
    for tensor in (*part._parameters.values(), *part._buffers.values()):
        if tensor is None:
            continue
        if type(tensor) not in (nn.Parameter, torch.Tensor):
            return f"has {quantized_problem(part) or f'a {type(tensor).__name__}'}"
        if not counts_edits(tensor):
            return "was made in inference mode, where edits are not counted; eval() mends that"
    return None


def kind_of(
    module: nn.Module,
    *,
    root_class: bool = True,
    inside: bool = True,
    without: Sequence[str] = (),
) -> Hashable:
    """A key that is equal for modules that differ in weights or rates of dropout alone.

    Args:
        root_class: whether the class of `module` itself counts.
        inside: whether the modules in it count.
        without: names of attributes that do not.
    """
    left_out = {*_NOT_OF_A_KIND, *without}
    return tuple(
        (
            name,
            type(part) if name or root_class else None,
            tuple((n, tuple(p.shape)) for n, p in part._parameters.items() if p is not None),
            tuple(
                (key, repr(value))
                for key, value in sorted(part.__dict__.items(), key=lambda item: item[0])
                if isinstance(value, _KIND_TYPES) and key[0] != "_" and key not in left_out
            ),
            tuple(sorted(part.__dict__.keys() & {"forward"})),
        )
        for name, part in (module.named_modules() if inside else [("", module)])
    )

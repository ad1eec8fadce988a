"""Conditions under which a forward may run on folded weights."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.fx import Proxy
from torch.nn.modules import module as _module

from fastseg.kernels.core.tracing import is_exporting

from .cache import all_parts

# What may be inside a folded module beside fastseg's own classes.
_FOLDED_KINDS = {
    nn.BatchNorm2d,
    nn.Conv2d,
    nn.Dropout,
    nn.LayerNorm,
    nn.Linear,
    nn.ModuleList,
    nn.ReLU,
}

# transformers collects hidden states and attentions by hooks that it leaves on for good; they do
# nothing unless it is asked for attentions, and then its own forward runs.
_IDLE_HOOKS = "transformers.utils.output_capturing"

ASKED_FOR = "asked for by fastseg.plain_path"

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


def plain_reason(module: Any, *inputs: torch.Tensor) -> str | None:
    """Reason why a `FoldedForward` has to take the plain path; None where it may run folded.

    Folding needs eval mode, no gradient that could be asked for, and parts that are what they were
    built as: a hook, a replaced layer (LoRA, quantised, parametrised) or a `forward` of one's own
    would be left out.
    """
    reason = mode_reason(module, *inputs) or module.graph_problem()
    if reason is None and torch.is_grad_enabled():
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                return f"gradients are on and {name} requires them"
    return reason


def mode_reason(module: nn.Module, *inputs: Any) -> str | None:
    """Reason for the plain path that lies in the mode of the whole: training, tracing; or None."""
    if _plain_paths:
        return ASKED_FOR
    if module.training:
        return "it is in training mode"
    if _module._global_forward_hooks or _module._global_forward_pre_hooks:
        return "global forward hooks want to see every module"
    if torch.jit.is_tracing():
        return "it is traced by torch.jit"
    if any(isinstance(value, Proxy) for value in inputs):
        return "it is traced by torch.fx"
    if torch._C._functorch.maybe_current_level() is not None:
        return "it is inside a transform of torch.func"
    if torch.is_grad_enabled():
        if any(isinstance(value, torch.Tensor) and value.requires_grad for value in inputs):
            return "the input requires gradients"
        # The weights of a replica in DataParallel are no parameters, and want gradients all the
        # same.
        if getattr(module, "_is_replica", False):
            return "gradients are on in a replica of DataParallel"
    return None


def structure_reason(module: nn.Module) -> str | None:
    """Name the part of `module` that folding would leave out, and why; None where there is none."""
    for part in all_parts(module):
        reason = _part_reason(part, is_whole=part is module)
        if reason is not None:
            name = next(name for name, inner in module.named_modules() if inner is part)
            return f"{name or 'it'} {reason}"
    return None


def _part_reason(part: nn.Module, is_whole: bool) -> str | None:
    if part.training:
        return "is in training mode"
    if problem := tensor_problem(part):
        return problem
    if is_whole:
        return None  # its own forward is running
    if has_forward_hooks(part):
        return "has forward hooks"
    if "forward" in part.__dict__:
        return "has a forward of its own"
    kind = type(part)
    if kind not in _FOLDED_KINDS and not is_of_fastseg(kind):
        return f"is a {kind.__name__}"
    if kind is nn.BatchNorm2d and part.running_var is None:
        return "has no running statistics"
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


def tensor_problem(part: nn.Module) -> str | None:
    """Reason why the parameters and buffers of `part` itself cannot be folded."""
    for tensor in (*part._parameters.values(), *part._buffers.values()):
        if tensor is None:
            continue
        # An export puts its own in their place.
        if type(tensor) not in (nn.Parameter, torch.Tensor) and not is_exporting():
            return f"has a {type(tensor).__name__}"
        if tensor.is_inference():
            return "was made in inference mode, where edits are not counted"
    return None

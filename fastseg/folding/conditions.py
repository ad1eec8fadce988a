"""When a forward may run on folded ("packed") weights, and the modules that have them.

A `PackedModule` keeps its folded tensors beside its parameters, outside `state_dict`, `buffers()`
and pickles. They are made on the first eval forward without gradients; `fastseg.folding.cache` says
how they are kept fresh. What nothing notices, an edit in place through `parameter.data` between two
such forwards, needs `model.repack()`.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import nn
from torch.fx import Proxy
from torch.nn.modules import module as _module

from .cache import Fold, FoldOwner, Packed, all_parts

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
    """Whether a block of `plain_path` is open."""
    return _plain_paths > 0


def plain_reason(module: nn.Module, *inputs: torch.Tensor) -> str | None:
    """Why `module` has to take the plain path for `inputs`; None where it may run folded.

    Folding needs eval mode, no gradient that could be asked for, and parts that are what they were
    built as: a hook, a replaced layer (LoRA, quantised, parametrised) or a `forward` of one's own
    would be left out.
    """
    reason = mode_reason(module, *inputs) or structure_reason(module)
    if reason is None and torch.is_grad_enabled():
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                return f"gradients are on and {name} requires them"
    return reason


def mode_reason(module: nn.Module, *inputs: Any) -> str | None:
    """What of `plain_reason` the parts of `module` have no share in."""
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


@torch.compiler.assume_constant_result
def structure_reason(module: nn.Module) -> str | None:
    """Which part of `module` folding would leave out, and why.

    A graph of torch.compile has the answer as a constant, and asks anew when it runs: see
    `FoldOwner.graph_problem`.
    """
    for part in all_parts(module):
        reason = _part_reason(part, is_whole=part is module)
        if reason is not None:
            name = next(name for name, found in module.named_modules() if found is part)
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
    if kind not in _FOLDED_KINDS and not kind.__module__.startswith("fastseg."):
        return f"is a {kind.__name__}"
    if kind is nn.BatchNorm2d and part.running_var is None:
        return "has no running statistics"
    return None


def has_forward_hooks(part: nn.Module) -> bool:
    """Whether hooks on `part` itself want to see its forward."""
    if not part._forward_hooks and not part._forward_pre_hooks:
        return False
    hooks = (*part._forward_hooks.values(), *part._forward_pre_hooks.values())
    return any(getattr(hook, "__module__", "") != _IDLE_HOOKS for hook in hooks)


def tensor_problem(part: nn.Module) -> str | None:
    """Why the parameters and buffers of `part` itself cannot be folded."""
    for tensor in (*part._parameters.values(), *part._buffers.values()):
        if tensor is None:
            continue
        # An export puts its own in their place.
        if type(tensor) not in (nn.Parameter, torch.Tensor) and not torch.compiler.is_exporting():
            return f"has a {type(tensor).__name__}"
        if tensor.is_inference():
            return "was made in inference mode, where edits are not counted"
    return None


class PackedModule(nn.Module):
    """A module with a second forward, on tensors folded from its parameters."""

    _fold_cache: Fold | None = None

    def fold(self) -> Packed:
        """The folded tensors, in the parameters' dtype and on their device."""
        raise NotImplementedError

    def fold_cache(self) -> Fold:
        if self._fold_cache is None:
            self._fold_cache = Fold((self,), lambda: self.fold())
        return self._fold_cache

    def packed(self) -> Packed:
        """The folded tensors, made anew where a parameter has changed."""
        # A replica of DataParallel shares the cache of its original, on another device.
        return self.fold() if "_is_replica" in self.__dict__ else self.fold_cache().get()

    def train(self, mode: bool = True) -> PackedModule:
        self._drop()  # on eval() too: what comes before may have edited `parameter.data`
        super().train(mode)
        return self

    def _drop(self, graph: bool = False) -> None:
        if self._fold_cache is not None:
            self._fold_cache.drop(graph)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> PackedModule:
        self._drop(graph=True)
        super()._apply(fn, recurse)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._drop()
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which fold for themselves."""
        return without_folds(self.__dict__)


class PackedOwner(FoldOwner):
    """Mixin of a module whose forward runs `PackedModule`s in it on folded tensors."""

    def folds(self) -> list[Fold]:
        return [part.fold_cache() for part in _packed_modules(self)]

    def graph_problem(self) -> str | None:
        return structure_reason(cast(nn.Module, self))

    def __getstate__(self) -> dict[str, Any]:
        return without_folds(self.__dict__)


def without_folds(state: dict[str, Any]) -> dict[str, Any]:
    """`state` of a module without what is derived."""
    return {n: v for n, v in state.items() if n not in ("_fold_cache", "_fold_set")}


def _packed_modules(model: Any) -> list[PackedModule]:
    return [module for module in model.modules() if isinstance(module, PackedModule)]


def drop_packed(model: nn.Module) -> None:
    """Forget the folded tensors of `model` and of all modules in it."""
    for module in _packed_modules(model):
        module._drop(graph=True)

"""The life of folded ("packed") weights: they are derived, and never stale.

A `PackedModule` keeps its folded tensors beside its parameters, outside `state_dict`, `buffers()`
and pickles. They are made on the first eval forward without gradients and dropped by `train()`,
`to()`, `half()`, `load_state_dict()` and copying. Before each use the parameters are compared with
those at the time of folding, by identity, version counter and address, so an edit in place (an
optimizer step, `copy_` under no_grad) or a replaced parameter is noticed too. What PyTorch does not
count, edits in place through `parameter.data`, needs `model.repack()`.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

Packed = dict[str, Any]

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


def plain_reason(module: nn.Module, *inputs: torch.Tensor) -> str | None:
    """Why `module` has to take the plain path for `inputs`; None where it may run folded.

    Folding needs eval mode, no gradient that could be asked for, and parts that are what they were
    built as: a hook, a replaced layer (LoRA, quantised, parametrised) or a `forward` of one's own
    would be left out.
    """
    if _plain_paths:
        return "asked for by fastseg.plain_path"
    for part in _parts(module):
        reason = _part_reason(part, is_whole=part is module)
        if reason is not None:
            name = next(name for name, found in module.named_modules() if found is part)
            return f"{name or 'it'} {reason}"
    if torch.is_grad_enabled():
        if any(tensor.requires_grad for tensor in inputs):
            return "the input requires gradients"
        # The weights of a replica in DataParallel are no parameters, and want gradients all the
        # same.
        if getattr(module, "_is_replica", False):
            return "gradients are on in a replica of DataParallel"
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                return f"gradients are on and {name} requires them"
    return None


def _part_reason(part: nn.Module, is_whole: bool) -> str | None:
    if part.training:
        return "is in training mode"
    if not torch.compiler.is_compiling() and any(
        p is not None and p.is_inference() for p in part._parameters.values()
    ):
        return "was made in inference mode, where edits are not counted"
    if is_whole:
        return None  # its own forward is running
    if part._forward_hooks or part._forward_pre_hooks:
        return "has forward hooks"
    if "forward" in part.__dict__:
        return "has a forward of its own"
    kind = type(part)
    if kind not in _FOLDED_KINDS and not kind.__module__.startswith("fastseg."):
        return f"is a {kind.__name__}"
    if kind is nn.BatchNorm2d and part.running_var is None:
        return "has no running statistics"
    return None


def _parts(module: nn.Module) -> list[nn.Module]:
    """`module` and all modules in it, in half the time that `modules()` takes."""
    parts = [module]
    for part in parts:
        parts.extend(child for child in part._modules.values() if child is not None)
    return parts


class _Source(NamedTuple):
    """A parameter or buffer as it was when it was folded."""

    tensor: torch.Tensor
    alias: torch.Tensor  # holds the memory, so that nothing else can take its address
    version: int
    address: int


def _same(source: _Source, tensor: torch.Tensor) -> bool:
    return (
        tensor is source.tensor
        and tensor._version == source.version
        and tensor.data_ptr() == source.address
    )


def _finished(device: torch.device) -> bool:
    """Wait until what this stream has folded is there for all streams.

    False while a CUDA graph is captured: then nothing is folded before the graph is replayed.
    """
    if device.type != "cuda":
        return True
    if torch.cuda.is_current_stream_capturing():
        return False
    torch.cuda.current_stream(device).synchronize()
    return True


class PackedModule(nn.Module):
    """A module with a second forward, on tensors folded from its parameters."""

    _packed: Packed | None = None
    _packed_from: tuple[list[_Source], list[float | None]] = ([], [])

    def fold(self) -> Packed:
        """The folded tensors, in the parameters' dtype and on their device."""
        raise NotImplementedError

    def packed(self) -> Packed:
        """The folded tensors, made anew where a parameter has changed."""
        if torch.compiler.is_compiling():
            # Versions and addresses are not to be traced. Weights that may still be trained are
            # folded inside the graph, so that it sees their edits; frozen ones are taken as they
            # are folded now.
            frozen = not any(parameter.requires_grad for parameter in self.parameters())
            return self._packed if frozen and self._packed is not None else self.fold()
        tensors: list[torch.Tensor] = []
        eps: list[float | None] = []
        for part in _parts(self):
            tensors.extend(t for t in part._parameters.values() if t is not None)
            tensors.extend(t for t in part._buffers.values() if t is not None)
            eps.append(part.__dict__.get("eps"))
        sources, folded_eps = self._packed_from
        if (
            self._packed is None
            or len(tensors) != len(sources)
            or eps != folded_eps
            or not all(map(_same, sources, tensors))
        ):
            with torch.no_grad():
                packed = self.fold()
            # A replica of DataParallel has no parameters, and folds for its own stream.
            if tensors and not _finished(tensors[0].device):
                return packed
            self._packed = packed
            self._packed_from = (
                [_Source(t, t.detach(), t._version, t.data_ptr()) for t in tensors],
                eps,
            )
        return self._packed

    def drop_packed(self) -> None:
        """Forget the folded tensors."""
        self._packed, self._packed_from = None, ([], [])

    def train(self, mode: bool = True) -> PackedModule:
        if mode:
            self.drop_packed()
        super().train(mode)
        return self

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> PackedModule:
        self.drop_packed()
        super()._apply(fn, recurse)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.drop_packed()
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which fold for themselves."""
        state = self.__dict__.copy()
        state.pop("_packed", None)
        state.pop("_packed_from", None)
        return state


def drop_packed(model: nn.Module) -> None:
    """Forget the folded tensors of `model` and of all modules in it."""
    for module in model.modules():
        if isinstance(module, PackedModule):
            module.drop_packed()

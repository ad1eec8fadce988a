"""Folded ("packed") weights: how they are made, and how they never go stale.

`fold_*` are exact algebra, computed in float64 and cast last. A `PackedModule` keeps its folded
tensors beside its parameters, outside `state_dict`, `buffers()` and pickles. They are made on the
first eval forward without gradients and dropped by `train()`, `to()`, `half()`, `load_state_dict()`
and copying. Before each use the addresses and version counters of the parameters are compared with
those at the time of folding, so an edit in place (an optimizer step, `copy_` under no_grad) is
noticed too. What PyTorch does not count, edits through `parameter.data`, needs
`model.repack()`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

Packed = dict[str, Any]

# What may be inside a folded module beside fastseg's own classes.
_FOLDED_KINDS = {
    nn.BatchNorm2d,
    nn.Conv2d,
    nn.Dropout,
    nn.Identity,
    nn.LayerNorm,
    nn.Linear,
    nn.ModuleList,
    nn.ReLU,
}

_plain_path = False


@contextlib.contextmanager
def plain_path() -> Iterator[None]:
    """Run models on the plain path inside the block, as in training: for comparisons."""
    global _plain_path
    before, _plain_path = _plain_path, True
    try:
        yield
    finally:
        _plain_path = before


def plain_reason(module: nn.Module, *inputs: torch.Tensor) -> str | None:
    """Why `module` has to take the plain path for `inputs`; None where it may run folded.

    Folding needs eval mode, no gradient that could be asked for, and parts that are what they were
    built as: a hook, a replaced layer (LoRA, quantised, parametrised) or a `forward` of one's own
    would be left out.
    """
    if _plain_path:
        return "asked for by fastseg.plain_path"
    for name, part in module.named_modules():
        if part.training:
            return f"{name or 'it'} is in training mode"
        if part is module:
            continue  # its own forward is running
        if part._forward_hooks or part._forward_pre_hooks:
            return f"{name} has forward hooks"
        if "forward" in part.__dict__:
            return f"{name} has a forward of its own"
        kind = type(part)
        if kind not in _FOLDED_KINDS and not kind.__module__.startswith("fastseg."):
            return f"{name} is a {kind.__name__}"
    if torch.is_grad_enabled():
        if any(tensor.requires_grad for tensor in inputs):
            return "the input requires gradients"
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                return f"gradients are on and {name} requires them"
    return None


def _sources(module: nn.Module) -> Iterator[torch.Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _signature(sources: Iterable[torch.Tensor]) -> tuple[tuple[int, int], ...]:
    # Inference tensors have no version counter.
    return tuple(
        (source.data_ptr(), 0 if source.is_inference() else source._version) for source in sources
    )


class PackedModule(nn.Module):
    """A module with a second forward, on tensors folded from its parameters."""

    _packed: Packed | None = None
    _packed_from: tuple[tuple[int, int], ...] = ()

    def fold(self) -> Packed:
        """The folded tensors, in the parameters' dtype and on their device."""
        raise NotImplementedError

    def packed(self) -> Packed:
        """The folded tensors, made anew where a parameter has changed."""
        if torch.compiler.is_compiling():
            # Addresses and versions are not to be traced. A graph traced before the first eager
            # forward holds the folding itself: right, and slower.
            return self.fold() if self._packed is None else self._packed
        signature = _signature(_sources(self))
        if self._packed is None or signature != self._packed_from:
            with torch.no_grad():
                self._packed = self.fold()
            self._packed_from = signature
        return self._packed

    def drop_packed(self) -> None:
        """Forget the folded tensors."""
        self._packed, self._packed_from = None, ()

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


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` in float64, on the CPU where its device has no float64."""
    device = torch.device("cpu") if tensor.device.type == "mps" else tensor.device
    return tensor.detach().to(device=device, dtype=torch.float64)


def wide_affine(
    layer: nn.Linear | nn.Conv2d | nn.LayerNorm | nn.BatchNorm2d,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of a Linear, Conv2d or LayerNorm in float64; zeros where it has no bias."""
    weight = wide(layer.weight)
    bias = weight.new_zeros(weight.shape[0]) if layer.bias is None else wide(layer.bias)
    return weight, bias


def fold_norm_into_linear(
    norm: nn.LayerNorm, weight: torch.Tensor, bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Move LayerNorm's affine part into the linear map after it (A1).

    W (z * gamma + beta) + b = (W diag(gamma)) z + (b + W beta).

    Args:
        weight, bias: (out, C) and (out,), float64.
    """
    gamma, beta = wide_affine(norm)
    return weight * gamma, bias + weight @ beta


def narrow(packed: Packed, like: torch.Tensor) -> Packed:
    """Cast folded tensors to the dtype and device of `like`, contiguous; other values stay."""
    return {
        name: value.to(device=like.device, dtype=like.dtype).contiguous()
        if isinstance(value, torch.Tensor)
        else value
        for name, value in packed.items()
    }

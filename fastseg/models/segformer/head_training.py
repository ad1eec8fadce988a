"""Decode heads with gradients: fastseg's own, and others' by `accelerate(training=True)`."""

from __future__ import annotations

from typing import Any

import torch

from fastseg.folding.swap import HOST
from fastseg.training.head import head_logits, head_reason, stripes_reason

# Under this name a head's trial has the reason why it has no other form in training.
TRIAL = "with gradients"
# Modules that call others, by the names of their classes.
_CALLERS = (
    *("SegformerMLP", "MLP", "ConvModule"),
    *("SegformerDecoder", "Conv2dReLU", "SegmentationHead"),  # smp's
)


def training_reason(host: Any, head: Any, *maps: torch.Tensor) -> str | None:
    """Reason why the head runs as it is written; None where every projection is composed."""
    refused: Any = getattr(head, "_fastseg_refused", {})  # which the copy of a trial has not
    if TRIAL in refused:
        return str(refused[TRIAL])
    modules = host.modules(head)
    for one in modules.around:
        if type(one).__name__ not in _CALLERS:
            return f"one of its layers is a {type(one).__name__}"
    return head_reason(modules, *maps)


def training_line(host: Any, head: Any) -> str:
    """How the head runs with gradients, for people."""
    if reason := training_reason(host, head):
        return f"as it is written: {reason}"
    line = "every projection at its own stage's size"
    reason = stripes_reason(host.modules(head))
    return f"{line}, all in stripes" if reason is None else f"{line}, the rest as it is: {reason}"


def with_gradients(host: Any, head: Any, *args: Any, **kwargs: Any) -> Any:
    """Return what forward returns; HOST where the head runs as it is written."""
    if host.takes_pixels and training_reason(host, head) is not None:
        return HOST  # before its encoder runs
    maps = host.maps(head, *args, **kwargs)
    modules = host.modules(head)
    if len(maps) != len(modules.projections) or training_reason(host, head, *maps) is not None:
        return HOST
    logits = head_logits(modules, maps)
    return host.finish(head, logits, maps) if host.takes_pixels else logits

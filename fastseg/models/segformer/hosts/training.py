"""transformers' decode head with gradients: `accelerate(training=True)`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fastseg.folding.swap import HOST
from fastseg.training.head import fused_map, head_reason


def _mlps(head: Any) -> Any:
    """The modules that project a stage's map each."""
    return head.linear_projections if hasattr(head, "linear_projections") else head.linear_c


def training_reason(head: Any, *maps: torch.Tensor) -> str | None:
    """Reason why the head runs as transformers wrote it; None where it composes.

    The rest of it, behind the fuse convolution, is known from the trial of `accelerate`.
    """
    mlps = _mlps(head)
    for mlp in mlps:
        forward: Any = type(mlp).forward
        if forward.__qualname__ != "SegformerMLP.forward":
            return "one of its layers is of another class"
    if any(one.ndim != 4 for one in maps):
        return "one of the maps is of tokens"
    return head_reason([one.proj for one in mlps], [mlps, *mlps], head.linear_fuse, *maps)


def with_gradients(head: Any, encoder_hidden_states: Sequence[torch.Tensor], **kwargs: Any) -> Any:
    """Return what forward returns; HOST where the head runs as transformers wrote it."""
    maps = list(encoder_hidden_states)
    if kwargs or len(maps) != len(_mlps(head)) or training_reason(head, *maps) is not None:
        return HOST
    fused = fused_map(maps, [one.proj for one in _mlps(head)], head.linear_fuse)
    return head.classifier(head.dropout(head.activation(head.batch_norm(fused))))

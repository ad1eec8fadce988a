"""Stochastic depth with gradients: what is left out is not computed, where that can be known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def draw_factors(drop_path: Any, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
    """What the branch of each picture is multiplied by, (B,): 0 or 1 / (share that is kept).

    Drawn as `DropPath` draws, fastseg's and transformers'.

    Args:
        drop_path: the module, or one that drops nothing.
        x: (B, ...).
        dtype: of the branch.

    Returns:
        float32, or float64 for float64; None where nothing is dropped.
    """
    share = getattr(drop_path, "drop_prob", 0.0)
    if not share or not drop_path.training:
        return None
    drawn = torch.rand((len(x), 1, 1), dtype=dtype, device=x.device)
    kept = torch.floor(drawn + (1 - share)).flatten()
    return kept.to(torch.promote_types(dtype, torch.float32)) / (1 - share)


def add_branch(
    x: torch.Tensor,
    branch: Callable[[torch.Tensor], torch.Tensor],
    factors: torch.Tensor | None,
) -> torch.Tensor:
    """`x + factors * branch(x)`, without `branch` of pictures whose factor is 0 on a CPU.

    Elsewhere, and in graphs, to know them would wait for the device.

    Args:
        x: (B, N, C).
        branch: its picture by picture; the parameters in it get gradients of 0 of no picture.
    """
    if factors is None:
        return x + branch(x)
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return x + (factors.view(-1, 1, 1) * branch(x)).to(x.dtype)
    kept = factors.nonzero()[:, 0]
    if len(kept) == len(x):
        return torch.add(x, branch(x), alpha=factors[0].item())
    return x.index_add(0, kept, branch(x[kept]).to(x.dtype), alpha=factors.max().item())

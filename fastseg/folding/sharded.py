"""Modules whose parameters torch's FSDP keeps in shards, and gathers for each forward.

`fully_shard` writes what it gathers past the counters of edits, and into memory that may lie where
it lay before. So nothing that is folded of it could be known to be stale: nothing is folded.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn


def sharded_reason(module: nn.Module) -> str | None:
    """Reason why nothing can be folded of `module` that lies in FSDP; None without it."""
    if is_sharded(module):
        return "FSDP gathers its weights for each forward, which PyTorch does not count as an edit"
    return None


def is_sharded(module: nn.Module) -> bool:
    """Return whether `fully_shard` was called for `module` or a module around it."""
    # The only place that knows of modules around one; who has not imported it has no FSDP.
    states: Any = sys.modules.get("torch.distributed._composable_state")
    if states is None:
        return False
    roots = [one for one in states._module_state_mapping if _is_root(one)]
    return any(inner is module for root in roots for inner in root.modules())


def is_gathered(module: nn.Module, tensor: torch.Tensor) -> bool:
    """Return whether `tensor` of `module` is a shard whose whole is there in a forward.

    Of tensor parallelism too it is a part there as well.
    """
    placements = getattr(tensor, "placements", None)
    if placements is None or sum(not one.is_replicate() for one in placements) > 1:
        return False
    return is_sharded(module)


def _is_root(module: nn.Module) -> bool:
    return isinstance(module, sys.modules["torch.distributed.fsdp"].FSDPModule)

"""The residual addition that ends a branch."""

from __future__ import annotations

import torch


def add_residual(branch: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """`x + branch`, in the memory of `branch` where it can hold the sum.

    Under autocast a branch may be in half precision beside tokens in float32, which stay so.
    """
    return branch.add_(x) if branch.dtype == x.dtype else x + branch

"""One small Triton kernel, by which the set-up check sees whether Triton works at all."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _double(x_ptr, y_ptr, SIZE: tl.constexpr):
    offsets = tl.arange(0, SIZE)
    tl.store(y_ptr + offsets, 2 * tl.load(x_ptr + offsets))


def check(device: torch.device) -> None:
    """Raise an error where the kernel does not compile, does not run or is wrong."""
    x = torch.arange(64, dtype=torch.float32, device=device)
    y = torch.empty_like(x)
    _double[(1,)](x, y, SIZE=64)
    if not torch.equal(y, 2 * x):
        raise ValueError(f"expected twice the input, got {y.tolist()}")

"""How far half precision may be from float64, on any CPU.

torch's own bfloat16 convolutions are wrong on some: with AMX those of 8 channels with kernel =
stride = 8 by 70 to 80 %, and a small model of transformers with them by 17 %. So the host's error
is the yardstick only as far as a CPU makes it that computes right.
"""

from __future__ import annotations

import torch

HALF_FACTOR = 1.25
# Whole models of this folder err by 0.3 to 1.1 units of rounding, where convolutions are right.
SANE_UNITS = 2


def sane_error(dtype: torch.dtype) -> float:
    """The largest relative RMS error of a host that computes right."""
    return SANE_UNITS * torch.finfo(dtype).eps


def half_bound(host_error: float, dtype: torch.dtype) -> float:
    """The largest relative RMS error that ours may have beside the host's, both against float64."""
    return HALF_FACTOR * min(host_error, sane_error(dtype))


def half_limit(dtype: torch.dtype) -> float:
    """The same where no host is run beside ours."""
    return half_bound(sane_error(dtype), dtype)

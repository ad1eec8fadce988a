"""Masks of dropout, drawn faster than torch draws them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

# A number, which torch.compile can read, as it cannot a ContextVar. A thread that trains meanwhile
# has torch's masks too, which are as good.
_compared = 0


@contextlib.contextmanager
def compared() -> Iterator[None]:
    """For comparisons with modules: small maps go in stripes too, and masks are torch's.

    They are those that torch draws of channels-last maps.
    """
    global _compared
    _compared += 1
    try:
        yield
    finally:
        _compared -= 1


def is_compared() -> bool:
    """Return whether this is inside of `compared`."""
    return _compared > 0


def draw_mask(dropout: Any, shape: Sequence[int], device: str) -> tuple[torch.Tensor | None, float]:
    """A mask of 0 and 1 as bytes, and the share that it keeps.

    From 16 random bits each, which takes 2 ns; torch's bernoulli_ takes 9 to 12 on an AMD core, a
    tenth of a step of B0. So the share is a multiple of 2^-16, by which what is kept is divided.
    """
    if dropout is None or not dropout.training or dropout.p == 0:
        return None, 1.0
    if isinstance(dropout, nn.Dropout2d):
        shape = (shape[0], 1, 1, shape[3])
    if is_compared():
        share = 1 - dropout.p
        return torch.empty(shape, dtype=torch.uint8, device=device).bernoulli_(share), share
    count = math.prod(shape)
    bits = torch.empty(-(-count // 4), dtype=torch.int64, device=device).random_(-(2**63), None)
    dropped = min(round(dropout.p * 2**16), 2**16 - 1)
    mask = bits.view(torch.int16)[:count].view(shape) >= dropped - 2**15
    return mask.view(torch.uint8), 1 - dropped / 2**16

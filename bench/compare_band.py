"""Is a case slower than before, or is it noise? Ratios of paired rounds, and the band of chance.

The base runs in two processes, A and A'. What their ratio does is noise by construction: other
programs, the clock, where memory happened to lie. The rounds of A / A' are drawn again with
replacement, many times, and the band is the 99 % quantile of |log(median)|: how far from 1 equal
code comes. A lasting difference of two processes of the same code widens it too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_RESAMPLES = 2000
CONFIDENCE = 0.99


@dataclass(frozen=True)
class Finding:
    """What the rounds of a case say."""

    base_ms: float  # medians
    new_ms: float
    ratio: float  # median over rounds of base / new: below 1 is slower
    band: float  # as a share: within 1 / (1 + band) to 1 + band a ratio is noise

    @property
    def verdict(self) -> str:
        if self.ratio < 1 / (1 + self.band):
            return "slower"
        return "faster" if self.ratio > 1 + self.band else "same"


def noise_band(first: Sequence[float], second: Sequence[float]) -> float:
    """The band of chance from rounds of equal code, as a share."""
    logs = np.log(np.divide(first, second))
    draws = np.random.default_rng(0).choice(logs, size=(_RESAMPLES, len(logs)))
    return math.expm1(np.quantile(np.abs(np.median(draws, axis=1)), CONFIDENCE))


def judge(
    first: Sequence[float], second: Sequence[float], new: Sequence[float], threshold: float
) -> Finding:
    """Compare rounds of milliseconds: `first` and `second` of the base, `new` of the other side.

    Args:
        threshold: the narrowest band, as a share.
    """
    base = np.sqrt(np.multiply(first, second))  # of a round
    return Finding(
        base_ms=float(np.median([*first, *second])),
        new_ms=float(np.median(new)),
        ratio=float(np.median(base / np.asarray(new))),
        band=max(threshold, noise_band(first, second)),
    )


def parity_error(base: np.ndarray, new: np.ndarray) -> tuple[float, float, str]:
    """How far `new` is from `base`, how far it may be, and what that measures.

    Label maps may differ where two classes are nearly equal, which summation order decides.
    """
    integers = np.issubdtype(base.dtype, np.integer)
    measure = "share of pixels that differ" if integers else "relative RMS difference"
    bound = 1e-4 if integers else 1e-5
    if base.shape != new.shape or base.dtype != new.dtype:
        return math.inf, bound, f"{measure} ({base.dtype}{base.shape}, {new.dtype}{new.shape})"
    if integers:
        return float((base != new).mean()), bound, measure
    wide = base.astype(np.float64)
    difference = np.square(new - wide).mean() / np.square(wide).mean()
    return float(np.sqrt(difference)), bound, measure

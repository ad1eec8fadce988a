"""Time several functions in turn, A B A B, so that drifts of the machine meet all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

WARM_UP_ROUNDS = 2


def interleave(
    functions: Mapping[str, Callable[[], Any]], repeats: int, label: str = ""
) -> dict[str, list[float]]:
    """Milliseconds of each call: `repeats` rounds in which every function is called once.

    Rounds to warm up come first and are not in the result. A bar on stderr shows the rounds.
    """
    samples: dict[str, list[float]] = {name: [] for name in functions}
    rounds: Iterable[int] = tqdm(range(-WARM_UP_ROUNDS, repeats), desc=label, leave=False)
    for number in rounds:
        for name, function in functions.items():
            start = time.perf_counter()
            result = function()
            taken = 1000 * (time.perf_counter() - start)
            # Freed here, outside the time: the next function finds the same memory as this one.
            del result
            if number >= 0:
                samples[name].append(taken)
    return samples


def quantiles(samples: Sequence[float]) -> dict[str, float]:
    """The quantiles p20, p50 and p80."""
    return {
        name: float(np.quantile(samples, share))
        for name, share in (("p20", 0.2), ("p50", 0.5), ("p80", 0.8))
    }


def ratios(baseline: Sequence[float], samples: Sequence[float]) -> dict[str, float]:
    """How many times smaller `samples` are: by the medians, and by the median of paired ratios.

    The two agree unless the machine drifted during the run.
    """
    return {
        "ratio": float(np.median(baseline) / np.median(samples)),
        "paired_ratio": float(np.median(np.divide(baseline, samples))),
    }

"""Time several functions in turn, A B A B, so that drifts of the machine meet all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from .rows import STEPS, WHOLE

WARM_UP_ROUNDS = 2
# Before each call: threads that another library left spinning go to sleep meanwhile.
_PAUSE_SECONDS = 0.01

# Runs its argument and tells the milliseconds that it took.
Clock = Callable[[Callable[[], Any]], float]


def wall_clock(function: Callable[[], Any]) -> float:
    """Milliseconds of a call on a CPU."""
    time.sleep(_PAUSE_SECONDS)
    start = time.perf_counter()
    result = function()
    taken = 1000 * (time.perf_counter() - start)
    # Freed here, outside the time: the next function finds the same memory as this one.
    del result
    return taken


def interleave(
    functions: Mapping[str, Callable[[], Any]],
    repeats: int,
    label: str = "",
    clock: Clock = wall_clock,
    warm_up_seconds: float = 0.0,
    warm_up_rounds: int = WARM_UP_ROUNDS,
) -> dict[str, list[float]]:
    """Milliseconds of each call: `repeats` rounds in which every function is called once.

    Rounds to warm up come first and do not count, nor do those of `warm_up_seconds`: a GPU that was
    idle while a CPU compiled has slow clocks.
    """
    samples: dict[str, list[float]] = {name: [] for name in functions}
    stop = time.monotonic() + warm_up_seconds
    while time.monotonic() < stop:
        for function in functions.values():
            clock(function)
    for number in tqdm(range(-warm_up_rounds, repeats), label, leave=False, disable=None):
        for name, function in functions.items():
            taken = clock(function)
            if number >= 0:
                samples[name].append(taken)
    return samples


def interleave_steps(
    pipelines: Mapping[str, Sequence[Callable[[Any], Any]]],
    source: Any,
    repeats: int,
    label: str = "",
    wait: Callable[[], None] = lambda: None,
) -> dict[str, dict[str, list[float]]]:
    """Milliseconds of the whole and of each step, by part and by name, taken in turn.

    Of a pipeline, the functions of STEPS, the first gets `source`, each of the others what the one
    before gave. `wait` returns when the device has done what it was asked for.
    """
    samples: dict[str, dict[str, list[float]]] = {
        part: {name: [] for name in pipelines} for part in (WHOLE, *STEPS)
    }
    for number in tqdm(range(-WARM_UP_ROUNDS, repeats), label, leave=False, disable=None):
        for name, functions in pipelines.items():
            time.sleep(_PAUSE_SECONDS)
            value, taken = source, []
            for function in functions:
                start = time.perf_counter()
                value = function(value)
                wait()
                taken.append(1000 * (time.perf_counter() - start))
            del value
            if number >= 0:
                for part, one in zip(samples, (sum(taken), *taken), strict=True):
                    samples[part][name].append(one)
    return samples


def event_clock(device: torch.device) -> Clock:
    """Milliseconds between events before and after a call, as a GPU meets them.

    The CPU's own work is in it where the GPU has to wait for it: that is what a caller sees.
    """

    def clock(function: Callable[[], Any]) -> float:
        function()  # the caches are as this provider leaves them, not as the one before did
        torch.cuda.synchronize(device)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    return clock


def quantiles(samples: Sequence[float]) -> dict[str, float]:
    """The quantiles p20, p50 and p80."""
    return {f"p{share}": float(np.quantile(samples, share / 100)) for share in (20, 50, 80)}


def ratios(baseline: Sequence[float], samples: Sequence[float]) -> dict[str, float]:
    """How many times smaller `samples` are: by the medians, and by the median of paired ratios.

    The two agree unless the machine drifted during the run.
    """
    return {
        "ratio": float(np.median(baseline) / np.median(samples)),
        "paired_ratio": float(np.median(np.divide(baseline, samples))),
    }

"""The most memory that tensors had at once."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch


def most_allocated(function: Callable[[], Any], device: torch.device) -> int:
    """Bytes that torch's allocator had given out at once while `function` ran, over those before.

    On a CPU from the profiler's events: exact, whatever the allocator and the system keep.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        function()
    found: Any = profile.profiler
    events = [one for one in found.kineto_results.events() if one.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda one: one.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most

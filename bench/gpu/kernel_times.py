"""`python -m bench.gpu.kernel_times`: where the time of a forward goes, kernel by kernel.

A forward to its label map is captured in a CUDA graph. Replays back to back tell the time of the
GPU alone, without the host; torch's profiler over some more tells each kernel's, by name and grid,
and what is left between kernels. Without a GPU the forward is called and torch's operators stand in
for kernels: that tries the script.
"""

from __future__ import annotations

import functools
import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from fastseg.kernels.core.semaphores import passing_graphs

from ..measure.run import tidy
from ..providers.pytorch import capture
from .forwards import Report, label_map

_REPLAYS, _PROFILED = 200, 50
_SHOWN = 12  # kernels of a forward


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    report = Report("kernel_times", argv)
    with torch.no_grad(), passing_graphs():
        for setting, model, pixels in report.left():
            call = functools.partial(label_map, model, pixels)
            replay = capture(call) if report.on_gpu else call
            each = _microseconds(replay, report.device)
            kernels = profiled(replay, report.device)
            busy = sum(one["us"] * one["count"] for one in kernels)
            count = sum(one["count"] for one in kernels)
            whole = {"kernel": "", "us": round(each, 1), "count": 1, "busy_us": round(busy, 1)}
            print(f"{setting}: {each:.0f} us a replay, {count:g} kernels of {busy:.0f} us in all")
            for one in kernels[:_SHOWN]:
                total = one["us"] * one["count"]
                print(f"  {total:8.1f} us = {one['count']:g} x {one['us']:.1f}  {one['kernel']} "
                      f"{one['grid']}")  # fmt: skip
            report.add(setting, [whole, *kernels])
            del model, call, replay
            tidy(report.device)
    return 0


def _microseconds(replay: Callable[[], Any], device: torch.device) -> float:
    """Of a replay, among many back to back."""
    replays = _REPLAYS if device.type == "cuda" else 3
    for _ in range(replays // 4 + 1):
        replay()
    if device.type != "cuda":
        began = time.perf_counter()
        for _ in range(replays):
            replay()
        return 1e6 * (time.perf_counter() - began) / replays
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(replays):
        replay()
    end.record()
    end.synchronize()
    return 1e3 * start.elapsed_time(end) / replays


def profiled(replay: Callable[[], Any], device: torch.device) -> list[dict[str, Any]]:
    """Kernels of a replay by name and grid: how many, and the median time of one in us."""
    on_gpu = device.type == "cuda"
    replays = _PROFILED if on_gpu else 3
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    with profile(activities=[activity]) as run:
        for _ in range(replays):
            replay()
        if on_gpu:
            torch.cuda.synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        run.export_chrome_trace(str(path))  # events of torch itself do not tell the grid
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    kinds = ("kernel", "gpu_memcpy", "gpu_memset") if on_gpu else ("cpu_op",)
    times: dict[tuple[str, str], list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") in kinds:
            grid = "x".join(map(str, event["args"].get("grid", ())))
            times[event["name"], grid].append(event["dur"])
    found = [
        {"kernel": kernel, "grid": grid, "count": len(taken) / replays, "us": median(taken)}
        for (kernel, grid), taken in times.items()
    ]
    return sorted(found, key=lambda one: one["us"] * one["count"], reverse=True)


if __name__ == "__main__":
    sys.exit(main())

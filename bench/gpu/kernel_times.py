"""`python -m bench.gpu.kernel_times`: where the time of a forward goes, kernel by kernel.

A forward to its label map is captured in a CUDA graph. Replays back to back tell the time of the
GPU alone, without the host; torch's profiler over some more tells each kernel's, by name and grid,
and what is left between kernels. Without a GPU the forward is called and torch's operators stand in
for kernels: that tries the script.
"""

from __future__ import annotations

import argparse
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
from ..setting import Setting, first_line
from .forwards import FORWARDS, QUICK, build, label_map
from .stages import read_lines

_REPLAYS, _PROFILED = 200, 50
_SHOWN = 12  # kernels of a forward


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. What FILE has from an earlier call is not looked at again."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.kernel_times")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="JSON lines")
    given = parser.parse_args(argv)
    device = torch.device(given.device)
    done = {line["case"] for line in read_lines(given.output)}
    status = 0
    for setting in QUICK if given.quick else FORWARDS:
        if str(setting) in done:
            continue
        try:
            with torch.no_grad(), passing_graphs():
                found = _times(setting, device)
        except torch.AcceleratorError:  # the GPU is lost to this process
            raise
        except Exception as error:  # of a kernel or a capture: the other forwards are told
            print(f"{setting}: {first_line(error)}", flush=True)
            status = 1
            continue
        lines = [json.dumps({"case": str(setting), **one}) for one in found]
        with given.output.open("a", encoding="utf-8") as file:  # all of a forward, or none
            file.write("\n".join(lines) + "\n")
        tidy(device)
    return status


def _times(setting: Setting, device: torch.device) -> list[dict[str, Any]]:
    """The whole, with an empty name, and its kernels; printed as well."""
    call = functools.partial(label_map, *build(setting, device))
    replay = capture(call) if device.type == "cuda" else call
    each = _microseconds(replay, device)
    kernels = profiled(replay, device)
    busy = sum(one["us"] * one["count"] for one in kernels)
    count = sum(one["count"] for one in kernels)
    print(f"{setting}: {each:.0f} us a replay, {count:g} kernels of {busy:.0f} us in all")
    for one in kernels[:_SHOWN]:
        total, what = one["us"] * one["count"], f"{one['kernel']} {one['grid']}"
        print(f"  {total:8.1f} us = {one['count']:g} x {one['us']:.1f}  {what}", flush=True)
    return [{"kernel": "", "us": each, "count": 1, "busy_us": busy}, *kernels]


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

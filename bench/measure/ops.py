"""Every op of a forward against its eager twin, that twin compiled, and its floor.

A forward is recorded, then each kind of call is run by each provider, checked against the twin in
float64, and timed in turn: on a CPU call by call, on a GPU by Triton's do_bench_cudagraph ("warm":
small inputs are found in the L2 cache) and do_bench ("cold": it is written over before each call).
A forward is in between: tokens come warm from the op before, weights cold where a model outgrows
the cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

import fastseg
from fastseg.kernels.core.semaphores import passing_graphs

from ..options import OP_PROVIDERS
from ..rows import Row
from ..setting import DTYPES, Setting, build_model, draw_pixels, first_line
from ..work import work
from . import calls
from .calls import CountedCall
from .run import Checked, Run, what_of

BASELINE, _, KERNELS = OP_PROVIDERS
_TURNS, _MILLISECONDS = 3, 10  # on a GPU, of each provider
_METHODS = {"warm": "CUDA graphs", "cold": "CUDA events"}


def measure(run: Run) -> None:
    """Add the rows of "op"."""
    if KERNELS in run.options.providers and not run.on_gpu:
        run.say("kernels: skipped, they run on a GPU")
    measured: dict[str, list[Row]] = {}  # variants share kinds of calls
    for setting in run.options.settings:
        try:
            _measure_setting(run, setting, measured)
        except torch.OutOfMemoryError as error:
            run.say(f"{setting}: skipped, {first_line(error)}")


def _measure_setting(run: Run, setting: Setting, measured: dict[str, list[Row]]) -> None:
    device, dtype = run.options.device, DTYPES[setting.dtype]
    if not run.wants({**what_of("op", setting), "part": ""}, str(setting)):
        return
    run.ceilings(setting.dtype)
    pixels = draw_pixels(setting.size, setting.batch).to(device, dtype)
    found = calls.record(build_model(setting.variant, device, dtype), pixels)
    for op, reason in calls.missing(found).items():
        if op in run.options.ops:
            run.say(f"{setting}, {op}: skipped, {reason}")
    for call in found:
        what, label = {**what_of("op", setting), "part": call.part}, f"{setting}, {call.part}"
        if call.op not in run.options.ops or not run.wants(what, label):
            continue
        # The time of most does not depend on values.
        key = call.key() + (setting.variant if call.op == "upsample_argmax" else "")
        if key not in measured:
            measured[key] = _measure_call(run, call, {**what, "count": call.count}, label)
            continue
        if not measured[key]:
            run.say(f"{label}: no figure, as for the same call of another variant")
        part, count = call.part, call.count
        rows = [replace(row, case=setting.variant, part=part, count=count) for row in measured[key]]
        run.add(rows)


def _measure_call(run: Run, call: CountedCall, what: dict[str, Any], label: str) -> list[Row]:
    checked = _checked(run, call, label)
    if BASELINE not in checked:
        run.say(f"{label}: no figure without the baseline")
        return []
    if not run.on_gpu:
        before = len(run.measured)
        bound = {n: replace(one, function=call.bind(one.function)) for n, one in checked.items()}
        run.time(what, bound, label, [work(call)])
        return run.measured[before:]
    found: list[Row] = []
    for cache in ("warm", "cold"):
        samples = _gpu_samples(run, call, checked, cache, f"{label}, {cache}")
        if BASELINE in samples:
            floor = run.floor([work(call)], what["dtype"])
            common = {**what, **floor, "cache": cache, "method": _METHODS[cache]}
            found += run.rows(common, samples, checked)
    run.add(found)
    return found


def _checked(run: Run, call: CountedCall, label: str) -> dict[str, Checked]:
    """The providers with the right result."""
    found: dict[str, Checked] = {}
    gate = None
    for name in run.options.providers:
        if name == KERNELS and not run.on_gpu:
            continue
        with run.telling(label, name, ours=name == KERNELS):
            function = calls.provider(name, call)
            result = call.bind(function)()
            gate = gate or calls.gate(call, result)  # the eager twin comes first
            version = str(torch.__version__) if name == "compiled" else fastseg.__version__
            found[name] = Checked(function, version, gate, gate.check(name, result))
        if not found:
            break  # nothing to compare with
    return found


def _gpu_samples(
    run: Run, call: CountedCall, checked: Mapping[str, Checked], cache: str, label: str
) -> dict[str, list[float]]:
    from triton.testing import do_bench, do_bench_cudagraph

    samples: dict[str, list[float]] = {}
    # Captured launches keep their counters for good, in an arena that is no larger than forwards
    # need. These graphs end here, so what they took is given back.
    with torch.cuda.device(run.options.device), passing_graphs():
        for _ in range(_TURNS):
            for name, one in checked.items():
                with run.telling(label, name, ours=name == KERNELS):
                    time = do_bench_cudagraph if cache == "warm" else do_bench
                    taken = time(call.bind(one.function), rep=_MILLISECONDS, return_mode="all")
                    samples.setdefault(name, []).extend(taken)
    least = min(map(len, samples.values()), default=0)  # pairs of the same turns
    return {name: taken[:least] for name, taken in samples.items()}

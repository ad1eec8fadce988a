"""Every op of a forward against its eager twin, that twin compiled, and its floor.

A forward is recorded, then each kind of call is run by each provider, checked against the twin in
float64, and timed in turn: on a CPU call by call, on a GPU by Triton's do_bench_cudagraph ("warm":
small inputs are found in the L2 cache) and do_bench ("cold": it is written over before each call,
and starting the kernels counts where the GPU waits for it). A forward is in between: tokens come
warm from the op before, weights cold where a model outgrows the cache.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

import fastseg
from fastseg.kernels.core.semaphores import passing_graphs

from ..gates import Gate
from ..options import OP_PROVIDERS
from ..rows import Row
from ..setting import DTYPES, Setting, build_model, draw_pixels, first_line
from ..work import work
from . import calls
from .calls import CountedCall
from .run import Checked, Run, what_of

BASELINE, _, KERNELS = OP_PROVIDERS
_TURNS, _MILLISECONDS = 2, 10  # on a GPU, of each provider
_METHODS = {"warm": "CUDA graphs", "cold": "CUDA events"}


def measure(run: Run) -> None:
    """Add the rows of "op"."""
    if KERNELS in run.options.providers and not run.on_gpu:
        run.say("kernels: skipped, they run on a GPU")
        run.options.providers = run.options.providers[:-1]
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
        new: Any = {"case": setting.variant, "part": call.part, "count": call.count}
        run.add([replace(row, **new) for row in measured[key]])


def _measure_call(run: Run, call: CountedCall, what: dict[str, Any], label: str) -> list[Row]:
    gate: Gate | None = None

    @torch.inference_mode()  # as it is timed: torch.compile makes one graph for both
    def check(name: str) -> Checked:
        nonlocal gate
        function = calls.provider(name, call)
        result = call.bind(function)()
        gate = gate or calls.gate(call, result)  # the eager twin comes first
        version = str(torch.__version__) if name == "compiled" else fastseg.__version__
        return Checked(function, version, gate, gate.check(name, result))

    checked = run.checked(label, run.options.providers, check)
    if not checked:
        return []
    if not run.on_gpu:
        before = len(run.measured)
        bound = {n: replace(one, function=call.bind(one.function)) for n, one in checked.items()}
        run.time(what, bound, label, [work(call)])
        return run.measured[before:]
    found: list[Row] = []
    for cache in ("warm", "cold"):
        if samples := _gpu_samples(run, call, checked, cache, f"{label}, {cache}"):
            floor = run.floor([work(call)], what["dtype"])
            common = {**what, **floor, "cache": cache, "method": _METHODS[cache]}
            found += run.rows(common, samples, checked)
    run.add(found)
    return found


def _gpu_samples(
    run: Run, call: CountedCall, checked: Mapping[str, Checked], cache: str, label: str
) -> dict[str, list[float]]:
    from triton.testing import do_bench, do_bench_cudagraph

    time = do_bench_cudagraph if cache == "warm" else do_bench
    turns: dict[str, list[list[float]]] = {name: [] for name in checked}
    # Captured launches keep their counters for good, in an arena that is no larger than forwards
    # need. These graphs end here, so what they took is given back.
    gc.collect()  # a kernel that is unloaded during a capture spoils it
    gc.disable()
    with torch.cuda.device(run.options.device), passing_graphs():
        for _ in range(_TURNS):
            for name, one in checked.items():
                with run.telling(label, name, ours=name == KERNELS):
                    bound = call.bind(one.function)
                    turns[name].append(time(bound, rep=_MILLISECONDS, return_mode="all"))
    gc.enable()
    whole = {name: taken for name, taken in turns.items() if len(taken) == _TURNS}
    if BASELINE not in whole:
        return {}
    # As many of each turn, for pairs: a quick provider has more samples.
    least = min(len(one) for taken in whole.values() for one in taken)
    return {name: [ms for one in taken for ms in one[:least]] for name, taken in whole.items()}

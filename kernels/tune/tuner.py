"""The tuner: measures launch configurations on the present GPU, and writes the best to a file.

It runs a model once and notes each call of an op and what the op looks up. Then, look-up by
look-up, what takes most time first, the op is called with every candidate: first its result is
compared with the eager twin's, then it is timed by replaying CUDA graphs. Nothing tunes by itself:
the file is used where FASTSEG_CONFIGS names it, or once it is committed as the file of its device
family.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import wait
from pathlib import Path
from typing import Any, NamedTuple

import torch
from triton.errors import TritonError

from ..core import registry
from ..core.configurations import (
    Config,
    Query,
    answer,
    family_entries,
    fits,
    overrides,
    read_kernels,
    record_queries,
)
from ..core.launch import Launch, record_launches
from ..core.semaphores import passing_graphs
from .calls import OpCall, OpRecorder
from .candidates import candidates
from .precompile import Precompiler

Measure = Callable[[Callable[[], Any]], float]  # microseconds of a call
# Relative RMS errors that stand for exact, where the eager twin errs less.
_FLOORS = {torch.float32: 2e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}


class Tuned(NamedTuple):
    """The best configuration for a look-up."""

    query: Query
    config: Config
    microseconds: float
    before_microseconds: float  # of the configuration used before
    tried: int
    rejected: int  # of those tried: could not run, or gave wrong answers


def record_calls(function: Callable[[], Any]) -> list[tuple[OpCall, int]]:
    """The kinds of calls of ops that `function` makes, and how often each."""
    calls: dict[str, OpCall] = {}
    counts: Counter[str] = Counter()

    def note(call: OpCall) -> None:
        calls.setdefault(call.key(), call)
        counts[call.key()] += 1

    with torch.no_grad(), OpRecorder(note):
        function()
    return [(call, counts[key]) for key, call in calls.items()]


def graph_microseconds(function: Callable[[], Any]) -> float:
    """Median time of a call, from replayed CUDA graphs."""
    from triton.testing import do_bench_cudagraph

    with passing_graphs():
        return 1e3 * do_bench_cudagraph(function, rep=10, return_mode="median")


def wall_microseconds(function: Callable[[], Any]) -> float:
    """Time of one call, for Triton's interpreter, where the tuner is only tried."""
    began = time.perf_counter()
    function()
    return 1e6 * (time.perf_counter() - began)


def most_time_first(calls: Sequence[tuple[OpCall, int]], measure: Measure) -> list[OpCall]:
    """The calls in the order of the time that they take in all, with present configurations."""

    def microseconds(counted: tuple[OpCall, int]) -> float:
        call, count = counted
        return count * _measured(lambda: measure(lambda: _kernels(call)))

    return [call for call, _ in sorted(calls, key=microseconds, reverse=True)]


def tune(
    calls: Sequence[OpCall],
    measure: Measure = graph_microseconds,
    seconds: float = float("inf"),
    report: Callable[[Tuned], None] = lambda tuned: None,
    compiler: Precompiler | None = None,
) -> list[Tuned]:
    """Find the best configuration for every look-up of `calls`, in their order.

    Args:
        measure: gives the time of a call in microseconds.
        seconds: nothing new is begun after this time.
        report: called with each result as it comes.
        compiler: compiles candidates, also those of calls to come while others are measured.
    """
    stop = time.monotonic() + seconds
    results: dict[Query, Tuned] = {}
    if compiler:
        for call in calls:
            for query in dict.fromkeys(_queries(call, {})):
                compiler.begin(_launches(call, query, {}))
    for call in calls:
        # An op's choice of form decides what else it looks up, so it is asked again each time.
        while time.monotonic() < stop:
            queries = _queries(call, _chosen(results))
            query = next((query for query in queries if query not in results), None)
            if query is None:
                break
            chosen = _chosen(results)
            if compiler:
                wait(compiler.begin(_launches(call, query, chosen)))
            results[query] = _tune_query(call, query, chosen, measure, stop)
            report(results[query])
    return list(results.values())


def _queries(call: OpCall, chosen: dict[Query, Config]) -> list[Query]:
    """What the launches of `call` look up."""
    # Nothing is launched: the present configuration may not fit this GPU.
    with overrides(chosen), record_queries() as queries, record_launches(dry=True):
        _kernels(call)
    return queries


def _launches(call: OpCall, query: Query, chosen: dict[Query, Config]) -> list[Launch]:
    """What the present configuration for `query` and its candidates launch, in turn."""
    found: list[Launch] = []
    for config in [None, *_options(query)]:
        changed = {} if config is None else {query: config}
        with overrides({**chosen, **changed}), record_launches(dry=True) as launches:
            _kernels(call)
        found += launches
    return found


def _options(query: Query) -> list[Config]:
    return [option for option in candidates(query) if fits(option, query)]


def _measured(microseconds: Callable[[], float]) -> float:
    """What `microseconds` gives; infinity where the kernels ask for more than the GPU has."""
    try:
        return microseconds()
    except torch.AcceleratorError:  # the GPU is lost to this process
        raise
    except (TritonError, RuntimeError):  # of resources, or of what cannot be compiled
        return float("inf")


def _kernels(call: OpCall) -> torch.Tensor:
    return call.bind(registry.launcher(call.op))()


def _chosen(results: dict[Query, Tuned]) -> dict[Query, Config]:
    return {query: tuned.config for query, tuned in results.items()}


def _tune_query(
    call: OpCall,
    query: Query,
    chosen: dict[Query, Config],
    measure: Measure,
    stop: float,
) -> Tuned:
    """The best of the present configuration and of the candidates that there is time for."""
    eager = registry.eager_twin(call.op)
    twin = call.bind(eager)()
    exact = _wide(call).bind(eager)()

    def microseconds(config: Config) -> float:
        """Time of the call, infinite where it is wrong or asks for more than the GPU has."""

        def checked() -> float:
            is_right = _agree(_poisoned(call), twin, exact)
            return measure(lambda: _kernels(call)) if is_right else float("inf")

        with overrides({**chosen, query: config}):
            return _measured(checked)

    with overrides(chosen):
        present = answer(query, twin.device)
    options = [option for option in _options(query) if option != present]
    times = [microseconds(present)]
    for option in options:
        if time.monotonic() >= stop:
            break
        times.append(microseconds(option))
    best = min(range(len(times)), key=times.__getitem__)
    return Tuned(
        query=query,
        config=[present, *options][best],
        microseconds=times[best],
        before_microseconds=times[0],
        tried=len(times),
        rejected=times.count(float("inf")),
    )


def _wide(call: OpCall) -> OpCall:
    """The call in float64."""

    def widen(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.double() if value.is_floating_point() else value
        return [widen(item) for item in value] if isinstance(value, (list, tuple)) else value

    return OpCall(call.op, {name: widen(value) for name, value in call.arguments.items()})


def _poisoned(call: OpCall) -> torch.Tensor:
    """The kernels' result, where memory that they leave unwritten is NaN or a large integer."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # fills what torch.empty gives
    try:
        return _kernels(call)
    finally:
        torch.use_deterministic_algorithms(before)


def _agree(result: torch.Tensor, twin: torch.Tensor, exact: torch.Tensor) -> bool:
    """Return whether a result errs at most twice as much as the eager twin; False with NaN."""
    if not result.is_floating_point():
        # Label maps: classes that tie but for rounding may change places.
        return (result != exact).double().mean().item() < 1e-2

    def error(tensor: torch.Tensor) -> torch.Tensor:
        return (tensor.double() - exact).square().mean().sqrt()

    floor = _FLOORS[result.dtype] * exact.square().mean().sqrt()
    return bool(error(result) <= 2 * torch.maximum(error(twin), floor))


def entries(tuned: Sequence[Tuned]) -> dict[str, list[dict[str, Any]]]:
    """Results as the entries of a configuration file, by kernel."""
    by_kernel: dict[str, list[dict[str, Any]]] = {}
    for result in tuned:
        if result.microseconds == float("inf"):
            continue  # nothing ran right: better no entry than a wrong one
        by_kernel.setdefault(result.query.kernel, []).append(
            {
                "dtype": result.query.dtype,
                "sizes": dict(result.query.sizes),
                "config": result.config,
                "microseconds": round(result.microseconds, 2),
                "before_microseconds": round(result.before_microseconds, 2),
            }
        )
    return by_kernel


def write_configs(path: Path, family: str, source: str, tuned: Sequence[Tuned]) -> None:
    """Write a file of the committed form: what it held, or the family, replaced where measured.

    The file is complete at any time: it is written beside its place and moved there.
    """
    before = read_kernels(path) if path.exists() else family_entries(family)
    kernels = {name: list(rows) for name, rows in before.items()}
    for kernel, measured in entries(tuned).items():
        replaced = [(row["dtype"], row["sizes"]) for row in measured]
        kept = [
            row
            for row in kernels.get(kernel, [])
            if (row["dtype"], row.get("sizes", {})) not in replaced
        ]
        kernels[kernel] = kept + measured
    body = ",\n".join(
        f"    {json.dumps(kernel)}: [\n"
        + ",\n".join(f"      {json.dumps(row)}" for row in rows)
        + "\n    ]"
        for kernel, rows in sorted(kernels.items())
    )
    head = f'  "family": {json.dumps(family)},\n  "source": {json.dumps(source)},\n'
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(f'{{\n{head}  "kernels": {{\n{body}\n  }}\n}}\n', encoding="utf-8")
    os.replace(temporary, path)

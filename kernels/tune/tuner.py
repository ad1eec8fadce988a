"""The tuner: measures launch configurations on the present GPU, and writes the best to a file.

It runs a model once and notes each call of an op and what the op looks up. Then, look-up by
look-up, the op is called with every candidate: first its result is compared with the eager twin's,
then it is timed by replaying CUDA graphs. Nothing tunes by itself: the file is used where
FASTSEG_CONFIGS names it, or once it is committed as the file of its device family.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
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
    record_queries,
)
from ..core.launch import record_launches
from ..core.semaphores import passing_graphs
from .calls import OpCall, OpRecorder
from .candidates import candidates

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


def record_calls(function: Callable[[], Any]) -> list[OpCall]:
    """The calls of ops that `function` makes, each kind once."""
    calls: dict[str, OpCall] = {}
    with torch.no_grad(), OpRecorder(lambda call: calls.setdefault(call.key(), call)):
        function()
    return list(calls.values())


def graph_microseconds(function: Callable[[], Any]) -> float:
    """Median time of a call, from replayed CUDA graphs."""
    from triton.testing import do_bench_cudagraph

    with passing_graphs():
        return 1e3 * do_bench_cudagraph(function, rep=10, return_mode="median")


def tune(
    calls: Sequence[OpCall],
    measure: Callable[[Callable[[], Any]], float] = graph_microseconds,
    seconds: float = float("inf"),
    report: Callable[[Tuned], None] = lambda tuned: None,
) -> list[Tuned]:
    """Find the best configuration for every look-up of `calls`.

    Args:
        measure: gives the time of a call in microseconds.
        seconds: no new look-up is begun after this time.
        report: called with each result as it comes.
    """
    stop = time.monotonic() + seconds
    results: dict[Query, Tuned] = {}
    for call in calls:
        # An op's choice of form decides what else it looks up, so it is asked again each time.
        while time.monotonic() < stop:
            with (
                overrides(_chosen(results)),
                record_queries() as queries,
                record_launches(dry=True),  # the present configuration may not fit this GPU
            ):
                _kernels(call)
            query = next((query for query in queries if query not in results), None)
            if query is None:
                break
            results[query] = _tune_query(call, query, _chosen(results), measure)
            report(results[query])
    return list(results.values())


def _kernels(call: OpCall) -> list[torch.Tensor]:
    return _results(call.bind(registry.FUSED[call.op])())


def _results(result: Any) -> list[torch.Tensor]:
    return list(result) if isinstance(result, (tuple, list)) else [result]


def _chosen(
    results: dict[Query, Tuned],
) -> dict[Query, Config]:
    return {query: tuned.config for query, tuned in results.items()}


def _tune_query(
    call: OpCall,
    query: Query,
    chosen: dict[Query, Config],
    measure: Callable[[Callable[[], Any]], float],
) -> Tuned:
    """The best of the present configuration and the candidates."""
    eager = registry.EAGER[call.op]
    twin = _results(call.bind(eager)())
    exact = _results(_wide(call).bind(eager)())

    def microseconds(config: Config) -> float:
        """Time of the call, infinite where it is wrong or asks for more than the GPU has."""
        with overrides({**chosen, query: config}):
            try:
                results = _poisoned(call)
                right = all(map(_agree, results, twin, exact))
                return measure(lambda: _kernels(call)) if right else float("inf")
            except torch.AcceleratorError:  # the GPU is lost to this process
                raise
            except (TritonError, RuntimeError):  # of resources, or of what cannot be compiled
                return float("inf")

    device = twin[0].device
    with overrides(chosen):
        present = answer(query, device)
    options = [option for option in candidates(query) if fits(option, query) and option != present]
    times = [microseconds(option) for option in [present, *options]]
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


def _poisoned(call: OpCall) -> list[torch.Tensor]:
    """The kernels' results, where memory that they leave unwritten is NaN or a large integer."""
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


def read_kernels(path: Path) -> dict[str, list[dict[str, Any]]]:
    """The entries of a configuration file, by kernel.

    Raises:
        ValueError: it is not such a file.
    """
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))["kernels"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"expected a file that `fastseg tune` wrote, got {error!r}") from error


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
